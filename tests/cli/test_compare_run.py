"""The comparison on the shipped checkpoints: what it finds on a right backend, and on wrong ones."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from models import judge_upstream
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import qwen_fastdecode
from qwen_fastdecode.cli.arguments import Exit
from qwen_fastdecode.cli.compare import run
from qwen_fastdecode.cli.compare.generation import encode, forced_logits, generate
from qwen_fastdecode.cli.compare.layerwise import LayerwiseCheck
from qwen_fastdecode.cli.compare.memory import decode_step_bytes
from qwen_fastdecode.cli.compare.plot import draw, draw_ratios
from qwen_fastdecode.cli.compare.result import PATCHED, UPSTREAM, SideFailed
from qwen_fastdecode.cli.compare.run import compare, total_runs
from qwen_fastdecode.cli.compare.sides import Settings, Sides
from qwen_fastdecode.ops import backends
from qwen_fastdecode.ops.step import Recipe, Step

CHECKPOINTS = Path(__file__).parent.parent.parent / "examples" / "checkpoints"
NAMES = ("qwen3_next-tiny", "qwen3_5-tiny")
PROMPTS = ("A class definition", 'The "for" statement is used to')  # of different lengths: one is padded
FEW = Settings(new_tokens=8, repeat=2)


@lru_cache
def load(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    path = CHECKPOINTS / name
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    return model, AutoTokenizer.from_pretrained(path)


def break_backend(monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    """Has `change` (output, conv state, recurrent state) -> output after every fast step."""
    judge_upstream()  # its classes pass now, and that is remembered
    right = backends.decode_torch

    def decode(step: Step, recipe: Recipe) -> Tensor:
        return change(right(step, recipe), *step.states)

    monkeypatch.setattr(backends, "decode_torch", decode)


def test_narrow_states_are_the_patched_sides_alone() -> None:
    exact, narrow = (
        compare(*load(NAMES[0]), PROMPTS, replace(FEW, repeat=1, state_dtype=dtype)) for dtype in (None, "bfloat16")
    )
    assert narrow.setup.state_dtype == "bfloat16"
    assert narrow.parity.failures == []
    assert narrow.parity.logits.relative_rms > 100 * exact.parity.logits.relative_rms


@pytest.mark.parametrize("name", NAMES)
def test_float32_writes_the_same_and_is_served_fast(name: str) -> None:
    runs: list[str] = []
    result = compare(*load(name), PROMPTS, FEW, runs.append)
    assert result.parity.failures == []
    assert result.parity.greedy.prompts == len(PROMPTS)
    assert result.parity.float32 is None
    assert result.parity.greedy.first_difference is None
    assert result.parity.logits.positions == len(PROMPTS) * 7
    assert result.parity.logits.top1_agreement == 1
    assert result.parity.layer_step.steps == 7 * result.setup.gdn_layers
    assert 0 < result.parity.layer_step.relative_rms < 1e-5
    assert result.sample.upstream == result.sample.patched

    assert result.speed is not None
    assert result.speed.service.fallbacks == {}  # the prefill is not counted
    assert result.speed.service.fast_steps == 7 * result.setup.gdn_layers * FEW.repeat
    assert len(result.speed.ratios) == FEW.repeat
    assert len(result.speed.step_ratios) == 7 * FEW.repeat
    assert len(runs) == total_runs(load(name)[0], FEW) - 1  # nothing to compare with float32
    assert runs[-4:] == ["run 1, unpatched", "run 1, patched", "run 2, patched", "run 2, unpatched"]
    assert not qwen_fastdecode.status(load(name)[0]).covered
    assert {side: found.missing for side, found in result.beside.items()} == dict.fromkeys(
        ("cuda_graph", "compiled"), "the model is not on a CUDA device"
    )
    assert result.starts == {}


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_within_the_gate(name: str) -> None:
    result = compare(*load(name, torch.bfloat16), PROMPTS, FEW)
    assert result.parity.failures == []
    step, whole = result.parity.layer_step, result.parity.float32
    assert step.relative_rms > 1e-4
    assert whole is not None
    # One rounding is nearer to float32 than a rounding after every operation: of a layer's step, and of it all.
    assert 1e-3 < step.patched_from_float32 < step.upstream_from_float32 < 1e-2
    assert 1e-3 < whole.patched_logits < 1.5 * whole.upstream_logits
    assert whole.upstream_logits < 5e-2


def test_wrong_output_is_red_and_has_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    break_backend(monkeypatch, lambda out, conv, recurrent: out * 1.02)
    runs: list[str] = []
    result = compare(*load(NAMES[0], torch.bfloat16), PROMPTS, FEW, runs.append)
    assert result.speed is None
    assert runs[-1] == "in float32, unpatched"  # nothing was timed
    assert result.parity.failures[0].startswith("a layer step (model.layers.")
    assert "output) is 2." in result.parity.failures[0]


def test_wrong_state_is_red_though_the_output_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(out: Tensor, conv: Tensor, recurrent: Tensor) -> Tensor:
        recurrent.mul_(1.02)
        return out

    break_backend(monkeypatch, change)
    result = compare(*load(NAMES[0], torch.bfloat16), PROMPTS, FEW)
    assert "recurrent state) is 2." in result.parity.failures[0]


def test_nan_is_red(monkeypatch: pytest.MonkeyPatch) -> None:
    break_backend(monkeypatch, lambda out, conv, recurrent: out * float("nan"))
    result = compare(*load(NAMES[0], torch.bfloat16), PROMPTS, FEW)
    assert result.speed is None
    assert len(result.parity.failures) == 3  # a layer's step, its distance from float32, the logits'


def test_float32_text_that_goes_wrong_only_in_a_timed_run_is_red(monkeypatch: pytest.MonkeyPatch) -> None:
    def timed_run(self: Sides) -> Any:
        run, served = right(self)
        if qwen_fastdecode.status(self.model).covered:
            run.tokens[0, 5] += 1
        return run, served

    right = Sides.timed_run
    monkeypatch.setattr(Sides, "timed_run", timed_run)
    result = compare(*load(NAMES[0]), PROMPTS, FEW)
    assert result.speed is None
    assert result.parity.failures == ["greedy texts differ in float32, from new token 5 on"]


def test_fallbacks_are_counted_with_their_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN_FASTDECODE", "0")
    result = compare(*load(NAMES[0]), PROMPTS, FEW)
    assert result.speed is not None
    assert result.speed.service.fast_share == 0
    assert list(result.speed.service.fallbacks) == ["switched off by QWEN_FASTDECODE=0"]


def test_a_distance_below_the_limit_but_above_the_noise_is_red(monkeypatch: pytest.MonkeyPatch) -> None:
    break_backend(monkeypatch, lambda out, conv, recurrent: out * 1.007)
    result = compare(*load(NAMES[0], torch.bfloat16), PROMPTS, FEW)
    assert result.parity.layer_step.relative_rms < 1e-2
    assert result.parity.failures[0].startswith("layer steps are ")


def test_where_float32_does_not_fit_layer_steps_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "get_max_memory", lambda: {"cpu": 1000})
    result = compare(*load(NAMES[0], torch.bfloat16), PROMPTS, FEW)
    assert result.parity.failures == []
    assert result.parity.float32 is None
    assert result.parity.float32_missing.startswith("it would take 0.00")
    assert result.parity.layer_step.patched_from_float32 is not None


def test_hooks_that_move_nothing_do_not_keep_a_model_from_float32() -> None:
    own = load(NAMES[0], torch.bfloat16)[0]
    model = dispatch_model(copy.deepcopy(own), {"": "cpu"}, main_device="cpu", force_hooks=True)
    assert any("_hf_hook" in vars(module) for module in model.modules())
    result = compare(model, load(NAMES[0])[1], PROMPTS, replace(FEW, repeat=1))
    assert result.parity.failures == []
    assert result.parity.float32 is not None
    assert result.parity.layer_step.patched_from_float32 is not None


def test_offloaded_weights_have_no_float32() -> None:
    model = cpu_offload(copy.deepcopy(load(NAMES[0], torch.bfloat16)[0]), execution_device=torch.device("cpu"))
    assert run.no_float32(model) == "its weights are quantised, offloaded, or spread over devices"


@pytest.mark.parametrize("side", [UPSTREAM, PATCHED])
@pytest.mark.parametrize(
    ("error", "code"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), Exit.OUT_OF_MEMORY),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
            Exit.OUT_OF_MEMORY,
        ),
        (ValueError("a bug"), Exit.CRASHED),
    ],
)
def test_a_side_that_fails_is_named(side: str, error: Exception, code: Exit, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Sides) -> Any:
        if qwen_fastdecode.status(self.model).covered == 3 * (side == PATCHED):
            raise error
        return right(self)

    right = Sides.generate
    monkeypatch.setattr(Sides, "generate", fail)
    with pytest.raises(SideFailed) as failed:
        compare(*load(NAMES[0]), PROMPTS, FEW)
    assert (failed.value.side, failed.value.exit, failed.value.what) == (side, code, "greedy text")
    assert failed.value.__cause__ is error


def test_watching_layers_changes_nothing() -> None:
    model, tokenizer = load(NAMES[0])
    batch = encode(tokenizer, PROMPTS, model.device)
    tokens = generate(model, batch, 8).tokens
    with qwen_fastdecode.patched(model) as report:
        alone = forced_logits(model, batch, tokens)
        check = LayerwiseCheck(model, [layer.name for layer in report.layers])
        with check.watching():
            watched = forced_logits(model, batch, tokens)
    assert torch.equal(alone, watched)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_logits_are_those_of_the_decode_steps() -> None:
    model, tokenizer = load(NAMES[0])
    batch = encode(tokenizer, PROMPTS[:1], model.device)
    tokens = generate(model, batch, 5).tokens
    logits = forced_logits(model, batch, tokens)
    assert logits.shape == (1, 4, model.config.vocab_size)
    text = torch.cat([batch["input_ids"], tokens], dim=1)
    with torch.no_grad():
        whole = model(text).logits[:, batch["input_ids"].shape[1] : -1]
    torch.testing.assert_close(logits, whole, rtol=1e-3, atol=1e-3)  # one prefill against steps


def test_memory_of_a_step_sees_a_temporary(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = load(NAMES[0])
    batch = encode(tokenizer, PROMPTS, model.device)

    def take_ten_megabytes(out: Tensor, conv: Tensor, recurrent: Tensor) -> Tensor:
        torch.empty(10_000_000, dtype=torch.uint8)
        return out

    with qwen_fastdecode.patched(model):
        lean = decode_step_bytes(model, batch)
        break_backend(monkeypatch, take_ten_megabytes)
    with qwen_fastdecode.patched(model):
        fat = decode_step_bytes(model, batch)
    assert 0 < lean < 1_000_000
    assert 9_000_000 < fat < 11_000_000


@pytest.mark.parametrize(
    ("slowest", "fastest", "ticks"),
    [(2.1, 11.0, ["1x", "2x", "5x", "10x"]), (1.1, 1.9, ["1x", "1.2x", "1.4x", "1.6x", "1.8x"])],
)
def test_ticks_of_ratios_stand_apart(slowest: float, fastest: float, ticks: list[str]) -> None:
    ratios = [slowest, fastest]
    figure = Figure()
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    draw_ratios(
        axes, SimpleNamespace(ratio=SimpleNamespace(min=slowest, max=fastest, median=slowest), step_ratios=ratios)
    )
    figure.canvas.draw()
    low, high = axes.get_xlim()
    shown = zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)
    assert [label.get_text() for tick, label in shown if low <= tick <= high] == ticks


def test_plot(tmp_path: Path) -> None:
    result = compare(*load(NAMES[0]), PROMPTS, FEW)
    for suffix in (".png", ".svg", ".pdf"):
        path = tmp_path / f"plot{suffix}"
        draw(result, path)
        assert path.stat().st_size > 5000
