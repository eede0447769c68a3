"""A plan: all that never changes between two decode steps of one layer, worked out once."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import nn

from ..names import PLAN
from ..ops.backends import Backend, select_backend
from ..reasons import Reason
from ..steps.split import HeadSplit, ranks_of, split_heads
from ..upstream.families import Family, GatedNorm, HeadSizes, read_norm

_counting = threading.Lock()


class Settings(NamedTuple):
    """What `patch` was asked for, of every layer alike; its docstring says what each means."""

    backend: str = "auto"
    state_dtype: torch.dtype | None = None
    head_parallel: str = "auto"


AS_IS = Settings()


class DecodePlan:
    """How one layer decodes. Reading it costs attribute look-ups; nothing is computed from configuration again."""

    def __init__(
        self,
        name: str,
        family: Family,
        sizes: HeadSizes,
        norm: GatedNorm,
        norm_class: type[Any],
        beta_scale: float,
        settings: Settings,
        split: HeadSplit | str,
    ):
        self.name = name
        self.family = family
        self.sizes = sizes
        self.norm_class = norm_class
        self.settings = settings
        self.split = split if isinstance(split, HeadSplit) else None
        self.ranks = str(split)  # which heads this rank runs, or why all of them; empty without tensor parallelism
        self.heads = (0, sizes.num_v_heads) if self.split is None else self.split.heads  # of this rank
        self.options: dict[str, Any] = {  # of the op, on all heads
            "eps": norm.eps,
            "gate": norm.gate,
            "beta_scale": beta_scale,
            "cu_seqlens": None,
            "heads": (0, sizes.num_v_heads),
        }
        self.rank_options = self.options | {"heads": self.heads}
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
            backend = self._backends[device] = select_backend(self.settings.backend, device)
        return backend

    @property
    def last_backend(self) -> str:
        """The name of the backend on the device that it met last; before its first step, the one that was asked for."""
        return list(self._backends.values())[-1].name if self._backends else self.settings.backend

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


def make_plan(layer: Any, name: str, family: Family, settings: Settings) -> DecodePlan | str:
    """The plan of `layer`, or why its decode step is not the one that the op computes."""
    missing = family.missing_parts(layer)
    if missing:
        return f"it has no {', '.join(missing)}"
    ranks = ranks_of(layer, family.projections)
    sizes = HeadSizes.of(layer)
    conv1d, norm_module = family.read_modules(layer)
    if ranks is not None and sizes.num_k_heads % ranks.size == 0:
        sizes = HeadSizes.of(layer, ranks.size)
    norm = read_norm(norm_module)
    if norm is None:
        return f"its {family.norm}, {type(norm_module).__name__}, is not a gated RMSNorm that was reviewed"
    if conv1d.bias is not None:
        return "its conv1d has a bias"
    if layer.activation not in ("silu", "swish"):
        return f"its convolution's activation is {layer.activation!r}, not silu"
    if not 2 <= sizes.conv_kernel_size <= 4:
        return f"its convolution has {sizes.conv_kernel_size} taps, not 2 to 4"
    shapes = {
        "conv1d.weight": (conv1d.weight, (sizes.conv_channels, 1, sizes.conv_kernel_size)),
        "A_log": (layer.A_log, (sizes.num_v_heads,)),
        "dt_bias": (layer.dt_bias, (sizes.num_v_heads,)),
        f"{family.norm}.weight": (norm_module.weight, (sizes.head_v_dim,)),
    }
    for part, (weight, shape) in shapes.items():
        if weight.shape != shape:
            return f"its {part} has shape {tuple(weight.shape)}, not {shape}"
    split = "" if ranks is None else split_heads(layer, family, sizes, ranks, settings.head_parallel)
    return DecodePlan(name, family, sizes, norm, type(norm_module), family.beta_scale(layer), settings, split)


def plan_of(layer: nn.Module) -> DecodePlan | None:
    """The layer's plan, None where it has none or is excluded."""
    return layer.__dict__.get(PLAN) or None
