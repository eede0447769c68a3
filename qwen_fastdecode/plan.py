"""A plan: all that never changes between two decode steps of one layer, worked out once."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

import torch
from torch import nn

from .families import Family, GatedNorm, HeadSizes, read_norm
from .ops.backends import Backend, select_backend
from .reasons import Reason
from .tensor_parallel import HeadSplit, ranks_of, split_heads

PLAN = "_qwen_fastdecode_plan"  # the attribute of a patched layer; a plan, or EXCLUDED
EXCLUDED = False  # `unpatch(model)` under a `patch()` of everything

_counting = threading.Lock()


class DecodePlan:
    """How one layer decodes. Reading it costs attribute look-ups; nothing is computed from configuration again."""

    def __init__(
        self,
        name: str,
        family: Family,
        sizes: HeadSizes,
        norm: GatedNorm,
        backend: str,
        norm_class: type[Any],
        head_parallel: str,
        split: HeadSplit | str,
    ):
        self.name = name
        self.family = family
        self.sizes = sizes
        self.eps = norm.eps
        self.gate = norm.gate
        self.norm_class = norm_class
        self.backend = backend  # as asked for: "auto", "triton" or "torch"
        self.head_parallel = head_parallel  # as asked for: "auto", "on" or "off"
        self.split = split if isinstance(split, HeadSplit) else None
        self.ranks = str(split)  # which heads this rank runs, or why all of them; empty without tensor parallelism
        self.all_heads = (0, sizes.num_v_heads)
        self.heads = self.all_heads if self.split is None else self.split.heads  # of this rank
        self.conv_shape = (sizes.conv_channels, sizes.conv_kernel_size)  # of a sequence
        self.recurrent_shape = (sizes.num_v_heads, sizes.head_k_dim, sizes.head_v_dim)  # of a sequence
        self.recurrent_strides = (sizes.head_k_dim * sizes.head_v_dim, sizes.head_v_dim, 1)  # of a sequence
        self.fast_steps = 0
        self.split_steps = 0  # of those, on this rank's heads alone
        self.fallbacks: Counter[Reason] = Counter()
        self._backends: dict[torch.device, Backend] = {}

    def backend_on(self, device: torch.device) -> Backend:
        """The implementation that serves this layer on `device`: models move after they were patched."""
        backend = self._backends.get(device)
        if backend is None:
            backend = self._backends[device] = select_backend(self.backend, device)
        return backend

    def count_fast_step(self, *, split: bool) -> None:
        with _counting:
            self.fast_steps += 1
            self.split_steps += split

    def count_fallback(self, reason: Reason) -> None:
        with _counting:
            self.fallbacks[reason] += 1

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """A copied or unpickled layer is not patched: its plan is None."""
        return type(None), ()


def make_plan(layer: Any, name: str, family: Family, backend: str, head_parallel: str) -> DecodePlan | str:
    """The plan of `layer`, or why its decode step is not the one that the op computes."""
    missing = [part for part in (*family.projections, "conv1d", "norm", "A_log", "dt_bias") if not hasattr(layer, part)]
    if missing:
        return f"it has no {', '.join(missing)}"
    ranks = ranks_of(layer, family.projections)
    sizes = HeadSizes.of(layer)
    if ranks is not None and sizes.num_k_heads % ranks.size == 0:
        sizes = HeadSizes.of(layer, ranks.size)
    norm = read_norm(layer.norm)
    if norm is None:
        return f"its norm, {type(layer.norm).__name__}, is not a gated RMSNorm that was reviewed"
    if layer.conv1d.bias is not None:
        return "its conv1d has a bias"
    if layer.activation not in ("silu", "swish"):
        return f"its convolution's activation is {layer.activation!r}, not silu"
    if not 2 <= sizes.conv_kernel_size <= 4:
        return f"its convolution has {sizes.conv_kernel_size} taps, not 2 to 4"
    shapes = {
        "conv1d.weight": (layer.conv1d.weight, (sizes.conv_channels, 1, sizes.conv_kernel_size)),
        "A_log": (layer.A_log, (sizes.num_v_heads,)),
        "dt_bias": (layer.dt_bias, (sizes.num_v_heads,)),
        "norm.weight": (layer.norm.weight, (sizes.head_v_dim,)),
    }
    for part, (weight, shape) in shapes.items():
        if weight.shape != shape:
            return f"its {part} has shape {tuple(weight.shape)}, not {shape}"
    split = "" if ranks is None else split_heads(layer, family, sizes, ranks, head_parallel)
    return DecodePlan(name, family, sizes, norm, backend, type(layer.norm), head_parallel, split)


def plan_of(layer: nn.Module) -> DecodePlan | None:
    """The layer's plan, None where it has none or is excluded."""
    return layer.__dict__.get(PLAN) or None
