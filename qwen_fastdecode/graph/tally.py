"""Counting what a graph does: a replay calls no Python, and its layer-steps count as fast steps all the same."""

from __future__ import annotations

from ..layer.plan import Plan, plan_of
from ..upstream.protocols import CausalLM


class Tally:
    """Of one capture: what each layer did in the step that was recorded, and how often it was replayed."""

    def __init__(self, model: CausalLM):
        self._before = [(plan, *_counts(plan)) for plan in map(plan_of, model.modules()) if plan is not None]
        self._fast: list[Plan] = []
        self._split: list[Plan] = []
        self._deferred: list[Plan] = []
        self._settled = 0
        self.replays = 0

    def recorded(self) -> None:
        """The step was recorded: layers counted it, and nothing has run yet."""
        for plan, fast, split, deferred in self._before:
            if plan.fast_steps > fast:
                self._fast.append(plan)
                plan.fast_steps -= 1
            if plan.split_steps > split:
                self._split.append(plan)
                plan.split_steps -= 1
            if plan.deferred_steps > deferred:
                self._deferred.append(plan)
                plan.deferred_steps -= 1

    def settle(self) -> None:
        """Adds to the layers' counters what was replayed since they were last brought up to date."""
        replays, self._settled = self.replays - self._settled, self.replays
        for plan in self._fast:
            plan.fast_steps += replays
        for plan in self._split:
            plan.split_steps += replays
        for plan in self._deferred:
            plan.deferred_steps += replays


def _counts(plan: Plan) -> tuple[int, int, int]:
    return plan.fast_steps, plan.split_steps, plan.deferred_steps
