"""What a decode step is given: its sizes, and the checks of its arguments."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
GATES = ("silu", "sigmoid")


class DecodeShapes(NamedTuple):
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
    def of(cls, q: Tensor, v: Tensor, conv_state: Tensor) -> DecodeShapes:
        """HK is that of the states where q and v hold fewer key heads: those that a range of value heads reads."""
        (N, HK, DK), (R, DV), (B, C, W) = q.shape, v.shape[2:], conv_state.shape
        return cls(N, B, max(HK, C // max(1, 2 * DK + R * DV)), R, DK, DV, W)

    def key_heads(self, first: int, count: int) -> tuple[int, int]:
        """(first, count) of the key heads that value heads [first, first + count) read."""
        low = first // self.R
        return low, (first + count - 1) // self.R + 1 - low

    def conv_channels(self, first: int, count: int, device: torch.device | None = None) -> Tensor:
        """Channels that a step on value heads [first, first + count) shifts: theirs, and their key heads'."""
        key = self.HK * self.DK
        low, heads = self.key_heads(first, count)
        low, high = low * self.DK, (low + heads) * self.DK
        spans = [(low, high), (key + low, key + high), (2 * key + first * self.DV, 2 * key + (first + count) * self.DV)]
        return torch.cat([torch.arange(*span, device=device) for span in spans])


def check_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    z: Tensor,
    b: Tensor,
    a: Tensor,
    conv_state: Tensor,
    recurrent_state: Tensor,
    conv_weight: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    *,
    gate: str,
    beta_scale: float,
    cu_seqlens: Tensor | None,
    heads: tuple[int, int] | None,
) -> tuple[int, int]:
    """Raises ValueError that names the argument, what came and what was expected; returns the range of heads."""
    if q.dim() != 3:
        raise ValueError(f"q: got shape {tuple(q.shape)}, expected [N, HK, DK]")
    if v.dim() != 4:
        raise ValueError(f"v: got shape {tuple(v.shape)}, expected [N, HK, R, DV]")
    if conv_state.dim() != 3:
        raise ValueError(f"conv_state: got shape {tuple(conv_state.shape)}, expected [B, C, W]")
    s = DecodeShapes.of(q, v, conv_state)
    first, count = _check_heads(s, heads)
    HK = s.HK if q.shape[1] == s.HK else s.key_heads(first, count)[1]  # all key heads, or those that are read
    expected = {
        "q": (q, (s.N, HK, s.DK)),
        "k": (k, (s.N, HK, s.DK)),
        "v": (v, (s.N, HK, s.R, s.DV)),
        "z": (z, (s.N, HK, s.R, s.DV)),
        "b": (b, (s.N, HK, s.R)),
        "a": (a, (s.N, HK, s.R)),
        "conv_state": (conv_state, (s.B, s.C, s.W)),
        "recurrent_state": (recurrent_state, (s.B, s.HV, s.DK, s.DV)),
        "conv_weight": (conv_weight, (s.C, s.W)),
        "A_log": (A_log, (s.HV,)),
        "dt_bias": (dt_bias, (s.HV,)),
        "norm_weight": (norm_weight, (s.DV,)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor.shape != shape:
            raise ValueError(
                f"{name}: got shape {tuple(tensor.shape)}, expected {shape} (from q, v and conv_state: {s})"
            )
        if tensor.dtype not in FLOATS:
            raise ValueError(f"{name}: got dtype {tensor.dtype}, expected one of {', '.join(map(str, FLOATS))}")
        if tensor.device != q.device:
            raise ValueError(f"{name}: got device {tensor.device}, expected {q.device}, where q is")
    for name in ("q", "k", "v", "z", "norm_weight"):
        tensor = expected[name][0]
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"{name}: got strides {tensor.stride()}, expected the last one to be 1")
    if not 2 <= s.W <= 4:
        raise ValueError(f"conv_state: got {s.W} taps, expected 2 to 4")
    if gate not in GATES:
        raise ValueError(f"gate: got {gate!r}, expected one of {', '.join(map(repr, GATES))}")
    if not 0 < beta_scale <= 2:  # beyond 2 the state grows: the transition's eigenvalue along k is 1 - beta
        raise ValueError(f"beta_scale: got {beta_scale}, expected more than 0 and at most 2")
    _check_tokens(s, cu_seqlens, q.device)
    return first, count


def _check_heads(s: DecodeShapes, heads: tuple[int, int] | None) -> tuple[int, int]:
    first, count = (0, s.HV) if heads is None else heads
    if not (first >= 0 and count >= 1 and first + count <= s.HV):
        raise ValueError(
            f"heads: got (first, count) = {(first, count)}, expected a range inside the {s.HV} value heads"
        )
    return first, count


def _check_tokens(s: DecodeShapes, cu_seqlens: Tensor | None, device: torch.device) -> None:
    if cu_seqlens is None:
        if s.B == 0 or s.N % s.B:
            raise ValueError(
                f"q: got {s.N} tokens for the {s.B} sequences of conv_state, expected the same number for each; "
                "pass cu_seqlens for sequences of different lengths"
            )
        return
    if cu_seqlens.shape != (s.B + 1,) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seqlens: got {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}, expected int32 or int64 of "
            f"shape {(s.B + 1,)}, one more than the sequences of conv_state"
        )
    if cu_seqlens.device != device:
        raise ValueError(f"cu_seqlens: got device {cu_seqlens.device}, expected {device}, where q is")
