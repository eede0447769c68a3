"""Inputs of a decode step as the kernels meet them (views into poisoned buffers), and the check of what comes out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qwen_fastdecode.ops import step as op
from qwen_fastdecode.ops.reference import decode_reference
from qwen_fastdecode.ops.triton.gpu import INTERPRETED

NAN = float("nan")
# Bounds on the relative error of any value head against float64. float32 sums over 128 products cost about 1e-6, and
# the result is rounded once: to nearest on a device, towards zero by Triton's interpreter.
FLOAT32_LIMIT = 3e-5
ROUNDING = 1.0 if INTERPRETED else 0.5  # in units of the dtype's eps


@dataclass(frozen=True)
class Shape:
    """Sizes of a step (names as in `ops.spec`), the layout of the projections, and the dtypes."""

    B: int = 4
    R: int = 2
    HK: int = 16
    DK: int = 128
    DV: int = 128
    W: int = 4
    lengths: tuple[int, ...] | int = 1  # tokens of each sequence: the same for all, or one number each (cu_seqlens)
    layout: str = "split"  # "split" as qwen3_5 projects, "grouped" as qwen3_next does
    dtype: torch.dtype = torch.bfloat16
    state_dtype: torch.dtype = torch.float32
    channel_last: bool = False  # conv state as Transformers <= 5.13 leaves it after a long prefill
    cropped: int = 0  # the conv state is the end of a past that many taps longer
    guard: int = 16  # poisoned elements around each view: 16 keeps 32-byte alignment, 3 breaks it
    gate: str = "silu"
    heads: tuple[int, int] | None = None

    @property
    def HV(self) -> int:
        return self.HK * self.R

    @property
    def C(self) -> int:
        return 2 * self.HK * self.DK + self.HV * self.DV

    @property
    def N(self) -> int:
        return self.B * self.lengths if isinstance(self.lengths, int) else sum(self.lengths)


@dataclass(frozen=True)
class Step:
    """The arguments of one call, and the poisoned buffers that its views lie in."""

    tensors: tuple[Tensor, ...]  # in the order of the op's arguments
    options: dict  # eps, gate, cu_seqlens, heads
    frames: tuple[tuple[Tensor, Tensor], ...] = ()  # (buffer, the part of it that is in use)

    @property
    def conv_state(self) -> Tensor:
        return self.tensors[6]

    @property
    def recurrent_state(self) -> Tensor:
        return self.tensors[7]

    def with_states(self, conv_state: Tensor, recurrent_state: Tensor) -> Step:
        return replace(self, tensors=(*self.tensors[:6], conv_state, recurrent_state, *self.tensors[8:]))

    def twin(self) -> Step:
        """The same step on copies of the states, strides kept."""
        return self.with_states(_copy(self.conv_state), _copy(self.recurrent_state))

    def run(self, decode: Callable[..., Tensor]) -> Tensor:
        """`decode` is a backend, or the reference: a function of `ops.step.Step` and `Recipe`."""
        recipe = {name: value for name, value in self.options.items() if name != "cu_seqlens"}
        return decode(op.Step.from_tensors(self.tensors, self.options["cu_seqlens"]), op.Recipe(**recipe))

    def damaged_guards(self) -> int:
        """How many frames were written outside the part in use."""
        return sum(_count_nan(buffer) + used.numel() != buffer.numel() for buffer, used in self.frames)


def random_step(s: Shape, device: str | torch.device, seed: int = 0) -> Step:
    """A random step of shape `s`; every input is a view into a wider buffer that is NaN elsewhere."""
    generator = torch.Generator(device).manual_seed(seed)
    frames: list[tuple[Tensor, Tensor]] = []

    def view(*shape: int, dtype: torch.dtype = s.dtype, scale: float = 1.0, axis: int = -1) -> Tensor:
        """Random [*shape] inside a NaN buffer that is `guard` wider at both ends of `axis`."""
        wide = list(shape)
        wide[axis] += 2 * s.guard
        buffer = torch.full(wide, NAN, dtype=dtype, device=device)
        used = buffer.narrow(axis, s.guard, shape[axis])
        used.normal_(0, scale, generator=generator)
        frames.append((buffer, used))
        return used

    q, k, v, z, b, a = _views(s, view)
    conv_state = view(s.B, s.W, s.C).transpose(1, 2) if s.channel_last else view(s.B, s.C, s.cropped + s.W, axis=1)
    conv_state = conv_state[..., -s.W :]
    recurrent_state = view(s.B, s.HV, s.DK, s.DV, dtype=s.state_dtype, scale=0.3, axis=1)
    A_log = torch.empty(s.HV, device=device).uniform_(0.01, 16, generator=generator).log().to(s.dtype)
    weights = (view(s.C, s.W, scale=0.4, axis=0), A_log, view(s.HV), 1 + view(s.DV, scale=0.1))
    cu_seqlens = None
    if not isinstance(s.lengths, int):
        cu_seqlens = torch.tensor([0, *s.lengths], device=device).cumsum(0, dtype=torch.int32)
    options = {"eps": 1e-6, "gate": s.gate, "cu_seqlens": cu_seqlens, "heads": s.heads or (0, s.HV)}
    return Step((q, k, v, z, b, a, conv_state, recurrent_state, *weights), options, tuple(frames))


def _views(s: Shape, view: Callable[..., Tensor]) -> tuple[Tensor, ...]:
    """q, k, v, z, b, a as the family's projections give them."""
    N, HK, R, DK, DV = s.N, s.HK, s.R, s.DK, s.DV
    if s.layout == "grouped":  # one projection each, in groups of a key head
        q, k, v, z = view(N, HK * (2 * DK + 2 * R * DV)).unflatten(1, (HK, -1)).split([DK, DK, R * DV, R * DV], dim=2)
        b, a = view(N, 2 * s.HV).unflatten(1, (HK, 2, R)).unbind(2)
        return q, k, v.unflatten(2, (R, DV)), z.unflatten(2, (R, DV)), b, a
    q, k, v = view(N, s.C).split([HK * DK, HK * DK, s.HV * DV], dim=1)
    z, b, a = view(N, s.HV * DV), view(N, s.HV), view(N, s.HV)
    keys = q.unflatten(1, (HK, DK)), k.unflatten(1, (HK, DK))
    values = v.unflatten(1, (HK, R, DV)), z.unflatten(1, (HK, R, DV))
    return *keys, *values, b.unflatten(1, (HK, R)), a.unflatten(1, (HK, R))


def _count_nan(x: Tensor) -> int:
    """In pieces: to add them up takes eight bytes an element, four times what the largest state is allowed to take."""
    return sum(int(part.isnan().sum()) for part in x.split(64))


def check(step: Step, decode: Callable[..., Tensor]) -> dict[str, float]:
    """Runs `decode` on `step`, compares with float64, returns the errors. Raises AssertionError where it is wrong."""
    law = step.twin()
    expected = law.run(decode_reference)
    out = step.run(decode)
    assert step.damaged_guards() == 0, "wrote outside the tensors it was given"
    return compare(out, expected, step, law, step.tensors[2].shape[-1])


def pick(step: Step, sequences: Tensor) -> Step:
    """Copies of some of its sequences, one token each, as a step of their own."""
    return replace(step, tensors=tuple(x[sequences] for x in step.tensors[:8]) + step.tensors[8:], frames=())


def picked(step: Step) -> Tensor:
    """The first, the last and a dozen other sequences."""
    B = step.conv_state.shape[0]
    return torch.linspace(0, B - 1, min(B, 16), device=step.conv_state.device).long()


def check_picked(step: Step, run: Callable[[], Tensor], limit: float | None = None) -> dict[str, float]:
    """`check` of whatever `run` does to `step`, on some sequences: each is alone."""
    sequences = picked(step)
    law = pick(step, sequences)
    expected = law.run(decode_reference)
    out = run().view(step.conv_state.shape[0], -1)[sequences]
    return compare(out, expected, pick(step, sequences), law, step.tensors[2].shape[-1], limit)


def compare(
    out: Tensor, expected: Tensor, step: Step, law: Step, DV: int, limit: float | None = None
) -> dict[str, float]:
    """The relative errors of the worst head, out and state, each within float32 arithmetic and one rounding.

    With `limit`, for code that rounds after every operation: the errors over all heads, each at most that. The conv
    taps must be equal, and heads out of range untouched.
    """
    first, count = step.options["heads"]
    rest = torch.ones(step.recurrent_state.shape[1], dtype=torch.bool, device=out.device)
    rest[first : first + count] = False
    assert torch.equal(step.recurrent_state[:, rest], law.recurrent_state[:, rest]), "touched heads outside the range"
    assert torch.equal(step.conv_state, law.conv_state), "the convolution taps are not the shifted ones"
    pairs = {
        "out": (out.unflatten(-1, (-1, DV)), expected.unflatten(-1, (-1, DV)), 1),
        "state": (step.recurrent_state, law.recurrent_state, 2),
    }
    if limit is None:
        errors = {name: worst_error(*pair) for name, pair in pairs.items()}
    else:
        errors = {name: worst_error(x[None], y[None], x.dim()) for name, (x, y, _) in pairs.items()}
    for name, dtype in {"out": out.dtype, "state": step.recurrent_state.dtype}.items():
        most = limit or FLOAT32_LIMIT + ROUNDING * torch.finfo(dtype).eps
        assert errors[name] <= most, f"{name}: relative error {errors[name]:.2e}, at most {most:.1e} is right"
    return errors


def worst_error(x: Tensor, expected: Tensor, dims: int) -> float:
    """The largest |x - expected| / |expected| over blocks of the last `dims` dimensions; NaN counts as infinite.

    A block a hundred times smaller than the others is measured against a hundredth of them. Where q.k all but
    vanishes (1e-6 of |q||k| and less, a few heads in a million) so does o, and float32 has no digits left for it.
    """
    if x.numel() == 0:
        return 0.0
    parts = list(zip(x.split(64), expected.split(64), strict=True))  # a large state fits only once
    sizes = [law.double().flatten(-dims).norm(dim=-1) for _, law in parts]
    least = 1e-2 * torch.cat(sizes).square().mean().sqrt()
    worst = 0.0
    for (part, law), size in zip(parts, sizes, strict=True):
        difference = (part.double() - law.double()).flatten(-dims).norm(dim=-1)
        worst = max(worst, (difference / size.maximum(least)).nan_to_num(nan=torch.inf).max().item())
    return worst


def _copy(x: Tensor) -> Tensor:
    """A copy with the strides of x. (`clone` would pack a view with gaps.)"""
    copy = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
    return copy.copy_(x)
