"""Steps for the kernel's tests: views sliced out of wider, poisoned buffers, run by Triton's interpreter.

The interpreter must be chosen before Triton is first imported: `conftest` sets TRITON_INTERPRET.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from tolerances import FLOAT32, relative_rms, rounding
from torch import Tensor

from qwen_fastdecode.ops import step as op
from qwen_fastdecode.ops.reference import decode_reference
from qwen_fastdecode.ops.triton.launch import decode_triton
from qwen_fastdecode.ops.triton.tiles import Tile

# Triton's interpreter truncates to bfloat16 where a device rounds: up to one unit in the last place, 2^-7.
INTERPRETER_BFLOAT16 = 2.0**-7


def limit(dtype: torch.dtype) -> float:
    """The error of a result in `dtype` computed in float32 by the interpreter."""
    return INTERPRETER_BFLOAT16 if dtype == torch.bfloat16 else rounding(dtype)


@dataclass
class Step:
    """A random decode step. `grouped`: one projection in groups of a key head, as qwen3_next has it; else split."""

    B: int = 2
    HK: int = 2
    R: int = 2
    DK: int = 16
    DV: int = 16
    W: int = 4
    T: int = 1
    lengths: list[int] | None = None  # of the sequences, in place of T
    grouped: bool = True
    channel_last: bool = False
    dtype: torch.dtype = torch.bfloat16
    state_dtype: torch.dtype = torch.float32
    weight_dtype: torch.dtype | None = None  # of conv_weight, A_log, dt_bias, norm_weight; None: dtype
    margin: int = 5  # poisoned elements on each side of a view; odd, so that nothing is aligned
    gate: str = "silu"
    beta_scale: float = 1.0
    heads: tuple[int, int] | None = None
    seed: int = 0
    buffers: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # (buffer, its used part) of each view

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        HV, weights = self.HK * self.R, self.weight_dtype or self.dtype
        C = 2 * self.HK * self.DK + HV * self.DV
        N = self.B * self.T if self.lengths is None else sum(self.lengths)
        self.heads = self.heads or (0, HV)
        self.q, self.k, self.v, self.z, self.b, self.a = self._projections(N)
        if self.channel_last:
            self.conv_state = self.view(self.B, self.W, C).transpose(1, 2)
        else:
            self.conv_state = self.view(self.B, C, self.W, axis=1)
        self.recurrent_state = self.view(self.B, HV, self.DK, self.DV, axis=1, dtype=self.state_dtype)
        self.conv_weight = self.view(C, self.W, axis=0, dtype=weights).mul_(0.5)
        self.A_log, self.dt_bias = self.view(HV, dtype=weights), self.view(HV, dtype=weights)
        self.norm_weight = self.view(self.DV, dtype=weights)
        ends = None if self.lengths is None else [sum(self.lengths[:i]) for i in range(self.B + 1)]
        self.cu_seqlens = None if ends is None else torch.tensor(ends, dtype=torch.int32)

    def view(self, *shape: int, axis: int = -1, dtype: torch.dtype | None = None) -> Tensor:
        """Normal random numbers [*shape] inside a buffer of NaN that is wider along `axis`."""
        wide = list(shape)
        wide[axis] += 2 * self.margin
        buffer = torch.full(wide, torch.nan, dtype=dtype or self.dtype)
        used = buffer.narrow(axis, self.margin, shape[axis])
        used.copy_(torch.randn(shape, generator=self.generator))
        self.buffers.append((buffer, used))
        return used

    def _projections(self, N: int) -> tuple[Tensor, ...]:
        HK, R, DK, DV = self.HK, self.R, self.DK, self.DV
        if self.grouped:  # [q DK | k DK | v R*DV | z R*DV] and [b R | a R] for each key head
            q, k, v, z = self.view(N, HK, 2 * DK + 2 * R * DV).split([DK, DK, R * DV, R * DV], dim=2)
            b, a = self.view(N, HK, 2 * R).split([R, R], dim=2)
        else:  # [q all | k all | v all], z, b, a
            q, k, v = self.view(N, 2 * HK * DK + HK * R * DV).split([HK * DK, HK * DK, HK * R * DV], dim=1)
            q, k, v = q.unflatten(1, (HK, DK)), k.unflatten(1, (HK, DK)), v.unflatten(1, (HK, R * DV))
            z = self.view(N, HK * R * DV).unflatten(1, (HK, R * DV))
            b, a = self.view(N, HK * R).unflatten(1, (HK, R)), self.view(N, HK * R).unflatten(1, (HK, R))
        return q, k, v.unflatten(2, (R, DV)), z.unflatten(2, (R, DV)), b, a

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The arguments in the op's order."""
        weights = self.conv_weight, self.A_log, self.dt_bias, self.norm_weight
        return self.q, self.k, self.v, self.z, self.b, self.a, self.conv_state, self.recurrent_state, *weights

    @property
    def options(self) -> dict:
        options = {"eps": 1e-6, "gate": self.gate, "beta_scale": self.beta_scale}
        return {**options, "cu_seqlens": self.cu_seqlens, "heads": self.heads}

    def run(self, tile: Tile | None = None) -> Tensor:
        """The kernel on this step; updates its states."""
        return decode_triton(*as_op(self.tensors, self.options), tile)

    def expect(self) -> tuple[Tensor, Tensor, Tensor]:
        """What the reference makes of this step: output, conv state, recurrent state. The step stays as it is."""
        tensors = [*self.tensors[:6], self.conv_state.clone(), self.recurrent_state.clone(), *self.tensors[8:]]
        out = decode_reference(*as_op(tensors, self.options))
        return out, tensors[6], tensors[7]

    def bits(self) -> list[Tensor]:
        """Copies of all buffers as integers: equal only if every bit is."""
        return [_bits(buffer).clone() for buffer, _ in self.buffers]

    def check(self, tile: Tile | None = None, tolerance: float = FLOAT32) -> None:
        """The kernel agrees with the reference, and writes nothing but the states, nothing outside the head range."""
        out, conv_state, recurrent_state = self.expect()
        before = self.bits()
        y = self.run(tile)
        assert y.dtype == self.v.dtype
        assert relative_rms(y, out) <= tolerance + limit(y.dtype)
        assert torch.equal(_bits(self.conv_state), _bits(conv_state))  # shifted exactly once, the rest untouched
        assert relative_rms(self.recurrent_state, recurrent_state) <= tolerance + limit(self.state_dtype)
        first, count = self.heads
        for kept in (slice(0, first), slice(first + count, None)):  # the reference did not touch these
            assert torch.equal(_bits(self.recurrent_state[:, kept]), _bits(recurrent_state[:, kept]))
        states = {self.conv_state.untyped_storage().data_ptr(), self.recurrent_state.untyped_storage().data_ptr()}
        for (buffer, used), old in zip(self.buffers, before, strict=True):
            if buffer.data_ptr() not in states:
                assert torch.equal(_bits(buffer), old)
            else:  # all but the margins may change
                assert buffer.isnan().sum() == buffer.numel() - used.numel()


def as_op(tensors: Sequence[Tensor], options: dict) -> tuple[op.Step, op.Recipe]:
    """The arguments of a backend: `tensors` in the op's order, `options` by the op's names."""
    recipe = {name: value for name, value in options.items() if name != "cu_seqlens"}
    return op.Step.from_tensors(tensors, options["cu_seqlens"]), op.Recipe(**recipe)


def _bits(x: Tensor) -> Tensor:
    return x.view({2: torch.int16, 4: torch.int32}[x.element_size()])
