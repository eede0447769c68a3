"""Steps for tests of the op: views as the families' projections give them, cut out of larger, poisoned buffers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tolerances import FLOAT32, relative_rms
from torch import Tensor

from qwen_fastdecode.ops import step as op
from qwen_fastdecode.ops.reference import decode_reference

NAMES = (
    "q",
    "k",
    "v",
    "z",
    "b",
    "a",
    "conv_state",
    "recurrent_state",
    "conv_weight",
    "A_log",
    "dt_bias",
    "norm_weight",
)


@dataclass
class Case:
    """A random decode step; sizes are named as in `ops.step`.

    family: "qwen3_next" projects in groups of a key head, "qwen3_5" over all heads. conv: which of the conv state's
    dimensions lies innermost, "taps", "channels", or "crop": taps, cut out of a longer past. guards: the dimensions
    of the recurrent state along which its buffer goes on.
    """

    B: int = 3
    HK: int = 2
    R: int = 2
    DK: int = 16
    DV: int = 16
    W: int = 4
    T: int = 1
    lengths: Sequence[int] | None = None  # tokens of each sequence, in place of T
    family: str = "qwen3_next"
    conv: str = "taps"
    guards: tuple[int, ...] = (0,)
    dtype: torch.dtype = torch.float32
    state_dtype: torch.dtype = torch.float32
    weight_dtype: torch.dtype | None = None  # None: dtype
    gate: str = "silu"
    beta_scale: float = 1.0
    eps: float = 1e-6
    heads: tuple[int, int] | None = None
    seed: int = 0
    buffers: list[Tensor] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        HV, C, weights = (
            self.HK * self.R,
            2 * self.HK * self.DK + self.HK * self.R * self.DV,
            self.weight_dtype or self.dtype,
        )
        tensors = [*self._projections(), self._conv_state(C)]
        tensors.append(self.cut(self.B, HV, self.DK, self.DV, dims=self.guards, dtype=self.state_dtype))
        tensors.append(self.cut(C, self.W, dims=(0,), dtype=weights))
        tensors += [self.cut(n, dtype=weights) for n in (HV, HV, self.DV)]
        self.tensors: dict[str, Tensor] = dict(zip(NAMES, tensors, strict=True))
        self.cu_seqlens = None
        if self.lengths is not None:
            self.cu_seqlens = torch.tensor([0, *self.lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def cut(self, *shape: int, dims: tuple[int, ...] = (-1,), dtype: torch.dtype | None = None) -> Tensor:
        """Standard normal numbers, in the midst of a buffer of NaN that is wider along `dims`."""
        wide = list(shape)
        for dim in dims:
            wide[dim] += 5
        buffer = torch.full(wide, torch.nan, dtype=dtype or self.dtype)
        self.buffers.append(buffer)
        for dim in dims:
            buffer = buffer.narrow(dim, 3, shape[dim])
        return buffer.copy_(torch.randn(shape, generator=self.generator))

    def _projections(self) -> list[Tensor]:
        HK, R, DK, DV = self.HK, self.R, self.DK, self.DV
        N = self.B * self.T if self.lengths is None else sum(self.lengths)
        if self.family == "qwen3_next":  # [q DK | k DK | v R*DV | z R*DV] and [b R | a R] for each key head
            sizes = [DK, DK, R * DV, R * DV]
            q, k, v, z = self.cut(N, HK * sum(sizes)).view(N, HK, sum(sizes)).split(sizes, dim=2)
            b, a = self.cut(N, HK * 2 * R).view(N, HK, 2 * R).split(R, dim=2)
        else:  # [q all | k all | v all], then z, b and a apart
            q, k, v = self.cut(N, 2 * HK * DK + HK * R * DV).split([HK * DK, HK * DK, HK * R * DV], dim=1)
            q, k, v = q.view(N, HK, DK), k.view(N, HK, DK), v.view(N, HK, R * DV)
            z, b, a = (self.cut(N, HK * n).view(N, HK, n) for n in (R * DV, R, R))
        return [q, k, v.view(N, HK, R, DV), z.view(N, HK, R, DV), b, a]

    def _conv_state(self, C: int) -> Tensor:
        if self.conv == "channels":
            return self.cut(self.B, self.W, C, dims=(0,)).transpose(1, 2)
        return self.cut(self.B, C, self.W, dims=(0, 2) if self.conv == "crop" else (0,))

    def options(self) -> dict[str, Any]:
        options = {"eps": self.eps, "gate": self.gate, "beta_scale": self.beta_scale}
        return {**options, "cu_seqlens": self.cu_seqlens, "heads": self.range}

    @property
    def recipe(self) -> op.Recipe:
        return op.Recipe(self.range, self.eps, self.gate, self.beta_scale)

    @property
    def range(self) -> tuple[int, int]:
        return self.heads or (0, self.HK * self.R)

    def run(self, decode: Callable[..., Tensor]) -> Tensor:
        """What `decode` makes of this step; updates its states."""
        return decode(*self.tensors.values(), **self.options())

    def expect(self) -> tuple[Tensor, Tensor, Tensor]:
        """The reference's output, conv state and recurrent state, the last in float64. The step stays as it is."""
        copies = self.tensors | {"conv_state": self["conv_state"].clone()}
        copies["recurrent_state"] = self["recurrent_state"].to(torch.float64, copy=True)
        out = decode_reference(op.Step.from_tensors([*copies.values()], self.cu_seqlens), self.recipe)
        return out, copies["conv_state"], copies["recurrent_state"]

    def check(self, decode: Callable[..., Tensor], tolerance: float = FLOAT32) -> None:
        """`decode` agrees with the reference, and changes no bit of anything but the states of its heads."""
        out, conv_state, recurrent_state = self.expect()
        saved = [bits(buffer).clone() for buffer in self.buffers]
        before = {name: self[name].clone() for name in ("conv_state", "recurrent_state")}
        y = self.run(decode)
        assert (y.shape, y.dtype) == (out.shape, self.dtype)
        assert excess(y, out) <= tolerance
        assert torch.equal(bits(self["conv_state"]), bits(conv_state))  # each tap moved once, the rest not at all
        assert excess(self["recurrent_state"], recurrent_state) <= tolerance
        first, count = self.range
        for others in (slice(0, first), slice(first + count, None)):
            assert torch.equal(bits(self["recurrent_state"][:, others]), bits(before["recurrent_state"][:, others]))
        for name, state in before.items():
            self[name].copy_(state)
        assert all(torch.equal(bits(buffer), old) for buffer, old in zip(self.buffers, saved, strict=True))


def excess(actual: Tensor, expected: Tensor) -> float:
    """Relative root-mean-square of what differs by more than one rounding to the dtype of `actual`."""
    kind, exact = torch.finfo(actual.dtype), expected.double()
    rounding = exact.abs().clamp_min(kind.smallest_normal) * (kind.eps / 2)
    nearest = torch.minimum(torch.maximum(actual.double(), exact - rounding), exact + rounding)
    return relative_rms(exact + (actual.double() - nearest), exact)


def bits(x: Tensor) -> Tensor:
    """The same memory as integers: equal only if every bit is, NaN included."""
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
