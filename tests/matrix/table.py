"""docs/compatibility.md from the results of a run."""

from __future__ import annotations

import itertools
import re
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.markdown import table

OK, FAILED = "ok", "**FAILS**"
CASE = re.compile(r"test_(?:feature\[(?P<case>.+)\]|(?P<lifecycle>lifecycle)\[(?P<family>.+)\])")


@dataclass
class Result:
    """What the tests of one release say."""

    release: str
    cells: dict[tuple[str, str], str] = field(default_factory=dict)  # of a family and feature: see `_show`
    passed: int = 0
    failed: list[str] = field(default_factory=list)
    trouble: str = ""  # why there are no results

    @property
    def fine(self) -> bool:
        """Whether every test passed, and there were some."""
        return bool(self.passed) and not self.failed and not self.trouble


def read_result(release: str, report: Path, features: list[str]) -> Result:
    """Reads a JUnit file of pytest."""
    result = Result(release)
    for case in ElementTree.parse(report).iter("testcase"):
        name = case.get("name", "")
        bad = case.find("failure") is not None or case.find("error") is not None or case.find("skipped") is not None
        if bad:
            result.failed.append(f"{case.get('classname')}::{name}")
        else:
            result.passed += 1
        found = CASE.fullmatch(name)
        if found is not None and case.get("classname", "").endswith("test_release"):
            property_ = case.find("properties/property[@name='upstream fails']")
            outcome = FAILED if bad else OK if property_ is None else property_.get("value", "")
            result.cells[_cell(found, features)] = outcome
    return result


def _families(results: list[Result]) -> list[str]:
    """By the first release that has them, then by name: tests run in an order of their own."""
    first: dict[str, int] = {}
    for i, result in enumerate(results):
        for family, _ in result.cells:
            first.setdefault(family, i)
    return sorted(first, key=lambda family: (first[family], family))


def _cell(found: re.Match[str], features: list[str]) -> tuple[str, str]:
    if found["lifecycle"]:
        return found["family"], "patch and unpatch"
    feature = next(name for name in features if found["case"].endswith(f"-{name}"))
    return found["case"].removesuffix(f"-{feature}"), feature


def render(results: list[Result], features: list[str], how: str) -> str:
    """The document: one table a family, a row a range of releases that are alike, and upstream's own words below."""
    notes: dict[str, int] = {}
    columns = [*features, "patch and unpatch"]
    lines = [
        "# Compatibility",
        "",
        f"Written by `{how}`; do not edit. Each cell is a test of `tests/matrix/test_release.py`: CPU, float32.",
        "A row is a range of releases that are alike; the last of every minor version was run.",
        "",
        "- ok: the patched model says what the unpatched one says, and every decode step was served fast (counted).",
        "- upstream [n]: the unpatched model raises, and the patched one raises the same; the words are below.",
        "- -: these releases of Transformers do not have the family, or not in the form that is supported.",
        "",
    ]
    for family in _families(results):
        cells = [[_show(x.cells.get((family, column)), x, notes) for column in columns] for x in results]
        lines += [f"## {family}", "", table(["Transformers", *columns], _alike(results, cells)), ""]
    counts = [[str(x.passed), f"{len(x.failed)}{'; ' + x.trouble if x.trouble else ''}"] for x in results]
    head = ["Transformers", "passed, of each", "failed"]
    lines += ["## All tests that were run", "", table(head, _alike(results, counts))]
    lines += ["", "## What upstream raises", ""]
    lines += [f"{number}. `{text}`" for text, number in notes.items()]
    return "\n".join(lines) + "\n"


def _alike(results: list[Result], cells: list[list[str]]) -> list[list[str]]:
    """A row a range of releases that have the same cells."""
    rows = []
    for own, found in itertools.groupby(zip(results, cells, strict=True), key=lambda row: row[1]):
        releases = [result.release for result, _ in found]
        rows.append([releases[0] if len(releases) == 1 else f"{releases[0]} to {releases[-1]}", *own])
    return rows


def _show(outcome: str | None, result: Result, notes: dict[str, int]) -> str:
    """A cell: OK, FAILED, or the number of what upstream raised; None where no test of it was there."""
    if outcome is None:
        return "no result" if result.trouble else "-"
    if outcome in (OK, FAILED):
        return outcome
    return f"upstream [{notes.setdefault(outcome, len(notes) + 1)}]"


def summary(results: list[Result]) -> str:
    """A line a release that is not fine."""
    bad: dict[str, list[str]] = defaultdict(list)
    for result in results:
        if not result.fine:
            bad[result.release] += [result.trouble] if result.trouble else result.failed or ["no test ran"]
    return "\n".join(f"{release}: {line}" for release, lines in bad.items() for line in lines)
