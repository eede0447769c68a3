"""A graph that a call of `generate` holds: whether it may still be replayed, and what its replays count.

A replay calls no Python, and its layer-steps count as fast steps all the same.
"""

from __future__ import annotations

from typing import Any

from ..layer.plan import Recorded
from ..upstream.protocols import CausalLM
from .caches import GrowingCache
from .capture import Graph
from .fingerprint import Fingerprint, switches


class Held:
    """A graph, with what it was recorded with: as it is when this is made.

    steps: of layers, in the step that was recorded.
    """

    def __init__(self, model: CausalLM, growing: GrowingCache, graph: Graph, steps: list[Recorded]):
        self.graph = graph
        self._growing = growing
        self._steps = steps
        self._fingerprint, self._addresses, self._switches = Fingerprint(model), growing.addresses(), switches()
        self._replays = self._settled = 0

    def changed(self, inputs: dict[str, Any]) -> str | None:
        """What the graph depends on and is no longer as it was; None where it may be replayed."""
        if not self._fingerprint.holds():
            return self._fingerprint.difference()
        if self._addresses != self._growing.addresses():
            return "the place of a state in the cache"
        if self._switches != switches():
            return "a setting of PyTorch"
        return None if self.graph.takes(inputs) else "the kind of an input"

    def count(self) -> None:
        """A replay was a step of the text."""
        self._replays += 1

    def settle(self) -> None:
        """Adds to the layers' counters what was replayed since they were last brought up to date."""
        replays, self._settled = self._replays - self._settled, self._replays
        for plan, split, deferred in self._steps:
            plan.count_fast_steps(replays, split=split, deferred=deferred)

    def close(self) -> None:
        """The graph goes."""
        self.graph.close()
        self.settle()
