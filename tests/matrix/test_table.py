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
    text = [" ".join(line.split()) for line in render(results, ["greedy", "reset"], ["a"], "this").splitlines()]
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
