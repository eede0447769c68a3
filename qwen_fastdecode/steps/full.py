"""A decode step on all heads of a layer."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.backends import Backends
from ..ops.library import decode_registered
from ..ops.step import Recipe, States, Step
from ..upstream.families import Family, HeadSizes, Parts, reader
from ..upstream.protocols import CacheLayer
from ..upstream.unsettled import Unsettled, settle


class FullStep:
    """Every head is computed by this process.

    note: why, where another way was asked for.
    """

    splits_heads = defers = False

    def __init__(self, family: Family, sizes: HeadSizes, recipe: Recipe, backends: Backends, note: str = ""):
        self.read = reader(family, sizes)
        self.recipe = recipe
        self.backends = backends
        self.note = note

    def choose(self, states: States, cache_layer: CacheLayer | None) -> FullStep:
        """The strategy for a step on these states, kept in `cache_layer`."""
        return self

    def note_on(self, backend: str) -> str:
        """What a report says of the layer."""
        return self.note

    def run(self, parts: Parts, hidden_states: Tensor, cache_layer: CacheLayer | None, states: States) -> Tensor:
        """hidden_states [B, 1, hidden size] -> the layer's output, of the same shape; updates the states in place.

        parts: of the layer, as they are now. cache_layer: where the states are kept; None where the cache has no such
        objects. Raises UnsupportedStep, before anything was changed, for what the backend does not compute.
        """
        if isinstance(cache_layer, Unsettled):
            settle_outside_graphs(cache_layer)
        step = Step(parts.project(hidden_states), self.read, states, parts.weights)
        if torch.compiler.is_compiling():
            out = decode_registered(step, self.recipe, self.backends.name)
        else:
            out = self.backends.on(hidden_states.device).decode(step, self.recipe)
        return parts.project_out(out)


settle_outside_graphs = torch.compiler.disable(settle)
