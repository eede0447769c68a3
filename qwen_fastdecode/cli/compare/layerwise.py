"""Every fast decode step of a run, repeated by upstream's own forward on the same inputs and states.

Logits of a deep half-precision model differ by more than one layer's rounding, since every layer adds its own; this is
the distance of one layer step, the one that has a fixed bound.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm

from qwen_fastdecode.ops.step import States
from qwen_fastdecode.switch import KILL_SWITCH
from qwen_fastdecode.upstream.caches import read_states, with_own_layer
from qwen_fastdecode.upstream.calls import cache_name


@dataclass(frozen=True)
class LayerDistance:
    """The largest relative RMS difference over all layers and their outputs and states, and where it is."""

    relative_rms: float = 0.0
    where: str = ""
    steps: int = 0  # layer-steps that were compared


class LayerwiseCheck:
    """Compares the decode steps of some layers of a patched model while it generates inside `watching()`."""

    def __init__(self, model: nn.Module, names: Sequence[str]):
        self._layers = {name: model.get_submodule(name) for name in names}
        self._before: dict[nn.Module, Any] = {}  # a copy of the cache, for a layer whose step is under way
        self._squares: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])  # of difference and reference
        self._steps = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While it lasts, each decode step of the layers costs one step of upstream's and a copy of the states more."""
        with ExitStack() as stack:
            for name, layer in self._layers.items():
                stack.enter_context(layer.register_forward_pre_hook(self._copy_states, with_kwargs=True))
                stack.enter_context(layer.register_forward_hook(self._compare(name), with_kwargs=True))
            yield

    @property
    def distance(self) -> LayerDistance:
        """Over all steps so far."""
        ratios = {where: _ratio(*squares) for where, squares in self._squares.items()}
        where = max(ratios, key=lambda key: (ratios[key] != ratios[key], ratios[key]), default="")  # NaN is the largest
        return LayerDistance(ratios.get(where, 0.0), where, self._steps)

    def _copy_states(self, layer: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs["hidden_states"].shape[1] == 1:
            self._before[layer] = with_own_layer(kwargs[cache_name(kwargs)], layer.layer_idx)

    def _compare(self, name: str) -> Any:
        def hook(layer: Any, args: Any, kwargs: dict[str, Any], out: Tensor) -> None:
            cache = self._before.pop(layer, None)
            if cache is None:
                return
            cache_argument = cache_name(kwargs)
            with switched_off():
                expected = layer.forward(**{**kwargs, cache_argument: cache})
            self._steps += 1
            self._add(f"{name} output", out, expected)
            ours, upstream = (read_states(c, layer.layer_idx) for c in (kwargs[cache_argument], cache))
            if isinstance(ours, States) and isinstance(upstream, States):  # else it was no fast step
                self._add(f"{name} conv state", ours.conv, upstream.conv)
                self._add(f"{name} recurrent state", ours.recurrent, upstream.recurrent)

        return hook

    def _add(self, where: str, ours: Tensor, upstream: Tensor) -> None:
        squares = self._squares[where]
        squares[0] += vector_norm(ours.float() - upstream.float(), dtype=torch.float64).item() ** 2
        squares[1] += vector_norm(upstream.float(), dtype=torch.float64).item() ** 2


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


def _ratio(difference: float, reference: float) -> float:
    return (difference / reference) ** 0.5 if reference else float(difference > 0)
