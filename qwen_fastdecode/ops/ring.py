"""The last updates of a recurrent state, kept apart so that the state need not be written at every step.

A step makes S_t = decay S_{t-1} + k delta^T out of a state. Where N of them wait, the tensor of states holds an older
S, and the one that the step means is never formed:

    S_t = G S + sum_j w_j k_j d_j^T,    S_t^T x = G (S^T x) + sum_j w_j (k_j . x) d_j

G is the product of the decays since S was written, w_j that of the decays since entry j (1 for the newest). Each is
multiplied by one decay a step, as the state itself would be: a product of numbers in [0, 1] may underflow to zero,
where the state would as well, but nothing is divided by it and no exponential is taken of a sum of logarithms, which
would cost digits where one of them is large.

Once in N steps what waits is folded into S, at the start of a step and before S is used. A cursor a key head of a
sequence counts what waits and the steps that are left before it is folded. One program owns it as it owns that head's
taps, or one of a cluster changes it after all have read it: so it needs neither atomics nor a launch of its own, and a
captured graph that is replayed advances it. A new ring spreads the folds (`new_ring`): an N-th of the heads folds at
each step, so that no token is slower than the others, but for the last ones of a launch. A launch ends when its last
program does, so a fold among those would be waited for at every step; they fold at the same step, a different one in
each layer.
"""

from __future__ import annotations

from operator import attrgetter
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UnsupportedStep
from .step import Recipe, Step, StepShapes, check_step


class Ring(NamedTuple):
    """What waits for a layer's states [B, HV, DK, DV]. Only what the cursor counts is meant; the rest is anything."""

    k: Tensor  # [B, HK, N, DK], the unit keys
    d: Tensor  # [B, HV, N, DV], the corrected deltas
    w: Tensor  # [B, HV, N + 1], the weight of each entry, and last that of the state, G
    cursor: Tensor  # [B, HK] int32: how many entries wait, plus LEFT times the steps left before they are folded

    @property
    def N(self) -> int:
        return self.k.shape[2]

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self)


COUNT_BITS = 16  # of a cursor
LEFT = 1 << COUNT_BITS

# Of each part: shape, dtype, whether it is contiguous, device.
Kind = tuple[tuple[torch.Size, ...], tuple[torch.dtype, ...], tuple[bool, ...], tuple[int, ...]]
_shape, _dtype = attrgetter("shape"), attrgetter("dtype")


def new_ring(
    recurrent_state: Tensor, HK: int, N: int, dtype: torch.dtype = torch.float32, *, together: int = 0, layer: int = 0
) -> Ring:
    """An empty ring for states [B, HV, DK, DV] of HK key heads. Zeros, so that copies of two rings can be compared.

    Key head number `item` of all sequences is first folded after N - item % N steps, the last `together` of them after
    N - layer % N, and every one each N steps from then on.
    """
    B, HV, DK, DV = recurrent_state.shape
    if not 1 <= N < LEFT:
        raise ValueError(f"N: got {N}, expected at least 1 and less than {LEFT}")
    make = recurrent_state.new_zeros
    k, d, w = make(B, HK, N, DK, dtype=dtype), make(B, HV, N, DV, dtype=dtype), make(B, HV, N + 1, dtype=dtype)
    item = torch.arange(B * HK, dtype=torch.int32, device=recurrent_state.device).view(B, HK)
    left = N - torch.where(item < B * HK - together, item, layer) % N
    return Ring(k, d, w, (LEFT * left).to(torch.int32))


def check_ring(ring: Ring, recurrent_state: Tensor) -> None:
    """Raises ValueError that names the part of the ring that does not belong to these states."""
    check_kind(kind_of(ring), recurrent_state)


def kind_of(ring: Ring) -> Kind:
    """All of a ring that the check looks at, and that a kernel is compiled for: hashable, and quick to find."""
    return (
        tuple(map(_shape, ring)),
        tuple(map(_dtype, ring)),
        tuple(map(Tensor.is_contiguous, ring)),
        tuple(map(Tensor.get_device, ring)),
    )


def check_kind(kind: Kind, recurrent_state: Tensor) -> None:
    """As `check_ring`, of every ring of a kind."""
    B, HV, DK, DV = recurrent_state.shape
    _, HK, N, _ = kind[0][0]
    shapes = (B, HK, N, DK), (B, HV, N, DV), (B, HV, N + 1), (B, HK)
    for name, shape, _, contiguous, device, expected in zip(Ring._fields, *kind, shapes, strict=True):
        if shape != expected:
            raise ValueError(f"ring.{name}: got shape {tuple(shape)}, expected {expected}")
        if not contiguous:
            raise ValueError(f"ring.{name}: got gaps between its elements, expected a contiguous tensor")
        if device != recurrent_state.get_device():
            raise ValueError(f"ring.{name}: expected device {recurrent_state.device}, where the states are")


def pending(ring: Ring) -> tuple[Tensor, Tensor]:
    """How many entries of each key head wait, and whether its next step folds them, each [B, HK]."""
    count = ring.cursor % LEFT
    return count, (ring.cursor < LEFT) & (count > 0)


def advance(ring: Ring) -> None:
    """Counts one step, after which one entry more waits; those that the step folded do not."""
    count, folds = pending(ring)
    left = ring.cursor // LEFT
    ring.cursor.copy_(torch.where(folds, 0, count) + 1 + LEFT * (torch.where(left == 0, ring.N, left) - 1))


def forget(ring: Ring) -> None:
    """Nothing waits any more."""
    ring.cursor.sub_(ring.cursor % LEFT)


def check_deferred(step: Step, recipe: Recipe) -> StepShapes:
    """Raises UnsupportedStep for a step that cannot wait in a ring."""
    s = check_step(step, recipe)
    if step.cu_seqlens is not None or s.N != s.B:
        raise UnsupportedStep(f"q: got {s.N} tokens for {s.B} sequences, expected one each where states are deferred")
    if recipe.heads != (0, s.HV):
        raise UnsupportedStep(f"heads: got {recipe.heads}, expected all {s.HV} where states are deferred")
    return s


def settle(recurrent_state: Tensor, ring: Ring) -> None:
    """Folds what is pending into the states, in place, after which nothing waits. In PyTorch, on any device."""
    check_ring(ring, recurrent_state)
    count, _ = pending(ring)
    fold(recurrent_state, ring, count)
    forget(ring)


def fold(recurrent_state: Tensor, ring: Ring, count: Tensor) -> None:
    """Adds the first `count` [B, HK] entries of the ring to the states of each key head; those with none stay."""
    R = recurrent_state.shape[1] // ring.k.shape[1]
    w, G = weights_of(ring, count)
    counts = counted(ring, count).repeat_interleave(R, 1)[..., None]  # [B, HV, N, 1]
    k = ring.k.repeat_interleave(R, 1).where(counts, 0.0) * w[..., None]
    S = recurrent_state.to(ring.k.dtype) * G[..., None, None]
    S += k.transpose(2, 3) @ ring.d.where(counts, 0.0)
    changed = (count > 0).repeat_interleave(R, 1)[..., None, None]
    recurrent_state.copy_(torch.where(changed, S.to(recurrent_state.dtype), recurrent_state))


def weights_of(ring: Ring, count: Tensor) -> tuple[Tensor, Tensor]:
    """The weights of the first `count` [B, HK] entries [B, HV, N], zero of the others, and G [B, HV] (1 if none)."""
    R = ring.w.shape[1] // ring.k.shape[1]
    some = (count > 0).repeat_interleave(R, 1)
    return ring.w[..., :-1].where(counted(ring, count).repeat_interleave(R, 1), 0.0), ring.w[..., -1].where(some, 1.0)


def counted(ring: Ring, count: Tensor) -> Tensor:
    """Which entries are among the first `count` [B, HK], as [B, HK, N]."""
    return torch.arange(ring.N, device=count.device) < count[..., None]


@torch.inference_mode()
def decode_deferred_torch(step: Step, recipe: Recipe, ring: Ring) -> Tensor:
    """The step as `triton.deferred` does it, in PyTorch and in the ring's dtype: for tests, and where there is no GPU.

    With a ring and states of float64 it is the reference of the ring. Returns [N, HV * DV] in the ring's dtype.
    """
    check_ring(ring, step.states.recurrent)
    s = check_deferred(step, recipe)
    (conv, recurrent), weights, dtype = step.states, step.weights, ring.k.dtype
    count, folds = pending(ring)
    fold(recurrent, ring, torch.where(folds, count, 0))
    count = torch.where(folds, 0, count)
    # The convolution, the norms and the gates.
    q, k, v, z, b, a = (x.to(dtype) for x in step.tokens)
    x = torch.cat([q.flatten(1), k.flatten(1), v.flatten(1)], 1)
    taps = torch.cat([conv[..., 1:].to(dtype), x[..., None]], 2)
    conv.copy_(taps)
    y = F.silu((taps * weights.conv.to(dtype).reshape(s.C, s.W)).sum(2))
    q, k, v = y.split([s.HK * s.DK, s.HK * s.DK, s.HV * s.DV], 1)
    q, k, v = q.unflatten(1, (s.HK, -1)), k.unflatten(1, (s.HK, -1)), v.unflatten(1, (s.HV, -1))
    q = q * torch.rsqrt(q.square().sum(-1, keepdim=True) + 1e-6) * s.DK**-0.5
    k = k * torch.rsqrt(k.square().sum(-1, keepdim=True) + 1e-6)
    beta = recipe.beta_scale * torch.sigmoid(b.flatten(1))[..., None]  # [B, HV, 1]
    rate = weights.A_log.to(dtype).exp() * F.softplus(a.flatten(1) + weights.dt_bias.to(dtype), threshold=1e9)
    decay = torch.exp(-rate)[..., None]
    # The state applied to k and q, by its parts.
    w, G = weights_of(ring, count)
    counts = counted(ring, count)[..., None]
    entries, d = ring.k.where(counts, 0.0), ring.d.where(counts.repeat_interleave(s.R, 1), 0.0)

    def apply(x: Tensor) -> Tensor:  # [B, HK, DK] -> [B, HV, DV]
        overlap = (entries @ x[..., None]).squeeze(-1).repeat_interleave(s.R, 1) * w  # [B, HV, N]
        x = x.repeat_interleave(s.R, 1)
        state = (recurrent.to(dtype).transpose(2, 3) @ x[..., None]).squeeze(-1)
        return G[..., None] * state + (overlap[..., None, :] @ d).squeeze(-2)

    delta = beta * (v - decay * apply(k))
    o = decay * apply(q) + (q * k).sum(-1, keepdim=True).repeat_interleave(s.R, 1) * delta
    # The new entry, and the older ones a step older.
    slot = count[..., None, None]
    ring.k.scatter_(2, slot.expand(-1, -1, 1, s.DK).long(), k[:, :, None])
    ring.d.scatter_(2, slot.repeat_interleave(s.R, 1).expand(-1, -1, 1, s.DV).long(), delta[:, :, None])
    ring.w.copy_(torch.cat([w, G[..., None]], 2) * decay)
    ring.w.scatter_(2, slot[..., 0].repeat_interleave(s.R, 1).long(), 1.0)
    advance(ring)
    gate = {"silu": F.silu, "sigmoid": torch.sigmoid}[recipe.gate](z.flatten(1).unflatten(1, (s.HV, -1)))
    o = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + recipe.eps) * weights.norm.to(dtype) * gate
    return o.flatten(1)
