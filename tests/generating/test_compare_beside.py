"""`qwen-fastdecode compare` where CUDA graphs can be captured, which a stand-in does here: the sides beside the two."""

from __future__ import annotations

import io
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_graph_stand_in import stand_in
from recorded_graph import RecordedGraph
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from qwen_fastdecode.cli.arguments import Exit
from qwen_fastdecode.cli.compare import beside, sides
from qwen_fastdecode.cli.compare.render import as_json, headline, render
from qwen_fastdecode.cli.compare.result import COMPILED, CUDA_GRAPH, PATCHED, UPSTREAM, Comparison
from qwen_fastdecode.cli.compare.run import compare, total_runs
from qwen_fastdecode.cli.compare.sides import Settings
from qwen_fastdecode.graph import eligible

CHECKPOINT = Path(__file__).parent.parent.parent / "examples" / "checkpoints" / "qwen3_5-tiny"
PROMPTS = ("A class definition", 'The "for" statement is used to')
FEW = Settings(new_tokens=12, repeat=3)

pytestmark = pytest.mark.usefixtures(stand_in.__name__)


@pytest.fixture(autouse=True)
def _short_first_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (sides, beside):
        monkeypatch.setattr(module, "HUNDRED", 12)


@lru_cache
def loaded(dtype: torch.dtype) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=dtype).eval(), AutoTokenizer.from_pretrained(
        CHECKPOINT
    )


def printed(result: Comparison) -> str:
    console = Console(width=80, file=io.StringIO())
    console.print(render(result))
    return console.file.getvalue()


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_every_side_has_its_speed_and_its_beginning(dtype: torch.dtype) -> None:
    runs: list[str] = []
    model, tokenizer = loaded(dtype)
    result = compare(model, tokenizer, PROMPTS, FEW, runs.append)
    assert (result.failures, result.exit) == ([], Exit.RIGHT)
    assert len(runs) == total_runs(model, FEW) - (dtype == torch.float32)
    assert [run for run in runs if run.startswith("run 2")] == [
        "run 2, cuda graph",
        "run 2, patched",
        "run 2, unpatched",
    ]
    assert {*result.starts} == {UPSTREAM, PATCHED, CUDA_GRAPH, COMPILED}
    assert all(0 < start.first_s < start.hundredth_s for start in result.starts.values())
    for side in (CUDA_GRAPH, COMPILED):
        found = result.beside[side]
        assert (found.missing, found.failures) == ("", [])
        assert len(found.speed.step_ms_of_runs) == FEW.repeat
        assert found.logits.positions == 2 * 11
    text = printed(result)
    assert "│ ... cuda_graph=True   │ " in text
    assert "│ Transformers compiled │ " in text
    assert max(map(len, text.splitlines())) <= 80
    data = as_json(result)
    assert data["beside"]["cuda_graph"]["speed"]["step_ms"]["median"] > 0
    assert data["starts"]["compiled"]["hundredth_s"] > 0
    assert not {"_compiled_call", "_previous_max_cache_length"} & {*vars(model)}
    assert model.generation_config.cache_implementation is None


def test_only_what_was_asked_for() -> None:
    result = compare(*loaded(torch.float32), PROMPTS, Settings(8, 1, beside=()))
    assert (result.beside, result.starts) == ({}, {})
    assert "100th" not in printed(result)


@pytest.mark.parametrize("which", [2, 4])  # the capture of the text that is judged; the first that is timed
def test_a_replay_that_goes_wrong_is_red(which: int, monkeypatch: pytest.MonkeyPatch) -> None:
    right, replays = RecordedGraph.replay, Counter()

    def replay(self: RecordedGraph) -> None:
        right(self)
        replays[self] += 1
        if len(replays) == which and replays[self] > 1:  # the first is compared with an eager step
            logits = next(step[3] for step in reversed(self._steps) if isinstance(step[3], torch.Tensor))
            logits.neg_()

    monkeypatch.setattr(RecordedGraph, "replay", replay)
    result = compare(*loaded(torch.float32), PROMPTS, Settings(12, 3, beside=(CUDA_GRAPH,)))
    assert result.speed is None
    assert result.exit is Exit.WRONG
    assert result.failures[0].startswith("with cuda_graph=True: greedy texts differ in float32, from new token ")
    assert "WRONG here" in headline(result)[0]


def test_where_nothing_is_captured_it_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eligible, "FEWEST", 1000)
    result = compare(*loaded(torch.float32), PROMPTS, Settings(8, 1, beside=(CUDA_GRAPH,)))
    assert result.beside[CUDA_GRAPH].missing == "nothing was captured: too few tokens to be worth a capture"
    assert result.beside[CUDA_GRAPH].speed is None
    assert result.speed is not None
    assert "nothing was captured: too few tokens" in printed(result)


def test_a_compilation_that_fails_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(model: Any) -> Any:
        raise RuntimeError("no compiler\nand more")

    monkeypatch.setattr(beside, "compiled", fails)
    result = compare(*loaded(torch.float32), PROMPTS, Settings(8, 3, beside=(COMPILED,)))
    assert result.beside[COMPILED].missing == "it raised RuntimeError: no compiler"
    assert result.exit is Exit.RIGHT
