"""The script that writes measured figures into README and docs: what it leaves out, refuses and notices."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks import figures, tables


def test_what_is_committed_is_what_the_results_say() -> None:
    for path, text in figures.documents().items():
        assert path.read_text(encoding="utf-8") == text, f"{path}: make figures"
    ElementTree.fromstring(tables.chart())


def test_a_changed_figure_is_noticed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("README.md", "docs/performance.md", "docs/tensor-parallel.md", "docs/tokens.svg")
    for name in names:
        copy = tmp_path / name
        copy.parent.mkdir(exist_ok=True)
        copy.write_text(with_another_figure((figures.ROOT / name).read_text(encoding="utf-8")), encoding="utf-8")
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["figures.py", "--check"])
    assert figures.main() == 1
    assert [Path(line.split(" is not ")[0]) for line in capsys.readouterr().err.splitlines()] == [
        tmp_path / name for name in names
    ]


def with_another_figure(text: str) -> str:
    """One number of the first block, or of a chart, is another."""
    head, begin, rest = text.rpartition("<!-- figures: ")
    changed, count = re.subn(r"\d+\.\d+(?=x| )", "0.01", rest, count=1)
    assert count == 1
    return head + begin + changed


def test_what_was_not_measured_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tables.load("gpu", "generate.json")
    rows = [
        row for row in whole["results"] if row["mode"] == "eager" and row["batch"] != 32 and row["asked"] == "PyTorch"
    ]
    monkeypatch.setattr(tables, "load", lambda *_: {**whole, "results": rows})
    table = " ".join(tables.tokens().split())
    assert "batch 32" not in table
    assert "compiled" not in table
    assert "times Transformers with" not in table
    assert "| ... times Transformers alone | 1.29x | 1.69x |" in table


@pytest.mark.parametrize("text", ["<!-- figures: nonsense -->\n<!-- /figures -->", "<!-- figures: tokens -->\n"])
def test_a_block_without_a_meaning_or_an_end_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="a document: no block"):
        figures.filled(text, "a document")
