"""A plan: how one layer decodes, worked out once, and what it was worked out from."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn

from ..names import PLAN
from ..ops.backends import Backends
from ..ops.step import Recipe
from ..reasons import Reason
from ..steps.deferred import DeferredStep
from ..steps.full import FullStep
from ..steps.split import SplitStep, split_heads
from ..upstream.families import FAMILIES, GATES, KEPT_FUNCTIONS, Family, HeadSizes, read_norm
from ..upstream.known import Known
from ..upstream.lookups import Lookups, is_activation, lookups_of
from ..upstream.protocols import GatedDeltaNet
from ..upstream.seams import Upstream
from ..upstream.sharding import ranks_of
from .install import original_forward

# Whose functions upstream calls in a decode step.
_PACKAGES = ("transformers", "fla", "causal_conv1d", "kernels")
Strategy = FullStep | SplitStep | DeferredStep
_counting = threading.Lock()


class Recorded(NamedTuple):
    """A layer's fast step in a step that was recorded: counted when it is replayed, how often it may be."""

    plan: Plan
    split: bool
    deferred: bool


class _Recording(threading.local):
    steps: list[Recorded] | None = None


_recording = _Recording()


@contextmanager
def recorded_steps() -> Iterator[list[Recorded]]:
    """Fast steps of this thread are noted in the list, and not counted: nothing runs. Those of other threads do."""
    noted: list[Recorded] = []
    _recording.steps = noted
    try:
        yield noted
    finally:
        _recording.steps = None


def _renew_lock() -> None:
    global _counting
    _counting = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)  # another thread may have held it


class Settings(NamedTuple):
    """What `patch` was asked for, of every layer alike; its docstring says what each means."""

    backend: str = "auto"
    state_dtype: torch.dtype | None = None
    head_parallel: str = "auto"
    cuda_graph: bool = False
    deferred_state: bool = False


DEFAULT = Settings()


class Plan:
    """How one layer decodes.

    facts: all values and parts of the layer that the plan was made from. lookups: what upstream's forward would find
    under the names that it looks up. Both are compared on every call, so that a change after patching is never
    overlooked.
    """

    def __init__(
        self,
        layer: GatedDeltaNet,
        name: str,
        upstream: Upstream,
        sizes: HeadSizes,
        settings: Settings,
        strategy: Strategy,
    ) -> None:
        self.name = name
        self.family: Family = FAMILIES[upstream.family]
        self.sizes = sizes
        self.settings = settings
        self.strategy = strategy
        self.facts = self.family.facts(layer)
        self.known: Known | None = None  # the layer as the last call found it, when it was all right
        self.lookups = _lookups(layer, self.family, upstream)
        self.conv_shape = (sizes.conv_channels, sizes.conv_kernel_size)  # of a sequence
        self.recurrent_shape = (sizes.num_v_heads, sizes.head_k_dim, sizes.head_v_dim)  # of a sequence
        self.fast_steps = 0
        self.split_steps = 0  # of those, on this rank's heads alone
        self.deferred_steps = 0  # of those, with the states written every N-th time
        self.fallbacks: Counter[Reason] = Counter()
        self.unsupported = ""  # what the backend said of the last step that it did not take

    @property
    def last_backend(self) -> str:
        """The name of the backend on the device that it met last; before its first step, the one that was asked for."""
        return self.strategy.backends.last

    @property
    def ring_bytes(self) -> int:
        """Memory beside the states of living caches: 0 but where they are deferred."""
        return self.strategy.ring_bytes if isinstance(self.strategy, DeferredStep) else 0

    def is_of(self, layer: GatedDeltaNet) -> bool:
        """Whether the layer is still what the plan was made from."""
        return self.family.facts(layer) == self.facts

    def holds_for(self, layer: GatedDeltaNet) -> bool:
        """Whether the layer, and upstream's functions, are still what the plan was made from."""
        return self.is_of(layer) and self.lookups.find_the_same()

    def count_fast_steps(self, count: int = 1, *, split: bool, deferred: bool) -> None:
        """Counts steps that have run, or notes one that is recorded."""
        if _recording.steps is not None:
            _recording.steps.append(Recorded(self, split, deferred))
            return
        with _counting:
            self.fast_steps += count
            self.split_steps += count * split
            self.deferred_steps += count * deferred

    def count_fallback(self, reason: Reason) -> None:
        with _counting:
            self.fallbacks[reason] += 1

    def reset_counters(self) -> None:
        with _counting:
            self.fast_steps = self.split_steps = self.deferred_steps = 0
            self.fallbacks.clear()

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """A copied or unpickled layer is not patched: its plan is None."""
        return type(None), ()


def make_plan(layer: GatedDeltaNet, name: str, upstream: Upstream, settings: Settings) -> Plan | str:
    """The plan of `layer`, or why its decode step is not the one that the op computes."""
    family = FAMILIES[upstream.family]
    missing = family.missing_parts(layer)
    if missing:
        return f"it has no {', '.join(missing)}"
    ranks = ranks_of(layer, family.projections)
    sizes = HeadSizes.of(layer)
    if ranks is not None and sizes.num_k_heads % ranks.size == 0:
        sizes = HeadSizes.of(layer, ranks.size)
    _, norm_module = family.read_modules(layer)
    norm = read_norm(norm_module)
    if norm is None:
        return f"its {family.norm}, {type(norm_module).__name__}, is not a gated RMSNorm that was reviewed"
    problem = _problem(layer, family, sizes) or _foreign_parts(layer, family, upstream)
    if problem is not None:
        return problem
    recipe = Recipe((0, sizes.num_v_heads), norm.eps, norm.gate, family.beta_scale(layer))
    full = FullStep(family, sizes, recipe, Backends(settings.backend))
    strategy: Strategy = (
        full if ranks is None else split_heads(layer, full, family, sizes, ranks, settings.head_parallel)
    )
    if settings.deferred_state:
        if strategy.splits_heads:
            return "deferred_state=True is not for heads split over ranks: pass head_parallel='off'"
        strategy = DeferredStep(full, sizes.num_k_heads, layer.layer_idx)
    return Plan(layer, name, upstream, sizes, settings, strategy)


def _lookups(layer: GatedDeltaNet, family: Family, upstream: Upstream) -> Lookups:
    """Of upstream's forward, and of the functions that a layer keeps, up to 5.14."""
    kept = [vars(layer).get(name) for name in KEPT_FUNCTIONS]
    _, norm = family.read_modules(layer)
    activations = dict.fromkeys((layer.activation, getattr(norm, "activation", "silu")))  # each once
    functions = (original_forward(upstream.layer_class), *filter(None, kept))
    return lookups_of(functions, (type(norm),), tuple(activations))


def _problem(layer: GatedDeltaNet, family: Family, sizes: HeadSizes) -> str | None:
    """What about the layer's own parts the op does not compute."""
    conv1d, norm = family.read_modules(layer)
    if conv1d.bias is not None:
        return "its conv1d has a bias"
    if GATES.get(layer.activation) != "silu":
        return f"its convolution's activation is {layer.activation!r}, not silu"
    if not 2 <= sizes.conv_kernel_size <= 4:
        return f"its convolution has {sizes.conv_kernel_size} taps, not 2 to 4"
    shapes = {
        "conv1d.weight": (conv1d.weight, (sizes.conv_channels, 1, sizes.conv_kernel_size)),
        "A_log": (layer.A_log, (sizes.num_v_heads,)),
        "dt_bias": (layer.dt_bias, (sizes.num_v_heads,)),
        f"{family.norm}.weight": (norm.weight, (sizes.head_v_dim,)),
    }
    for part, (weight, shape) in shapes.items():
        if weight.shape != shape:
            return f"its {part} has shape {tuple(weight.shape)}, not {shape}"
    return None


def _foreign_parts(layer: GatedDeltaNet, family: Family, upstream: Upstream) -> str | None:
    """Functions of the layer that a fast step stands in for and that are not upstream's."""
    if family.reordering is not None:
        held = getattr(getattr(layer, family.reordering), "__func__", None)
        if held is not vars(upstream.layer_class).get(family.reordering):
            return f"its {family.reordering} is not {upstream.layer_class.__qualname__}'s"
    for name in KEPT_FUNCTIONS:
        held = vars(layer).get(name)
        if held is not None and str(getattr(held, "__module__", "")).partition(".")[0] not in _PACKAGES:
            return f"its {name} is {held!r}, not Transformers' or a kernel package's"
    _, norm = family.read_modules(layer)
    for activation in (layer.activation, getattr(norm, "activation", "silu")):
        if not is_activation(activation, GATES[activation]):
            return f"its activation {activation!r} is not the {GATES[activation]}: somebody replaced it in ACT2FN"
    return None


def plan_of(layer: nn.Module) -> Plan | None:
    """The layer's plan, None where it has none or is excluded."""
    return layer.__dict__.get(PLAN) or None
