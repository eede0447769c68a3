"""Every fast decode step of a run, repeated by upstream's own forward on the same inputs and states.

Logits of a deep half-precision model differ by more than one layer's rounding, since every layer adds its own; this is
the distance of one layer step, the one that has a fixed bound. Where upstream itself rounds, a copy of the layer in
float32 takes the step as well, one layer at a time: how far upstream is from that is the noise floor of this model.
"""

from __future__ import annotations

import copy
import os
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import has_offloaded_params
from torch import Tensor, nn
from torch.linalg import vector_norm

from qwen_fastdecode.ops.step import States
from qwen_fastdecode.switch import KILL_SWITCH
from qwen_fastdecode.upstream.caches import read_states, with_own_layer
from qwen_fastdecode.upstream.calls import cache_name

FLOAT32_STEPS = 8  # of each layer: enough for a mean over its heads, and each takes a copy of the weights


@dataclass(frozen=True)
class LayerDistance:
    """The largest relative RMS difference over all layers and their outputs and states, and where it is."""

    relative_rms: float = 0.0
    where: str = ""
    steps: int = 0  # layer-steps that were compared
    # From the same step in float32, of the outputs: the largest over all layers. None where it was not taken.
    upstream_from_float32: float | None = None
    patched_from_float32: float | None = None


class LayerwiseCheck:
    """Compares the decode steps of some layers of a patched model while it generates inside `watching()`."""

    def __init__(self, model: nn.Module, names: Sequence[str]):
        self._layers = {name: model.get_submodule(name) for name in names}
        self._before: dict[nn.Module, Any] = {}  # a copy of the cache, for a layer whose step is under way
        self._sums: defaultdict[tuple[str, str], _Squares] = defaultdict(_Squares)  # by kind of distance and place
        self._widened = dict.fromkeys(names, 0)  # steps that were taken in float32
        self._steps = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While it lasts, each decode step of the layers costs two of upstream's and copies of the states more."""
        with ExitStack() as stack:
            for name, layer in self._layers.items():
                stack.enter_context(layer.register_forward_pre_hook(self._copy_states, with_kwargs=True))
                stack.enter_context(layer.register_forward_hook(self._compare(name), with_kwargs=True))
            yield

    @property
    def distance(self) -> LayerDistance:
        """Over all steps so far."""
        apart, where = self._largest("apart")
        upstream, _ = self._largest("upstream from float32")
        patched, _ = self._largest("patched from float32")
        return LayerDistance(apart or 0.0, where, self._steps, upstream, patched)

    def _largest(self, kind: str) -> tuple[float | None, str]:
        ratios = {where: squares.ratio for (of, where), squares in self._sums.items() if of == kind}
        where = max(ratios, key=lambda key: (ratios[key] != ratios[key], ratios[key]), default="")  # NaN is the largest
        return ratios.get(where), where

    def _copy_states(self, layer: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs["hidden_states"].shape[1] == 1:
            self._before[layer] = with_own_layer(kwargs[cache_name(kwargs)], layer.layer_idx)

    def _compare(self, name: str) -> Any:
        def hook(layer: Any, args: Any, kwargs: dict[str, Any], out: Tensor) -> None:
            cache = self._before.pop(layer, None)
            if cache is None:
                return
            cache_argument = cache_name(kwargs)
            exact = None
            if self._widened[name] < FLOAT32_STEPS and can_be_widened(layer):
                self._widened[name] += 1
                exact = _in_float32(layer, kwargs, with_own_layer(cache, layer.layer_idx))
            with switched_off():
                expected = layer.forward(**{**kwargs, cache_argument: cache})
            self._steps += 1
            self._sums["apart", f"{name} output"].add(out, expected)
            if exact is not None:
                self._sums["upstream from float32", name].add(expected, exact)
                self._sums["patched from float32", name].add(out, exact)
            ours, upstream = (read_states(c, layer.layer_idx) for c in (kwargs[cache_argument], cache))
            if isinstance(ours, States) and isinstance(upstream, States):  # else it was no fast step
                self._sums["apart", f"{name} conv state"].add(ours.conv, upstream.conv)
                self._sums["apart", f"{name} recurrent state"].add(ours.recurrent, upstream.recurrent)

        return hook


class _Squares:
    """Sums of squares of differences from a reference, and of the reference."""

    def __init__(self) -> None:
        self.difference = self.reference = 0.0

    def add(self, actual: Tensor, reference: Tensor) -> None:
        self.difference += vector_norm(actual.float() - reference.float(), dtype=torch.float64).item() ** 2
        self.reference += vector_norm(reference.float(), dtype=torch.float64).item() ** 2

    @property
    def ratio(self) -> float:
        """Relative RMS."""
        if self.reference:
            return (self.difference / self.reference) ** 0.5
        return float(self.difference > 0)


def _in_float32(layer: Any, kwargs: dict[str, Any], cache: Any) -> Tensor:
    """Upstream's step of a copy of the layer in float32; the copy is made anew, so that one at a time takes memory."""
    no_hooks: dict[int, Any] = {
        id(layer._forward_hooks): OrderedDict(),
        id(layer._forward_pre_hooks): OrderedDict(),
    }  # they hold us
    wide: Any = copy.deepcopy(layer, no_hooks).float()  # a copy is not patched
    widen_states(cache, wide.layer_idx)
    hidden_states = kwargs["hidden_states"].float()
    with switched_off():
        return wide(**{**kwargs, "hidden_states": hidden_states, cache_name(kwargs): cache})


def can_be_widened(module: nn.Module) -> bool:
    """Whether `module.float()` is the same in more digits: plain 16-bit weights on one device, none offloaded."""
    parameters = [*module.parameters()]
    plain = all(type(p) is nn.Parameter and p.is_floating_point() for p in parameters)
    together = len({p.device for p in parameters}) == 1 and not any(map(has_offloaded_params, module.modules()))
    return plain and together and any(p.dtype in (torch.bfloat16, torch.float16) for p in parameters)


def widen_states(cache: Any, layer_idx: int) -> None:
    """Puts both states of a layer of a cache into float32."""
    layer = cache.layers[layer_idx] if hasattr(cache, "layers") else None
    for name in ("conv_states", "recurrent_states"):
        held = getattr(cache if layer is None else layer, name)
        if isinstance(held, Tensor):
            setattr(layer, name, held.float())
        else:  # of all layers, or of one layer by number
            key = layer_idx if layer is None else 0
            held[key] = held[key].float()


@contextmanager
def switched_off() -> Iterator[None]:
    """Upstream's own forward serves every call."""
    before = os.environ.get(KILL_SWITCH)
    os.environ[KILL_SWITCH] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[KILL_SWITCH]
        else:
            os.environ[KILL_SWITCH] = before
