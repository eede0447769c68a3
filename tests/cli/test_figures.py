"""The script that writes measured figures into README and docs: what it leaves out, refuses and notices."""

from __future__ import annotations

import json
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
    names = (*figures.DOCUMENTS, "docs/tokens.svg")
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
    changed, count = re.subn(r"\d+(\.\d+)?(?=x| )", "0.01", rest, count=1)
    assert count == 1
    return head + begin + changed


MODEL = "qwen3_5, hidden 2560, 32 layers"


def measured(side: str, batch: int, tokens_per_s: float) -> dict[str, object]:
    figures = {"tokens_per_s": tokens_per_s, "first_s": 0.5, "hundredth_s": 2.0, "device_ms": 3.0}
    return {"model": MODEL, "side": side, "batch": batch, "prompt": 16, **figures}


@pytest.fixture
def whole_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results of two batches, of which one has no flash-linear-attention, and none has compiled models."""
    machine = {"device": "A GPU, 8 GiB", "torch": "2", "transformers": "5", "flash-linear-attention": "0"}
    rows = [
        measured("cuda_graph", 8, 800),
        measured("eager", 8, 100),
        measured("eager", 1, 10),
        measured("fla", 1, 20),
        {"model": MODEL, "side": "fla", "batch": 8, "prompt": 16, "error": "out of memory"},
        measured("cuda_graph", 1, 60),
        {"model": MODEL, "side": "compiled", "batch": 1, "prompt": 16, "error": "a reason. And more\nof it"},
    ]
    folder = tmp_path / tables.SOURCES["models"]
    folder.mkdir()
    file = {"machine": {**machine, "date": "today", "kernel": "abc"}, "results": rows}
    (folder / "generate-dense.json").write_text(json.dumps(file), encoding="utf-8")
    said = [{"side": "patched", "right": False, "equal": same, "logits": 0.02 + 0.01 * same} for same in (False, True)]
    (folder / "tokens-dense.json").write_text(json.dumps({"results": said}), encoding="utf-8")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)


@pytest.mark.usefixtures("whole_models")
def test_a_table_of_sides_says_how_many_times_and_leaves_out_what_was_not_measured() -> None:
    lines = [" ".join(line.split()) for line in tables.models().splitlines()]
    assert lines[:1] + lines[2:7] == [
        "| tokens per second (more is better) | batch 1 | batch 8 |",
        "| **dense: Qwen3.5-4B's shape** | | |",
        "| Transformers | 10 | 100 |",
        "| Transformers + flash-linear-attention | 20 | |",
        "| patched, cuda_graph=True | 60 | 800 |",
        "| ... times Transformers / with fla | 6.00 / 3.00 | 8.00 / - |",
    ]
    assert lines[7:12] == [  # no row for compiled models
        "",
        "- No speed: patched, dense: in float32 its logits are up to 3.0e-02 from Transformers', its tokens not the "
        "same.",
        "- No speed: Transformers + flash-linear-attention, dense, batch 8: out of memory.",
        "- No speed: Transformers, compiled, dense, batch 1: a reason.",
        "",
    ]
    assert "| Transformers | 0.50 / 2.0 | 0.50 / 2.0 |" in " ".join(tables.first_tokens().split())


@pytest.mark.usefixtures("whole_models")
def test_a_later_run_is_compared_in_the_cells_that_both_have(tmp_path: Path) -> None:
    """Of patched sides alone: what Transformers takes says nothing about a kernel of ours."""
    folder = tmp_path / tables.SOURCES["models again"]
    folder.mkdir()
    rows = [{**measured("cuda_graph", 8, 800), "device_ms": 2.7}, {**measured("eager", 8, 100), "device_ms": 30.0}]
    file = {"machine": {"device": "A GPU, 8 GiB", "kernel": "def"}, "results": rows}
    (folder / "generate-dense.json").write_text(json.dumps(file), encoding="utf-8")
    assert "with kernel def, 1 of the 2 patched cells: all within 10.0 %." in tables.device_time()


@pytest.mark.usefixtures("whole_models")
def test_the_chart_has_a_bar_for_what_was_measured_alone() -> None:
    drawn = [text.text for text in ElementTree.fromstring(tables.chart()).iter("{http://www.w3.org/2000/svg}text")]
    assert [text for text in drawn if text and text.endswith("x")] == ["1.00x", "2.00x", "6.00x", "1.00x", "8.00x"]
    assert "Transformers, compiled" not in drawn


@pytest.mark.parametrize("text", ["<!-- figures: nonsense -->\n<!-- /figures -->", "<!-- figures: models -->\n"])
def test_a_block_without_a_meaning_or_an_end_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="a document: no block"):
        figures.filled(text, "a document")
