"""Whether the patched model is as right as upstream. Comes before any speed.

In float32 both must write the same text. In 16 bits upstream itself is a rounding away from float32 after every
operation, and near-ties between tokens fall either way: there the patched model must be no farther from float32 than
upstream is, in every layer's steps and, where a copy of the model in float32 fits, in the logits of the whole model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .layerwise import LayerDistance

# Of one layer step on the same inputs, relative RMS. Two right implementations in bfloat16 round differently, by
# half of this; in float32 a sum over some thousand products has about 1e-6.
MAX_LAYER_DISTANCE = {"float32": 1e-4, "bfloat16": 1e-2, "float16": 1e-2}
# How many times as far from float32 as upstream a right result may be. Of a layer step: both are means over thousands
# of roundings. Of whole texts: a near-tie of a router or a sampled flip weighs much, and falls on either side.
MAX_LAYER_NOISE, MAX_TEXT_NOISE = 1.1, 2.0
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

    prompts: int
    identical: int  # prompts whose texts are the same in every run
    first_difference: int | None  # the earliest new token that differs in some text, counted from 0
    first_prompt: int | None = None  # the first prompt whose texts differ, counted from 0

    @classmethod
    def between(cls, runs: Sequence[tuple[Tensor, Tensor]], prompts: Sequence[str]) -> GreedyAgreement:
        """Of several (upstream, patched) pairs of tokens [B, new tokens]; `prompts` [B], which may repeat."""
        differs = torch.stack([upstream != patched for upstream, patched in runs]).any(0)  # [B, new tokens]
        tokens = differs.any(0).nonzero().flatten().tolist()
        others = {prompt: i for i, prompt in reversed([*enumerate(prompts)]) if differs[i].any()}
        count = len(set(prompts))
        return cls(count, count - len(others), tokens[0] if tokens else None, min(others.values(), default=None))


@dataclass(frozen=True)
class Float32Distance:
    """How far both sides are from the same model in float32, on the same prompts: the noise floor, measured."""

    upstream_logits: float  # relative RMS over the same text
    patched_logits: float
    upstream_identical: int  # prompts whose greedy text is the one of float32
    patched_identical: int


@dataclass(frozen=True)
class Parity:
    """The comparisons, and what follows from them."""

    dtype: str
    layer_step: LayerDistance
    logits: LogitsDistance
    greedy: GreedyAgreement
    float32: Float32Distance | None = None
    float32_missing: str = ""  # why there is none
    state_dtype: str | None = None  # asked for, of the patched side

    @property
    def exact(self) -> bool:
        """Whether the texts must be the same."""
        return self.dtype == "float32" and self.state_dtype != "bfloat16"

    @property
    def max_layer_distance(self) -> float:
        """Of a layer step; bfloat16 states round a float32 model's."""
        return MAX_LAYER_DISTANCE[self.dtype if self.state_dtype != "bfloat16" else "bfloat16"]

    @property
    def failures(self) -> list[str]:
        """Why no speed may be claimed; empty if it may."""
        failures, layer = [], self.layer_step
        if self.exact:
            failures += differing_texts(self.greedy)
        # "not below" rather than "above": a NaN must fail.
        if not layer.relative_rms < self.max_layer_distance:
            failures.append(
                f"a layer step ({layer.where}) is {apart(layer.relative_rms)} from upstream's, "
                f"not below {apart(self.max_layer_distance)}"
            )
        if self.state_dtype != "bfloat16":  # which adds a rounding that upstream has not, by choice
            failures += _farther(
                "layer steps", layer.patched_from_float32, layer.upstream_from_float32, MAX_LAYER_NOISE
            )
            if self.float32 is not None:
                of = self.float32
                failures += _farther("logits", of.patched_logits, of.upstream_logits, MAX_TEXT_NOISE)
        return failures


def differing_texts(greedy: GreedyAgreement) -> list[str]:
    """What is wrong where the texts of float32 are not the same."""
    first = greedy.first_difference
    return [] if first is None else [f"greedy texts differ in float32, from new token {first} on"]


def _farther(what: str, patched: float | None, upstream: float | None, allowed: float) -> list[str]:
    if patched is None or upstream is None or patched <= allowed * upstream:
        return []
    return [f"{what} are {apart(patched)} from float32, not within {allowed:g} times upstream's {apart(upstream)}"]


def apart(value: float) -> str:
    """A relative RMS distance; limits are written with as many digits."""
    return f"{value:.1e}"


def comparable_part(sequences: int, steps: int, vocabulary: int) -> tuple[int, int]:
    """How many (sequences, steps) to compare: as many as the memory allows, rather long texts than many."""
    steps = max(1, min(steps, MAX_LOGITS // vocabulary))
    return max(1, min(sequences, MAX_LOGITS // (vocabulary * steps))), steps
