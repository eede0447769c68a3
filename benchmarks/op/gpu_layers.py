"""Upstream's own gated DeltaNet layers with their projections' outputs given: the scope that every row times.

A layer's `in_proj_*` return a tensor that is ready and `out_proj` returns what it gets, so that upstream's forward, its
cache included, runs from the outputs of the input projections to the input of the output projection and nothing else.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.models.qwen3_5 import modeling_qwen3_5
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig
from transformers.models.qwen3_next import modeling_qwen3_next
from transformers.models.qwen3_next.configuration_qwen3_next import Qwen3NextConfig

from benchmarks.op.gpu_step import Step
from qwen_fastdecode.cli.compare.upstream import innermost
from qwen_fastdecode.upstream.families import FAMILIES, HeadSizes, reader

HIDDEN = 64  # of the token that no projection looks at
LAYERS = 36  # gated DeltaNet layers of Qwen3-Next 80B
COLD = 4  # times the last cache: what all layers' states take together, at least
BATCHES = (1, 8, 32, 64, 128, 256, 512)
MEMORY_SHARE = 0.65  # of the free memory, for states; the PyTorch reference needs several states more
DECODE_FUNCTIONS = ("torch_recurrent_gated_delta_rule", "causal_conv1d_update")
KERNEL_FUNCTIONS = (*DECODE_FUNCTIONS, "torch_chunk_gated_delta_rule", "causal_conv1d_fn")


@dataclass(frozen=True)
class Workload:
    """One decode step of a layer: what a row of the tables is about."""

    B: int
    HV: int
    HK: int = 16
    D: int = 128
    family: str = "qwen3_5"
    dtype: torch.dtype = torch.bfloat16
    state_dtype: torch.dtype = torch.float32

    @property
    def C(self) -> int:
        return (2 * self.HK + self.HV) * self.D

    @property
    def state_bytes(self) -> int:
        """Of one layer's recurrent state; a step reads and writes it once at least."""
        return self.B * self.HV * self.D * self.D * self.state_dtype.itemsize

    @property
    def bytes(self) -> int:
        """All that a step must move: both states twice; q, k, v, z and the convolution's weight; the output."""
        conv = 2 * self.B * self.C * 4 + self.C * 4
        tokens = self.B * (self.C + 2 * self.HV * self.D)
        return 2 * self.state_bytes + (conv + tokens) * self.dtype.itemsize

    def label(self) -> dict[str, Any]:
        state = str(self.state_dtype).removeprefix("torch.")
        return {"family": self.family, "batch": self.B, "HV": self.HV, "state": state}


class Given(nn.Module):
    """A projection whose output is there already."""

    def __init__(self, output: Tensor):
        super().__init__()
        self.register_buffer("output", output, persistent=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.output


class Stack(nn.Module):
    """`count` layers with a cache that has a previous state; `calls()` are one decode step of each."""

    def __init__(self, w: Workload, count: int, device: torch.device):
        super().__init__()
        self.workload = w
        self.source: ModuleType = modeling_qwen3_next if w.family == "qwen3_next" else modeling_qwen3_5
        config = _config(w, count)
        name = "Qwen3NextGatedDeltaNet" if w.family == "qwen3_next" else "Qwen3_5GatedDeltaNet"
        layer_class = getattr(self.source, name)
        self.cache = DynamicCache(config=config)
        self.hidden_states = torch.zeros(w.B, 1, HIDDEN, dtype=w.dtype, device=device)
        with torch.device(device):
            self.layers = nn.ModuleList(layer_class(config, i).to(w.dtype) for i in range(count))
        self.requires_grad_(False)
        self.sizes = HeadSizes.of(self.layers[0])
        for i, layer in enumerate(self.layers):
            _give_projections(layer, w, self.sizes, device)
            layer.conv1d.weight.normal_(0, 0.4)
            layer.norm.weight.normal_(1, 0.1)
            self.cache.update_conv_state(torch.randn(w.B, w.C, 4, dtype=w.dtype, device=device), i)
            state = torch.empty(w.B, w.HV, w.D, w.D, dtype=w.state_dtype, device=device)
            self.cache.update_recurrent_state(state.normal_(0, 0.3), i)

    def calls(self) -> list[Callable[[], Tensor]]:
        """The layers as the model calls them, patched or not; each returns [B, 1, HV * D]."""

        def call(layer: nn.Module) -> Callable[[], Tensor]:
            return lambda: layer(hidden_states=self.hidden_states, cache_params=self.cache, attention_mask=None)

        return [call(layer) for layer in self.layers]

    def step(self, i: int) -> Step:
        """Layer i's step as arguments of the op."""
        layer: Any = self.layers[i]
        family = FAMILIES[self.workload.family]
        views = reader(family, self.sizes)(family.parts(layer).project(self.hidden_states))
        weights = layer.conv1d.weight.squeeze(1), layer.A_log, layer.dt_bias, layer.norm.weight
        heads = (0, self.workload.HV)
        options = {"eps": layer.norm.variance_epsilon, "gate": "silu", "cu_seqlens": None, "heads": heads}
        states = self.cache.layers[i].conv_states[0], self.cache.layers[i].recurrent_states[0]
        return Step((*views, *states, *weights), options)


@contextmanager
def pytorch_functions(source: ModuleType) -> Iterator[None]:
    """Upstream's module without kernels of other packages, installed or not: its own PyTorch functions."""
    kept = {name: getattr(source, name) for name in KERNEL_FUNCTIONS}
    for name, function in kept.items():
        setattr(source, name, getattr(function, "__wrapped__", function))
    try:
        yield
    finally:
        for name, function in kept.items():
            setattr(source, name, function)


def installed_kernels(source: ModuleType) -> list[str]:
    """The functions of other packages that an unpatched step runs; none where upstream found none."""
    functions = [innermost(getattr(source, name)) for name in DECODE_FUNCTIONS]
    names = [f"{function.__module__}.{function.__qualname__}" for function in functions]
    return names if any(name.partition(".")[0] != "transformers" for name in names) else []


def how_many_layers(w: Workload, device: torch.device) -> int:
    """Enough that no state is still in a cache when its layer's turn comes again; at least 36 where they fit."""
    if device.type != "cuda":
        return 2
    cold = COLD * torch.cuda.get_device_properties(device).L2_cache_size // w.state_bytes + 1
    fit = int(MEMORY_SHARE * torch.cuda.mem_get_info(device)[0] // w.state_bytes)
    return max(1, min(max(LAYERS, cold), fit))


def release_memory(device: torch.device) -> None:
    """After a stack is gone: its layers and its graphs may be in reference cycles."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _config(w: Workload, count: int) -> Any:
    kind = Qwen3NextConfig if w.family == "qwen3_next" else Qwen3_5TextConfig
    return kind(
        hidden_size=HIDDEN,
        num_hidden_layers=count,
        layer_types=["linear_attention"] * count,
        linear_num_key_heads=w.HK,
        linear_num_value_heads=w.HV,
        linear_key_head_dim=w.D,
        linear_value_head_dim=w.D,
        linear_conv_kernel_dim=4,
    )


def _give_projections(layer: Any, w: Workload, sizes: HeadSizes, device: torch.device) -> None:
    family = FAMILIES[w.family]
    for name, features in zip(family.projections, family.projection_sizes(sizes), strict=True):
        setattr(layer, name, Given(torch.randn(w.B, 1, features, dtype=w.dtype, device=device)))
    layer.out_proj = nn.Identity()
