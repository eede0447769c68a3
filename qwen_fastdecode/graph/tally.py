"""Counting what a graph does: a replay calls no Python, and its layer-steps count as fast steps all the same."""

from __future__ import annotations

from ..layer.plan import Recorded


class Tally:
    """Of one capture: what each layer did in the step that was recorded, and how often it was replayed."""

    def __init__(self, recorded: list[Recorded]):
        self._recorded = recorded
        self._settled = 0
        self.replays = 0

    def settle(self) -> None:
        """Adds to the layers' counters what was replayed since they were last brought up to date."""
        replays, self._settled = self.replays - self._settled, self.replays
        for plan, split, deferred in self._recorded:
            plan.count_fast_steps(replays, split=split, deferred=deferred)
