"""`kernelize` of the `kernels` package binds a forward on every layer that it knows, before or after the patch.

The package's own functions are called, on classes marked as `use_kernel_forward_from_hub` marks them, so that these
tests do not depend on which release of it the installed Transformers asks for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import kernels
import pytest
import torch
from kernels import Mode
from models import LINEAR, build, generate, linear_layers
from torch import Tensor, nn
from transformers import PreTrainedModel

import qwen_fastdecode as qf

NEW = 5
STEPS = LINEAR * (NEW - 1)
LAYER, NORM = "Qwen3_5GatedDeltaNet", "RMSNormGated"


@pytest.fixture(autouse=True)
def _marked(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = linear_layers(build())[0]
    for marked, name in ((type(layer), LAYER), (type(layer.norm), NORM)):
        monkeypatch.setattr(marked, "kernel_layer_name", name, raising=False)


@pytest.fixture
def expected() -> Tensor:
    return generate(build(), NEW)


class Repository:
    """Where a kernel comes from: here, a class that is at hand."""

    def __init__(self, layer: type[nn.Module]):
        self.load = lambda: layer


class Layer(nn.Module):
    """Somebody's kernel of the whole layer."""

    def forward(
        self, hidden_states: Tensor, cache_params: Any = None, attention_mask: Any = None, **kwargs: Any
    ) -> Any:
        return torch.ones_like(hidden_states)


class Norm(nn.Module):
    """Somebody's kernel of the gated norm."""

    def forward(self, hidden_states: Tensor, gate: Any = None) -> Tensor:
        return hidden_states


def kernelize(model: PreTrainedModel, mode: Mode = Mode.INFERENCE, **kernel: type[nn.Module]) -> None:
    """With `kernel`s for inference; where there is none, `kernelize` binds what the class has."""
    mapping = {name: {"cpu": {Mode.INFERENCE: Repository(layer)}} for name, layer in kernel.items()}
    with kernels.use_kernel_mapping(mapping, inherit_mapping=False):
        kernels.kernelize(model, mode=mode, device="cpu")


def bound(model: PreTrainedModel) -> set[Callable[..., Any]]:
    return {vars(layer)["forward"].__func__ for layer in linear_layers(model)}


@pytest.mark.parametrize("patched_first", [False, True])
def test_either_order_is_fast_and_can_be_undone(expected: Tensor, patched_first: bool) -> None:
    model = build()
    upstream = vars(type(linear_layers(model)[0]))["forward"]
    for act in (qf.patch, kernelize) if patched_first else (kernelize, qf.patch):
        act(model)
    assert torch.equal(generate(model, NEW), expected)
    assert qf.status(model).fast_steps == STEPS
    assert qf.status(model).fallbacks == {"more than one token": LINEAR}
    qf.unpatch(model)
    assert bound(model) == {upstream}
    assert torch.equal(generate(model, NEW), expected)


def test_changes_of_mode_stay_fast(expected: Tensor) -> None:
    model = build()
    kernelize(model)
    qf.patch(model)
    for training in (True, False):
        model.train(training)
        kernelize(model, Mode.TRAINING if training else Mode.INFERENCE)
        assert torch.equal(generate(model, NEW), expected)
    assert qf.status(model).fast_steps == 2 * STEPS


def test_somebodys_kernel_of_the_layer_is_left_alone_and_named(expected: Tensor) -> None:
    model = build()
    kernelize(model, **{LAYER: Layer})
    kernelized = generate(model, NEW)
    assert not torch.equal(kernelized, expected)
    with pytest.raises(qf.LayerNotCovered, match=r"its forward was replaced on the instance by test_kernelize\.Layer"):
        qf.patch(model)
    assert qf.patch(model, strict=False).covered == 0
    assert torch.equal(generate(model, NEW), kernelized)


def test_a_kernel_for_inference_alone_serves_only_there(expected: Tensor) -> None:
    model = build()
    qf.patch(model)
    kernelize(model, **{LAYER: Layer})
    assert not torch.equal(generate(model, NEW), expected)
    assert qf.status(model).covered == qf.status(model).fast_steps == 0
    kernelize(model, Mode.TRAINING, **{LAYER: Layer})
    assert torch.equal(generate(model, NEW), expected)
    assert qf.status(model).fast_steps == STEPS


def test_somebodys_kernel_of_the_norm_is_upstreams_to_call() -> None:
    model = build()
    kernelize(model, **{NORM: Norm})
    expected = generate(model, NEW)
    qf.patch(model)
    assert torch.equal(generate(model, NEW), expected)
    assert qf.status(model).fast_steps == 0
    assert qf.status(model).fallbacks == {"more than one token": LINEAR, "hooks on conv1d or norm": STEPS}
