"""What cannot be patched: each refusal under strict=True by its error, under strict=False by the report."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import LINEAR, PROMPT, build, forward, generate, linear_layers, llama
from torch import nn

import qwen_fastdecode as qf
from qwen_fastdecode.names import PLAN
from qwen_fastdecode.ops.triton import gpu

NEW = 4


def replace_forward(layer: Any) -> None:
    upstream = layer.forward
    layer.forward = types.MethodType(lambda self, *args, **kwargs: upstream(*args, **kwargs), layer)


def override_forward(layer: Any) -> None:
    upstream = type(layer)

    class Overriding(upstream):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    layer.__class__ = Overriding


def add_bias(layer: Any) -> None:
    layer.conv1d.bias = nn.Parameter(torch.ones(layer.conv1d.out_channels))


def change_activation(layer: Any) -> None:
    layer.activation = "gelu"


def lengthen_convolution(layer: Any) -> None:
    layer.conv_kernel_size = 5
    layer.conv1d.weight = nn.Parameter(torch.randn(layer.conv1d.out_channels, 1, 5))


def replace_norm(layer: Any) -> None:
    class ScaledRMSNormGated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.variance_epsilon = nn.Parameter(torch.ones(layer.head_v_dim)), 1e-6

        def forward(self, hidden_states: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
            return self.weight * hidden_states * gate

    layer.norm = ScaledRMSNormGated()


def shorten_rates(layer: Any) -> None:
    layer.A_log = nn.Parameter(torch.zeros(1))  # upstream broadcasts it over the heads


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (replace_forward, "its forward was replaced on the instance by test_refusals"),
        (override_forward, "Overriding overrides forward"),
        (add_bias, "its conv1d has a bias"),
        (change_activation, "its convolution's activation is 'gelu', not silu"),
        (lengthen_convolution, "its convolution has 5 taps, not 2 to 4"),
        (replace_norm, "its norm, .*ScaledRMSNormGated, is not a gated RMSNorm that was reviewed"),
        (shorten_rates, r"its A_log has shape \(1,\), not \(6,\)"),
    ],
)
def test_a_layer_that_is_not_upstreams_is_refused(change: Callable[[Any], None], reason: str) -> None:
    model = build()
    change(linear_layers(model)[1])
    expected = generate(model, NEW)
    with pytest.raises(qf.LayerNotCovered, match=rf"model\.layers\.1\.linear_attn: .*{reason}.*strict=False"):
        qf.patch(model)
    assert not any(PLAN in vars(layer) for layer in linear_layers(model))

    report = qf.patch(model, strict=False)
    assert [layer.covered for layer in report.layers] == [True, False, True]
    assert report.layers[1].backend == "upstream"
    assert reason.split("(")[0].replace("\\", "").split(".*")[0] in str(report)
    assert torch.equal(generate(model, NEW), expected)
    assert [layer.fast_steps for layer in qf.status(model).layers] == [NEW - 1, 0, NEW - 1]


def test_several_problems_are_counted() -> None:
    model = build()
    for layer in linear_layers(model)[:2]:
        add_bias(layer)
    with pytest.raises(qf.LayerNotCovered, match=rf"2 of {LINEAR} layers have a problem"):
        qf.patch(model)


def test_a_model_without_such_layers_is_refused() -> None:
    model = llama()
    with pytest.raises(qf.NothingToPatch, match="LlamaForCausalLM has no gated DeltaNet layer"):
        qf.patch(model)
    report = qf.patch(model, strict=False)
    assert report.layers == ()
    assert "0 of 0" in str(report)


def test_layers_of_an_unsupported_family_are_named() -> None:
    class SomeGatedDeltaNet(nn.Identity):
        pass

    model = nn.Sequential(SomeGatedDeltaNet())
    with pytest.raises(qf.NothingToPatch, match=r"SomeGatedDeltaNet is of no supported family"):
        qf.patch(model)
    assert [(layer.family, layer.covered) for layer in qf.patch(model, strict=False).layers] == [("unsupported", False)]
    with pytest.raises(qf.LayerNotCovered, match=r"0: .*SomeGatedDeltaNet is of no supported family"):
        qf.patch(nn.Sequential(SomeGatedDeltaNet(), build()))


@pytest.mark.parametrize("model", [None, "tiny"])
@pytest.mark.parametrize("strict", [True, False])
def test_a_backend_that_cannot_run_is_refused(model: str | None, strict: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "INTERPRETED", False)  # as outside these tests
    model = model and build()
    with pytest.raises(qf.BackendUnavailable, match=r"backend='triton' cannot run on .*cpu"):
        qf.patch(model, backend="triton", strict=strict)
    with pytest.raises(ValueError, match="backend: got 'cuda', expected one of 'auto', 'triton', 'torch'"):
        qf.patch(model, backend="cuda", strict=strict)
    assert qf.status().layers == ()


def test_an_unknown_backend_is_refused_whatever_the_model() -> None:
    with pytest.raises(ValueError, match="backend: got 'cuda'"):
        qf.patch(llama(), backend="cuda", strict=False)


def test_patch_of_everything_refuses_before_it_changes_anything() -> None:
    model = build()
    change_activation(linear_layers(model)[1])
    before = vars(type(linear_layers(model)[0]))["forward"]
    with pytest.raises(qf.LayerNotCovered, match="activation"):
        qf.patch()
    assert vars(type(linear_layers(model)[0]))["forward"] is before
    report = qf.patch(strict=False)
    assert sum(not layer.covered for layer in report.layers) == 1
    with pytest.warns(UserWarning, match=r"Qwen3_5GatedDeltaNet\[1\] stays with upstream"):
        generate(model, NEW)
    assert qf.status(model).fast_steps == 2 * (NEW - 1)


def test_a_later_layer_that_cannot_be_covered_raises_at_its_first_use() -> None:
    qf.patch()
    model = build()
    add_bias(linear_layers(model)[0])
    with pytest.raises(qf.LayerNotCovered, match="its conv1d has a bias"):
        forward(model, PROMPT)


def test_a_later_layer_that_cannot_be_covered_is_left_with_a_warning() -> None:
    qf.patch(strict=False)
    model = build()
    add_bias(linear_layers(model)[0])
    with qf.patched(strict=False), pytest.warns(UserWarning, match="stays with upstream: its conv1d has a bias"):
        generate(model, NEW)
    assert qf.status(model).fast_steps == 0
    with pytest.warns(UserWarning, match="stays with upstream: its conv1d has a bias"):
        generate(model, NEW)
    assert [layer.fast_steps for layer in qf.status(model).layers] == [0, NEW - 1, NEW - 1]


def test_every_error_is_a_patch_error() -> None:
    for error in (qf.NothingToPatch, qf.LayerNotCovered, qf.UnknownUpstream, qf.BackendUnavailable):
        assert issubclass(error, qf.PatchError)


def test_a_layer_replaced_after_patching_keeps_its_counters() -> None:
    model = build()
    qf.patch(model)
    generate(model, NEW)
    replace_forward(linear_layers(model)[0])
    first = qf.status(model).layers[0]
    assert (first.covered, first.fast_steps) == (False, NEW - 1)
    assert "replaced on the instance" in first.reason
