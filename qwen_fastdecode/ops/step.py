"""A decode step and what it computes: the arguments of every backend, their sizes, and the one check of them all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import UnsupportedStep

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
GATES = ("silu", "sigmoid")
Sources = tuple[Tensor, ...]


class Tokens(NamedTuple):
    """N new tokens, as views of what the input projections returned."""

    q: Tensor  # [N, HK, DK]
    k: Tensor  # [N, HK, DK]
    v: Tensor  # [N, HK, R, DV]
    z: Tensor  # [N, HK, R, DV]
    b: Tensor  # [N, HK, R]
    a: Tensor  # [N, HK, R]


class States(NamedTuple):
    """The states of one layer, to be updated in place."""

    conv: Tensor  # [B, C, W], the oldest tap first
    recurrent: Tensor  # [B, HV, DK, DV]


class Weights(NamedTuple):
    """The parameters of one layer that a step reads."""

    conv: Tensor  # [C, W], or [C, 1, W] as nn.Conv1d has it
    A_log: Tensor  # [HV]
    dt_bias: Tensor  # [HV]
    norm: Tensor  # [DV]


class Recipe(NamedTuple):
    """What a step computes, apart from its tensors; hashable."""

    heads: tuple[int, int]  # (first, count) of the value heads, whole key heads
    eps: float = 1e-6  # of the gated norm, added to the mean of squares
    gate: str = "silu"  # activation of z: "silu" or "sigmoid"
    beta_scale: float = 1.0


class Step(NamedTuple):
    """One decode step of one layer.

    sources: what the projections returned; `read` finds the tokens in them, as views, the same ones for the same
    shapes, strides and dtypes. A backend that works with addresses asks `read` once for every kind of sources.
    """

    sources: Sources
    read: Callable[[Sources], Tokens]
    states: States
    weights: Weights
    cu_seqlens: Tensor | None = None

    @classmethod
    def of(cls, tokens: Tokens, states: States, weights: Weights, cu_seqlens: Tensor | None = None) -> Step:
        """The step on tokens that are there as such."""
        return cls(tuple(tokens), Tokens._make, states, weights, cu_seqlens)

    @classmethod
    def from_tensors(cls, tensors: Sequence[Tensor], cu_seqlens: Tensor | None = None) -> Step:
        """The step on twelve tensors in the order of `gated_delta_decode`."""
        return cls.of(Tokens(*tensors[:6]), States(*tensors[6:8]), Weights(*tensors[8:]), cu_seqlens)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of them, in the order of `gated_delta_decode`."""
        return (*self.tokens, *self.states, *self.weights)

    @property
    def tokens(self) -> Tokens:
        return self.read(self.sources)


class StepShapes(NamedTuple):
    """Sizes of a step: N tokens in all, B sequences, HK key heads, R value heads a key head, head sizes, W taps."""

    N: int
    B: int
    HK: int
    R: int
    DK: int
    DV: int
    W: int

    @property
    def HV(self) -> int:
        return self.HK * self.R

    @property
    def C(self) -> int:
        """Convolution channels, in the order [q of all key heads | k of all key heads | v of all value heads]."""
        return 2 * self.HK * self.DK + self.HV * self.DV

    @classmethod
    def of(cls, tokens: Tokens, states: States) -> StepShapes:
        """HK is that of the states where the tokens have fewer key heads: those of a range of value heads."""
        (N, HK, DK), (R, DV), (B, C, W) = tokens.q.shape, tokens.v.shape[2:], states.conv.shape
        return cls(N, B, max(HK, C // max(1, 2 * DK + R * DV)), R, DK, DV, W)

    def key_heads(self, recipe: Recipe) -> tuple[int, int]:
        """(first, count) of the key heads that the recipe's value heads read."""
        first, count = recipe.heads
        return first // self.R, count // self.R

    def conv_channels(self, recipe: Recipe, device: torch.device | None = None) -> Tensor:
        """The channels that a step on the recipe's value heads shifts: theirs, and their key heads'."""
        key, (first, count) = self.HK * self.DK, recipe.heads
        low, heads = self.key_heads(recipe)
        low, high = low * self.DK, (low + heads) * self.DK
        spans = [(low, high), (key + low, key + high), (2 * key + first * self.DV, 2 * key + (first + count) * self.DV)]
        return torch.cat([torch.arange(*span, device=device) for span in spans])


def check_step(step: Step, recipe: Recipe) -> StepShapes:
    """Raises UnsupportedStep that names the argument, what came and what was expected; returns the step's sizes.

    It looks at shapes, strides, dtypes and devices alone, never at data: what it accepts once holds for every step
    of the same kind.
    """
    tokens, states, weights = step.tokens, step.states, step.weights
    _check_dims("q", tokens.q, "[N, HK, DK]")
    _check_dims("v", tokens.v, "[N, HK, R, DV]")
    _check_dims("conv_state", states.conv, "[B, C, W]")
    s = StepShapes.of(tokens, states)
    _check_recipe(s, recipe)
    HK = s.HK if tokens.q.shape[1] == s.HK else s.key_heads(recipe)[1]  # all key heads, or those that are read
    conv_weight = (s.C, 1, s.W) if weights.conv.dim() == 3 else (s.C, s.W)
    expected: dict[str, tuple[Tensor, tuple[int, ...]]] = {
        "q": (tokens.q, (s.N, HK, s.DK)),
        "k": (tokens.k, (s.N, HK, s.DK)),
        "v": (tokens.v, (s.N, HK, s.R, s.DV)),
        "z": (tokens.z, (s.N, HK, s.R, s.DV)),
        "b": (tokens.b, (s.N, HK, s.R)),
        "a": (tokens.a, (s.N, HK, s.R)),
        "conv_state": (states.conv, (s.B, s.C, s.W)),
        "recurrent_state": (states.recurrent, (s.B, s.HV, s.DK, s.DV)),
        "conv_weight": (weights.conv, conv_weight),
        "A_log": (weights.A_log, (s.HV,)),
        "dt_bias": (weights.dt_bias, (s.HV,)),
        "norm_weight": (weights.norm, (s.DV,)),
    }
    for name, (tensor, shape) in expected.items():
        _check_tensor(name, tensor, shape, tokens.q.device, s)
    for name in ("q", "k", "v", "z", "norm_weight"):
        tensor = expected[name][0]
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise UnsupportedStep(f"{name}: got strides {tensor.stride()}, expected the last one to be 1")
    for name in ("conv_state", "recurrent_state"):
        if overlaps(expected[name][0]):
            strides = expected[name][0].stride()
            raise UnsupportedStep(
                f"{name}: got strides {strides} for shape {tuple(expected[name][0].shape)}, expected no two elements "
                "in the same place (an expanded tensor?): it is updated in place"
            )
    if not 2 <= s.W <= 4:
        raise UnsupportedStep(f"conv_state: got {s.W} taps, expected 2 to 4")
    _check_sequences(s, step.cu_seqlens, tokens.q.device)
    return s


def overlaps(x: Tensor) -> bool:
    """Whether two elements may lie in the same place, from shape and strides: True of some layouts that never arise."""
    span = 0  # elements between the first and the last of the dimensions so far
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride <= span:
                return True
            span += (size - 1) * stride
    return False


def check_values(step: Step) -> None:
    """Raises ValueError where cu_seqlens does not deal out every token once. Reads it, so the host waits for a GPU."""
    if step.cu_seqlens is None:
        return
    if step.cu_seqlens.is_cuda and torch.cuda.is_current_stream_capturing():
        raise ValueError("cu_seqlens: its values are checked on the host, which a CUDA graph cannot do")
    tokens, bounds = step.tokens.q.shape[0], step.cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != tokens or sorted(bounds) != bounds:
        raise ValueError(f"cu_seqlens: got {bounds}, expected 0 to {tokens}, the tokens of q, and never falling")


def check_gradients(tensors: Iterable[Tensor]) -> None:
    """Raises ValueError where a gradient would be lost: a step has none."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise ValueError("a decode step has no gradient: call it under torch.no_grad(), or detach its arguments")


def _check_dims(name: str, tensor: Tensor, shape: str) -> None:
    if tensor.dim() != shape.count(",") + 1:
        raise UnsupportedStep(f"{name}: got shape {tuple(tensor.shape)}, expected {shape}")


def _check_tensor(name: str, tensor: Any, shape: tuple[int, ...], device: torch.device, s: StepShapes) -> None:
    if tensor.shape != shape:
        raise UnsupportedStep(
            f"{name}: got shape {tuple(tensor.shape)}, expected {shape} (from q, v and conv_state: {s})"
        )
    if tensor.dtype not in FLOATS:
        raise UnsupportedStep(f"{name}: got dtype {tensor.dtype}, expected one of {', '.join(map(str, FLOATS))}")
    if tensor.device != device:
        raise UnsupportedStep(f"{name}: got device {tensor.device}, expected {device}, where q is")


def _check_recipe(s: StepShapes, recipe: Recipe) -> None:
    first, count = recipe.heads
    if not (first >= 0 and count >= 1 and first + count <= s.HV):
        raise UnsupportedStep(
            f"heads: got (first, count) = {(first, count)}, expected a range inside the {s.HV} value heads"
        )
    if first % s.R or count % s.R:  # both halves would shift the taps of the key head between them
        raise UnsupportedStep(
            f"heads: got (first, count) = {(first, count)}, expected multiples of {s.R}: whole key heads, whose taps a "
            "step shifts once"
        )
    if recipe.gate not in GATES:
        raise UnsupportedStep(f"gate: got {recipe.gate!r}, expected one of {', '.join(map(repr, GATES))}")
    if not 0 < recipe.beta_scale <= 2:  # beyond 2 the state grows: the transition's eigenvalue along k is 1 - beta
        raise UnsupportedStep(f"beta_scale: got {recipe.beta_scale}, expected more than 0 and at most 2")


def _check_sequences(s: StepShapes, cu_seqlens: Tensor | None, device: torch.device) -> None:
    if cu_seqlens is None:
        if s.B == 0 or s.N % s.B:
            raise UnsupportedStep(
                f"q: got {s.N} tokens for the {s.B} sequences of conv_state, expected the same number for each; "
                "pass cu_seqlens for sequences of different lengths"
            )
        return
    if cu_seqlens.shape != (s.B + 1,) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise UnsupportedStep(
            f"cu_seqlens: got {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}, expected int32 or int64 of "
            f"shape {(s.B + 1,)}, one more than the sequences of conv_state"
        )
    if cu_seqlens.device != device:
        raise UnsupportedStep(f"cu_seqlens: got device {cu_seqlens.device}, expected {device}, where q is")
