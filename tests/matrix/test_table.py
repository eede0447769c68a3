"""docs/compatibility.md: a row is a range of releases that are alike."""

from __future__ import annotations

from matrix.table import OK, Result, render


def test_releases_that_are_alike_share_a_row_and_what_upstream_raises_is_said_once() -> None:
    said = {("a", "greedy"): OK, ("a", "reset"): "KeyError: 'x'", ("a", "patch and unpatch"): OK}
    results = [
        Result("1.0", {}, 3),
        Result("1.1", said, 5),
        Result("1.2", said, 5),
        Result("1.3", {}, 0, ["one"], "no report"),
    ]
    text = [" ".join(line.split()) for line in render(results, ["greedy", "reset"], "this").splitlines()]
    rows = [line for line in text if line.startswith("|") and "---" not in line]
    assert rows == [
        "| Transformers | greedy | reset | patch and unpatch |",
        "| 1.0 | - | - | - |",
        "| 1.1 to 1.2 | ok | upstream [1] | ok |",
        "| 1.3 | no result | no result | no result |",
        "| Transformers | passed, of each | failed |",
        "| 1.0 | 3 | 0 |",
        "| 1.1 to 1.2 | 5 | 0 |",
        "| 1.3 | 0 | 1; no report |",
    ]
    assert text[-1] == "1. `KeyError: 'x'`"


def test_families_come_by_their_first_release_whatever_order_tests_ran_in() -> None:
    old, new = Result("1.0", {("b", "greedy"): OK}, 1), Result("1.1", {(name, "greedy"): OK for name in "dacb"}, 4)
    text = render([old, new], ["greedy"], "this")
    assert [line for line in text.splitlines() if line.startswith("## ")][:4] == ["## b", "## a", "## c", "## d"]
