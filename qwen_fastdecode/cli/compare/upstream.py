"""Which implementation upstream itself decodes with: a ratio means nothing without it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from torch import nn

from qwen_fastdecode.upstream.families import Family

_KNOWN = {
    "transformers": "PyTorch reference",
    "fla": "flash-linear-attention",
    "causal_conv1d": "causal-conv1d",
}
# Variables in which wrappers of Transformers (5.15 on) and of the `kernels` package keep the function that they call.
_WRAPPED = ("implementation", "func")


@dataclass(frozen=True)
class UpstreamKernels:
    """For each part of an unpatched decode step, "what it is (where it is from)"."""

    delta_rule: str
    convolution: str
    norm: str

    @property
    def summary(self) -> str:
        """One phrase where all parts come from one place, else each of them."""
        parts = {"delta rule": self.delta_rule, "convolution": self.convolution, "norm": self.norm}
        kinds = {name: text.partition(" (")[0] for name, text in parts.items()}
        if len(set(kinds.values())) == 1:
            return kinds["delta rule"]
        return ", ".join(f"{name}: {kind}" for name, kind in kinds.items())


def upstream_kernels(layer: nn.Module, family: Family) -> UpstreamKernels:
    """What a decode step of the unpatched `layer` runs."""
    _, norm = family.read_modules(layer)
    forward = layer.__dict__.get("forward")
    if forward is not None and _package(forward) != "transformers":  # the layer as a whole was replaced
        whole = describe(forward, from_hub=hasattr(type(layer), "kernel_layer_name"))
        return UpstreamKernels(whole, whole, whole)
    return UpstreamKernels(
        _describe_used(layer, "recurrent_gated_delta_rule", "torch_recurrent_gated_delta_rule"),
        _describe_used(layer, "causal_conv1d_update", "causal_conv1d_update"),
        describe(type(norm)),
    )


def _describe_used(layer: nn.Module, attribute: str, global_name: str) -> str:
    """Up to 5.14 a layer keeps its functions as attributes; from 5.15 its forward reads them from the module."""
    function = layer.__dict__.get(attribute) or getattr(sys.modules[type(layer).__module__], global_name)
    # With the `kernels` package they are modules, to which it binds another forward when a kernel is wanted.
    return describe(function, from_hub=hasattr(type(function), "kernel_layer_name"))


def describe(function: Any, from_hub: bool = False) -> str:
    """ "kind (module.name)" of what runs in the end when `function` is called."""
    function = innermost(function)
    kind = _KNOWN.get(_package(function)) or ("hub kernel" if from_hub else "other code")
    return f"{kind} ({function.__module__}.{function.__qualname__})"


def innermost(function: Any) -> Any:
    """Looks through modules that stand for functions and through wrappers, down to what does the work."""
    while (inner := _inner(function)) is not None:
        function = inner
    return function


def _inner(function: Any) -> Any:
    if isinstance(function, nn.Module):
        return function.forward
    function = getattr(function, "__func__", function)
    code = getattr(function, "__code__", None)
    if code is None or not function.__closure__:
        return None
    held = dict(zip(code.co_freevars, (cell.cell_contents for cell in function.__closure__), strict=True))
    return next((held[name] for name in _WRAPPED if callable(held.get(name))), None)


def _package(function: Any) -> str:
    return str(getattr(function, "__module__", None)).split(".")[0]
