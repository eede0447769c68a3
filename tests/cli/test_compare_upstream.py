"""Which implementation upstream decodes with, in every way in which Transformers has chosen one so far."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType, ModuleType
from typing import Any

import pytest
from torch import nn
from transformers.models.qwen3_next import modeling_qwen3_next as upstream

from qwen_fastdecode.cli.compare.upstream import UpstreamKernels, upstream_kernels
from qwen_fastdecode.upstream.families import FAMILIES

QWEN3_NEXT = FAMILIES["qwen3_next"]


@pytest.fixture
def layer() -> nn.Module:
    config = upstream.Qwen3NextConfig(
        hidden_size=16, linear_num_key_heads=1, linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8
    )
    return upstream.Qwen3NextGatedDeltaNet(config, layer_idx=0)


def function_of(module: str, name: str) -> Callable[..., None]:
    def function(*args: Any, **kwargs: Any) -> None: ...

    function.__module__, function.__qualname__ = module, name
    return function


def with_fallback(torch_function: Callable[..., Any], implementation: Callable[..., Any]) -> Callable[..., Any]:
    """As Transformers 5.15 on wraps its functions."""

    @functools.wraps(torch_function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return (implementation or torch_function)(*args, **kwargs)

    return wrapped


def as_module(func: Callable[..., Any]) -> nn.Module:
    """As the package `kernels` makes a module of a function."""

    class Func(nn.Module):
        kernel_layer_name = "fused_recurrent_gated_delta_rule"

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return func(*args, **kwargs)

    return Func()


FLA = function_of("fla.ops.gated_delta_rule.fused_recurrent", "fused_recurrent_gated_delta_rule")
CONV = function_of("causal_conv1d.causal_conv1d_interface", "causal_conv1d_update")
HUB = function_of("_gated_delta_rule_3f2a.ops", "fused_recurrent_gated_delta_rule")


def test_the_installed_release_without_other_packages(layer: nn.Module) -> None:
    kernels = upstream_kernels(layer, QWEN3_NEXT)
    assert kernels.delta_rule == f"PyTorch reference ({upstream.__name__}.torch_recurrent_gated_delta_rule)"
    assert kernels.convolution.startswith(f"PyTorch reference ({upstream.__name__}.")
    assert kernels.norm == f"PyTorch reference ({upstream.__name__}.Qwen3NextRMSNormGated)"
    assert kernels.summary == "PyTorch reference"


@pytest.mark.parametrize("wrap", [lambda f: f, as_module], ids=["plain", "as a module of kernels"])
def test_functions_of_the_module_with_a_fallback(
    layer: nn.Module, monkeypatch: pytest.MonkeyPatch, wrap: Callable[..., Any]
) -> None:
    reference = upstream.torch_recurrent_gated_delta_rule
    monkeypatch.setattr(upstream, "torch_recurrent_gated_delta_rule", wrap(with_fallback(reference, FLA)))
    monkeypatch.setattr(upstream, "causal_conv1d_update", wrap(with_fallback(reference, CONV)), raising=False)
    vars(layer).pop("recurrent_gated_delta_rule", None)  # up to 5.14
    vars(layer).pop("causal_conv1d_update", None)
    kernels = upstream_kernels(layer, QWEN3_NEXT)
    assert kernels.delta_rule == f"flash-linear-attention ({FLA.__module__}.{FLA.__qualname__})"
    assert kernels.convolution == f"causal-conv1d ({CONV.__module__}.{CONV.__qualname__})"
    assert kernels.summary == (
        "delta rule: flash-linear-attention, convolution: causal-conv1d, norm: PyTorch reference"
    )


def test_attributes_of_the_layer(layer: Any) -> None:
    layer.recurrent_gated_delta_rule, layer.causal_conv1d_update = FLA, CONV
    kernels = upstream_kernels(layer, QWEN3_NEXT)
    assert kernels.delta_rule.startswith("flash-linear-attention (")
    assert kernels.convolution.startswith("causal-conv1d (")


def test_a_function_rebound_to_a_hub_kernel(layer: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    function = as_module(upstream.torch_recurrent_gated_delta_rule)
    function.forward = MethodType(type(as_module(HUB)).forward, function)  # what kernelize() does
    monkeypatch.setattr(upstream, "torch_recurrent_gated_delta_rule", function)
    vars(layer).pop("recurrent_gated_delta_rule", None)
    assert upstream_kernels(layer, QWEN3_NEXT).delta_rule == f"hub kernel ({HUB.__module__}.{HUB.__qualname__})"


def test_a_layer_replaced_as_a_whole(layer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    layer.forward = MethodType(function_of("_gdn_1a.layers", "Qwen3_5GatedDeltaNet.forward"), layer)
    assert upstream_kernels(layer, QWEN3_NEXT).summary == "other code"
    monkeypatch.setattr(type(layer), "kernel_layer_name", "Qwen3_5GatedDeltaNet", raising=False)
    assert upstream_kernels(layer, QWEN3_NEXT).summary == "hub kernel"


def test_a_norm_of_another_package(layer: Any) -> None:
    module = ModuleType("fla.modules")
    module.Norm = type("FusedRMSNormGated", (nn.Module,), {"__module__": "fla.modules"})
    layer.norm = module.Norm()
    assert upstream_kernels(layer, QWEN3_NEXT).norm == "flash-linear-attention (fla.modules.FusedRMSNormGated)"


def test_summary_names_one_kind_once() -> None:
    same = UpstreamKernels("flash-linear-attention (a)", "flash-linear-attention (b)", "flash-linear-attention (c)")
    assert same.summary == "flash-linear-attention"


def test_hooks_that_keep_the_forward_are_no_replacement(layer: nn.Module) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    before = upstream_kernels(layer, QWEN3_NEXT)
    add_hook_to_module(layer, ModelHook())
    assert "forward" in vars(layer)
    assert upstream_kernels(layer, QWEN3_NEXT) == before
