"""What a step costs, in bytes and operators rather than in seconds, by the benchmark's own means."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

import pytest
import torch


@pytest.fixture
def op_layers() -> ModuleType:
    return importlib.import_module("benchmarks.op.op_layers")


@pytest.mark.parametrize("B", [1, 8])
@torch.no_grad()
def test_no_temporary_of_the_states_size(op_layers: ModuleType, B: int) -> None:
    """HK 16, HV 32, D 128: below 5 % of the recurrent state, where upstream takes three times the state."""
    setup = op_layers.Setup(B, layers=1)
    assert op_layers.extra_memory(setup, "qwen_fastdecode") < 5
    assert op_layers.extra_memory(setup, "upstream") > 200


@torch.no_grad()
def test_operators_of_a_layer_step(op_layers: ModuleType) -> None:
    """The three projections included, views not; upstream's PyTorch path has 65 or 66 in the versions supported."""
    ours, upstream = (op_layers.count_operators(side) for side in ("qwen_fastdecode", "upstream"))
    assert ours.operators.total() <= 45
    assert 60 < upstream.operators.total() < 70
    assert ours.operators["aten.mm.default"] == upstream.operators["aten.mm.default"] == 3


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the launcher is Triton's")
@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_next"])
def test_functions_that_a_patched_layer_calls(family: str) -> None:
    """On top of its modules' calls: what the host's time of an eager step follows. Once there were 146 and 139."""
    host = importlib.import_module("benchmarks.op.host")
    assert host.measure(family, rounds=1)["calls of functions"] <= 120


@torch.no_grad()
def test_the_benchmark_refuses_a_wrong_result(op_layers: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = op_layers.Setup(1, layers=1)
    errors = op_layers.check(setup)
    assert errors["qwen_fastdecode"] < errors["upstream"]
    constant = "qwen_fastdecode.ops.torch_cpu._length"
    monkeypatch.setattr(constant, lambda x, eps: torch.linalg.vector_norm(x, dim=-1, keepdim=True) * 1.02)
    with pytest.raises(op_layers.WrongResult, match="batch 1, no times"):
        op_layers.check(setup)
