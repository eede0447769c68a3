"""Whether the patched model still writes what upstream writes. Comes before any speed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .layerwise import LayerDistance

# Of one layer step on the same inputs. Two right implementations in bfloat16 round differently, by half of this.
MAX_LAYER_DISTANCE = 1e-2
# Logits of both sides are held at once, and in float64 while they are compared; more are left out.
MAX_LOGITS = 1 << 25


@dataclass(frozen=True)
class LogitsDistance:
    """How far the patched model's logits are from upstream's, over all decode steps of the same text."""

    positions: int
    max_abs: float
    relative_rms: float  # sqrt(sum of squared differences / sum of squares of upstream's)
    mean_kl: float  # KL(upstream || patched) in nats, a position
    max_kl: float
    top1_agreement: float  # share of positions at which both would choose the same token

    @classmethod
    def between(cls, upstream: Tensor, patched: Tensor) -> LogitsDistance:
        """Of two tensors [..., vocabulary]; computed in float64."""
        reference, other = upstream.double().flatten(0, -2), patched.double().flatten(0, -2)
        difference = other - reference
        log_p, log_q = reference.log_softmax(-1), other.log_softmax(-1)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        return cls(
            positions=reference.shape[0],
            max_abs=difference.abs().max().item(),
            relative_rms=(difference.square().sum() / reference.square().sum()).sqrt().item(),
            mean_kl=kl.mean().item(),
            max_kl=kl.max().item(),
            top1_agreement=(reference.argmax(-1) == other.argmax(-1)).double().mean().item(),
        )


@dataclass(frozen=True)
class GreedyAgreement:
    """Whether both sides, left alone, write the same text."""

    sequences: int
    identical: int  # sequences without any difference
    first_difference: int | None  # the earliest new token that differs in some sequence, counted from 0

    @classmethod
    def between(cls, runs: Sequence[tuple[Tensor, Tensor]]) -> GreedyAgreement:
        """Of several (upstream, patched) pairs of tokens [B, new tokens]."""
        differs = torch.cat([upstream != patched for upstream, patched in runs])
        somewhere = differs.any(0).nonzero()
        first = int(somewhere[0]) if len(somewhere) else None
        return cls(len(differs), int((~differs.any(1)).sum()), first)


@dataclass(frozen=True)
class Parity:
    """The three comparisons, and what follows from them."""

    dtype: str
    num_layers: int
    layer_step: LayerDistance
    logits: LogitsDistance
    greedy: GreedyAgreement
    state_dtype: str | None = None  # asked for, of the patched side

    @property
    def max_logits_distance(self) -> float:
        """Errors of layers are independent: those of a whole model grow with the square root of its depth."""
        return MAX_LAYER_DISTANCE * math.sqrt(self.num_layers)

    @property
    def failures(self) -> list[str]:
        """Why no speed may be claimed; empty if it may. Half precision may flip near-ties, float32 may not."""
        failures = []
        exact = self.dtype == "float32" and self.state_dtype != "bfloat16"
        if exact and self.greedy.first_difference is not None:
            failures.append(f"greedy tokens differ in float32, from new token {self.greedy.first_difference} on")
        # "not below" rather than "above": a NaN must fail.
        if not self.layer_step.relative_rms < MAX_LAYER_DISTANCE:
            distance = _not_below(self.layer_step.relative_rms, MAX_LAYER_DISTANCE)
            failures.append(f"a layer step ({self.layer_step.where}) differs by {distance}")
        if not self.logits.relative_rms < self.max_logits_distance:
            failures.append(f"logits differ by {_not_below(self.logits.relative_rms, self.max_logits_distance)}")
        return failures


def _not_below(value: float, bound: float) -> str:
    return f"{value:.1e} relative RMS, not below {bound:.1e}"


def comparable_part(sequences: int, steps: int, vocabulary: int) -> tuple[int, int]:
    """How many (sequences, steps) to compare: as many as the memory allows, rather long texts than many."""
    steps = max(1, min(steps, MAX_LOGITS // vocabulary))
    return max(1, min(sequences, MAX_LOGITS // (vocabulary * steps))), steps
