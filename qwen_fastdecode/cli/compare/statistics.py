"""Medians with their spread: no number of this comparison is printed without one."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """What is reported of repeated measurements."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        return cls(statistics.median(values), min(values), max(values))


def ratio_of_medians(before_ms: Sequence[float], after_ms: Sequence[float]) -> float:
    """How many times faster the typical step became. Means would follow the machine's hiccups."""
    return statistics.median(before_ms) / statistics.median(after_ms)


def step_ratios(before_ms: Sequence[float], after_ms: Sequence[float]) -> list[float]:
    """The same for each step: step i of one run against step i of the other, which has a cache of equal length."""
    return [before / after for before, after in zip(before_ms, after_ms, strict=True)]
