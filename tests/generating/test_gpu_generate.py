"""The benchmark of whole models: what it measures again, and what it gives no speed for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.checks import gpu_report
from benchmarks.checks.gpu_report import KeptRows
from benchmarks.models import gpu_generate, gpu_tokens
from benchmarks.models.gpu_generate import Expected
from benchmarks.models.gpu_models import MODELS, build
from benchmarks.models.sides import SIDES, chosen, source_of
from benchmarks.op.gpu_layers import KERNEL_FUNCTIONS

TINY, TINY_EXPERTS, CPU = MODELS["dense"](4, True), MODELS["experts"](4, True), torch.device("cpu")
SOME = {name: SIDES[name] for name in ("eager", "patched", "compiled")}


def write(folder: Path, name: str, rows: list[dict[str, Any]], **machine: str) -> None:
    about = {**gpu_report.machine(), **machine}
    (folder / f"{name}.json").write_text(json.dumps({"machine": about, "results": rows}))


def kept(folder: Path, name: str = "tokens-dense") -> KeptRows:
    return KeptRows(str(folder), name, lambda row: True)


def test_tokens_of_every_side_are_judged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own = gpu_tokens.generate

    def wrong(model: Any, *args: Any) -> Any:
        run = own(model, *args)
        if model.generation_config.cache_implementation == "static":
            run.tokens[0, -1] += 1
        return run

    monkeypatch.setattr(gpu_tokens, "generate", wrong)
    with torch.no_grad():
        rows = [*gpu_tokens.rows(build(TINY, CPU, torch.float32), "tiny", SOME, 12, kept(tmp_path))]
    assert [(row["side"], row["batch"], row["right"]) for row in rows] == [
        ("eager", 3, True),
        ("patched", 3, True),
        ("compiled", 3, False),
        ("eager", 1, True),
        ("patched", 1, True),
    ]


def test_tokens_that_are_there_are_not_made_again(tmp_path: Path) -> None:
    rows = [{"model": "tiny", "side": side, "batch": 3, "right": False} for side in ("eager", "compiled")]
    write(tmp_path, "tokens-dense", [*rows, {"model": "tiny", "side": "patched", "batch": 3, "error": "memory"}])
    with torch.no_grad():
        found = [*gpu_tokens.rows(build(TINY, CPU, torch.float32), "tiny", SOME, 12, kept(tmp_path))]
    assert [(row["side"], row["batch"]) for row in found] == [("patched", 3), ("eager", 1), ("patched", 1)]


def test_choices_of_experts_are_those_of_transformers_alone() -> None:
    model = build(TINY_EXPERTS, CPU, torch.float32)
    inputs, choices = gpu_generate.prompts(model, 2, 4), gpu_tokens.Choices()
    with torch.no_grad(), gpu_tokens.recorded_choices(model, choices):
        expected = gpu_tokens.logits_of(model, inputs)
    for module in model.modules():
        if type(module).__name__.endswith("TopKRouter"):
            module.weight.data.neg_()  # every other choice
    with torch.no_grad():
        assert gpu_tokens.distance(gpu_tokens.logits_of(model, inputs), expected) > 1e-2
        with gpu_tokens.replayed_choices(model, choices):
            assert torch.equal(gpu_tokens.logits_of(model, inputs), expected)
        with pytest.raises(AssertionError, match="128 choices"), gpu_tokens.replayed_choices(model, choices):
            pass


def test_a_side_that_is_wrong_once_or_not_proved_has_no_speed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(FileNotFoundError, match="tokens-dense"):
        gpu_generate.right_sides(str(tmp_path), "dense", SOME)
    rows = [("eager", True), ("patched", True), ("patched", False)]
    write(tmp_path, "tokens-dense", [{"side": side, "right": right} for side, right in rows])
    assert [*gpu_generate.right_sides(str(tmp_path), "dense", SOME)] == ["eager"]
    assert sorted(capsys.readouterr().out.splitlines()) == [
        "no speed for compiled: not proved",
        "no speed for patched: its float32 tokens are wrong",
    ]


def test_rows_that_are_there_are_not_measured_again(tmp_path: Path) -> None:
    rows = [
        {"batch": 1, "side": "eager", "rounds_ms": [7.3, 9, 7]},
        {"batch": 1, "side": "patched", "error": "memory"},
        {"batch": 1, "side": "compiled", "rounds_ms": [7, 9]},  # of a busy host
        {"batch": 1, "side": "fla", "rounds_ms": [7, 9]},  # not asked for now
    ]
    rows = [{"model": "tiny", **row} for row in rows]
    write(tmp_path, "generate-dense", rows)
    results = KeptRows(str(tmp_path), "generate-dense", gpu_generate.done)
    gpu_generate.measure(build(TINY, CPU, torch.bfloat16), "tiny", "dense", {**SOME}, (1,), results)
    first, second, *new = json.loads((tmp_path / "generate-dense.json").read_text())["results"]
    assert [first, second] == [rows[0], rows[3]]
    assert [(row["batch"], row["side"]) for row in new] == [(1, "patched"), (1, "compiled")]
    assert all(gpu_generate.settled(row["rounds_ms"]) and len(row["first_call_ms"]) == 99 for row in new)
    assert all(0 < row["first_s"] < row["hundredth_s"] and row["logits"] < 0.15 for row in new)
    assert all(row["tokens_per_s"] == pytest.approx(1e3 / row["ms_a_token"]) for row in new)


def test_rows_of_another_machine_are_not_mixed_in(tmp_path: Path) -> None:
    write(tmp_path, "tokens-dense", [], torch="1.0")
    with pytest.raises(ValueError, match=r"tokens-dense.json is of torch 1\.0, not"):
        kept(tmp_path)


def test_logits_of_another_text_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(TINY, CPU, torch.bfloat16)
    inputs = gpu_generate.prompts(model, 1, 4)
    right, wrong = (
        gpu_generate._first_call(model, inputs, SIDES["patched"], of, 0.15) for of in _expected(model, inputs)
    )
    assert 0 < right["logits"] < 0.15
    assert wrong == {"error": wrong["error"]}
    assert wrong["error"].startswith("AssertionError: logits differ by ")


def _expected(model: Any, inputs: Any) -> tuple[Expected, Expected]:
    own = Expected.of(model, inputs)
    return own, own._replace(logits=own.logits.flip(-1))


def test_logits_of_flash_linear_attention_are_compared_with_the_experts_that_transformers_chose() -> None:
    model = build(TINY_EXPERTS, CPU, torch.bfloat16)
    inputs = gpu_generate.prompts(model, 1, 4)
    own = Expected.of(model, inputs)
    assert own.distance_to(model, inputs, SIDES["fla"]) == 0
    other = own._replace(choices=[(*choice[:-1], (choice[-1] + 1) % 4) for choice in own.choices])
    assert other.distance_to(model, inputs, SIDES["fla"]) > 0
    assert other.distance_to(model, inputs, SIDES["patched"]) == 0  # whose routers choose for themselves
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(AssertionError, match="1 choices of routers were not asked for"):
        own._replace(choices=[*own.choices, own.choices[0]]).distance_to(model, inputs, SIDES["fla"])


def test_sides_by_name() -> None:
    model = build(TINY, CPU, torch.float32)
    assert [*chosen("patched,eager", model)] == ["eager", "patched"]
    with pytest.raises(ValueError, match="--sides: nonsense: expected some of eager, fla"):
        chosen("eager,nonsense", model)
    with pytest.raises(ValueError, match="flash-linear-attention is not installed"):
        chosen("", model)


def test_a_side_leaves_the_model_as_it_was() -> None:
    model = build(TINY, CPU, torch.float32)
    source = source_of(model)
    before, functions = {*vars(model)}, dict(vars(source))
    with SIDES["patched_compiled"].entered(model):
        assert model.generation_config.cache_implementation == "static"
        assert not any(hasattr(getattr(source, name), "__wrapped__") for name in KERNEL_FUNCTIONS)
        gpu_generate.generate(model, gpu_generate.prompts(model, 1, 4), 4)
    assert model.generation_config.cache_implementation is None
    assert {*vars(model)} == before
    assert dict(vars(source)) == functions
