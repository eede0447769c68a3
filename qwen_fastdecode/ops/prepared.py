"""Steps are checked and prepared once for every kind of them: by all that the check looks at, and by nothing else."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from operator import attrgetter
from typing import Any

from torch import Tensor

from .step import Recipe, Step

MAX_KINDS = 4096  # kinds of steps kept; a server sees some hundreds (batch sizes x alignments)
_shape, _dtype = attrgetter("shape"), attrgetter("dtype")


class Prepared:
    """What `prepare(step, recipe, *more)` returned, for every step of the same kind.

    A kind is the shapes, strides, dtypes, devices and lazy signs of all tensors, the recipe, how tokens are read, and
    what the caller adds (`more`, and alignments). So whatever `prepare` checks of these holds for each step that finds
    its own.
    """

    def __init__(self, prepare: Callable[..., Any]):
        self._prepare = prepare
        self._kinds: dict[tuple[Hashable, ...], Any] = {}
        self._last: tuple[tuple[Hashable, ...], Any] = (), None  # layers of a model share one: no hash is needed

    def find(self, step: Step, recipe: Recipe, alignment: Hashable = None, *more: Hashable) -> Any:
        """Prepares on the first step of a kind; what `prepare` raises is raised, and nothing is kept."""
        sources, read, states, weights, cu_seqlens = step
        tensors = (*sources, *states, *weights)
        key = (
            read,
            recipe,
            alignment,
            more,
            *map(_shape, tensors),
            *map(Tensor.stride, tensors),
            *map(_dtype, tensors),
            *map(Tensor.get_device, tensors),
            *map(Tensor.is_neg, tensors),  # a view of -x: its memory is x
            None
            if cu_seqlens is None
            else (cu_seqlens.shape, cu_seqlens.stride(), cu_seqlens.dtype, cu_seqlens.device),
        )
        last, found = self._last
        if key == last:
            return found
        found = self._kinds.get(key)
        if found is None:
            found = self._prepare(step, recipe, *more)
            if len(self._kinds) >= MAX_KINDS:
                self._kinds.clear()
            self._kinds[key] = found
        self._last = key, found
        return found

    def clear(self) -> None:
        """Forgets every kind."""
        self._kinds.clear()
        self._last = (), None
