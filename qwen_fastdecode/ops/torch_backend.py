"""The decode step in PyTorch, in place: one read and one write of the recurrent state, no temporary of its size.

Runs anywhere PyTorch runs. The state is walked in chunks small enough to stay in a core's cache between the three
passes over a chunk (decay, both reductions at once, rank-one update), so that memory sees each element once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .spec import DecodeShapes

CHUNK_BYTES = 2 << 20  # of recurrent state: what a server core's L2 holds


def decode_torch(
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
    eps: float,
    gate: str,
    cu_seqlens: Tensor | None,
    heads: tuple[int, int],
) -> Tensor:
    """Same arguments and result as `gated_delta_decode`; computes in float32 (float64 for float64 activations)."""
    tokens = (q, k, v, z, b, a)
    weights = (conv_weight, A_log, dt_bias, norm_weight)
    decode: Callable[..., Tensor] = partial(_decode_token, weights=weights, eps=eps, gate=gate, heads=heads)
    N, B = q.shape[0], conv_state.shape[0]
    if cu_seqlens is None and N == B:
        return decode(*tokens, conv_state, recurrent_state)
    out = v.new_empty(N, heads[1] * v.shape[3])
    if cu_seqlens is None:
        T = N // B
        for t in range(T):  # token t of every sequence
            out[t::T] = decode(*(x[t::T] for x in tokens), conv_state, recurrent_state)
        return out
    bounds = cu_seqlens.tolist()
    for i in range(B):
        states = conv_state[i : i + 1], recurrent_state[i : i + 1]
        for t in range(bounds[i], bounds[i + 1]):
            out[t : t + 1] = decode(*(x[t : t + 1] for x in tokens), *states)
    return out


def _decode_token(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    z: Tensor,
    b: Tensor,
    a: Tensor,
    conv_state: Tensor,
    recurrent_state: Tensor,
    *,
    weights: tuple[Tensor, Tensor, Tensor, Tensor],
    eps: float,
    gate: str,
    heads: tuple[int, int],
) -> Tensor:
    conv_weight, A_log, dt_bias, norm_weight = weights
    s = DecodeShapes.of(q, v, conv_state)
    first, count = heads
    dtype = torch.promote_types(v.dtype, torch.float32)
    v, z, b, a = v.flatten(1, 2), z.flatten(1, 2), b.flatten(1), a.flatten(1)  # [B, HV, DV] twice, [B, HV] twice
    if count < s.HV:
        v, z, b, a, recurrent_state = (x.narrow(1, first, count) for x in (v, z, b, a, recurrent_state))
        A_log, dt_bias = A_log.narrow(0, first, count), dt_bias.narrow(0, first, count)

    y = _convolve(s, q, k, v, conv_state, conv_weight, heads, dtype)  # [B, channels of these heads]
    qk, v_conv = y.split([y.shape[1] - count * s.DV, count * s.DV], dim=1)
    qk = qk.view(s.B, 2, -1, s.DK)
    qk = qk * torch.rsqrt(qk.square().sum(-1, keepdim=True) + 1e-6)
    qk[:, 0] *= s.DK**-0.5
    qk = _to_value_heads(qk.transpose(1, 2), s.R, heads)  # [B, count, 2, DK]
    beta = torch.sigmoid(b.to(dtype)).unsqueeze(-1)  # [B, count, 1]
    decay = _decay(a.to(dtype), A_log, dt_bias)  # [B, count]
    o = _delta_rule(recurrent_state, qk, v_conv.view(v.shape), beta, decay)  # [B, count, DV]

    o = F.rms_norm(o, (s.DV,), norm_weight.to(dtype), eps)
    o *= F.silu(z.to(dtype)) if gate == "silu" else torch.sigmoid(z.to(dtype))
    return o.to(v.dtype).flatten(1)


def _convolve(
    s: DecodeShapes,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    conv_state: Tensor,
    conv_weight: Tensor,
    heads: tuple[int, int],
    dtype: torch.dtype,
) -> Tensor:
    """Shifts the new token into the taps of these heads' channels, in place; returns silu(conv), [B, channels]."""
    first, count = heads
    low, high = first // s.R, (first + count - 1) // s.R + 1  # key heads that they read
    key = s.HK * s.DK
    spans = (
        (q[:, low:high], slice(low * s.DK, high * s.DK)),
        (k[:, low:high], slice(key + low * s.DK, key + high * s.DK)),
        (v, slice(2 * key + first * s.DV, 2 * key + (first + count) * s.DV)),
    )
    for channels in [slice(s.C)] if count == s.HV else [span for _, span in spans]:
        for tap in range(s.W - 1):
            conv_state[:, channels, tap].copy_(conv_state[:, channels, tap + 1])
    for x, channels in spans:
        conv_state[:, channels, -1].unflatten(1, x.shape[1:]).copy_(x)
    window, weight = conv_state, conv_weight
    if count < s.HV:
        window = torch.cat([window[:, channels] for _, channels in spans], dim=1)
        weight = torch.cat([weight[channels] for _, channels in spans])
    # A product with a vector of ones sums W taps several times faster than sum(-1) over so short a dimension.
    return F.silu((window.to(dtype) * weight.to(dtype)) @ weight.new_ones(s.W, dtype=dtype), inplace=True)


def _to_value_heads(x: Tensor, R: int, heads: tuple[int, int]) -> Tensor:
    """[B, key heads, ...] -> [B, count, ...]: value head hv reads key head hv // R."""
    first, count = heads
    x = x.unsqueeze(2).expand(-1, -1, R, *x.shape[2:]).flatten(1, 2)
    return x[:, first % R : first % R + count]


def _decay(a: Tensor, A_log: Tensor, dt_bias: Tensor) -> Tensor:
    """exp(-exp(A_log) * softplus(a + dt_bias)), in logarithms so that exp(A_log) cannot overflow to inf * 0."""
    x = a + dt_bias
    # Below -15, log(softplus(x)) is x to float32 precision; there softplus itself would underflow.
    log_softplus = torch.where(x < -15, x, F.softplus(x).log_())
    return (A_log + log_softplus).exp_().neg_().exp_()


def _delta_rule(state: Tensor, qk: Tensor, v: Tensor, beta: Tensor, decay: Tensor) -> Tensor:
    """state <- decay * state + k delta^T, in place; returns o = state^T q. state: [B, HV, DK, DV], any dtype."""
    B, HV, DK, DV = state.shape
    dot = (qk[:, :, 0] * qk[:, :, 1]).sum(-1, keepdim=True)  # q.k, [B, HV, 1]
    k = qk[:, :, 1, :, None]  # [B, HV, DK, 1]
    decay = decay[:, :, None, None]
    foldable = state.stride(0) == HV * state.stride(1)  # several sequences form one batch of heads without a copy
    step = max(1, CHUNK_BYTES // (HV * DK * DV * state.element_size())) if foldable else 1
    o = torch.empty_like(v)
    for i in range(0, B, step):
        chunk = slice(i, i + step)
        stored = state[chunk]
        S = stored.to(v.dtype)  # the state itself when it is in the dtype that we compute in
        S.mul_(decay[chunk])
        r, p = _weighted_rows(qk[chunk], S).unbind(2)  # S^T q, S^T k: [b, HV, DV]
        delta = torch.sub(v[chunk], p).mul_(beta[chunk])
        S.addcmul_(k[chunk], delta.unsqueeze(2))
        torch.addcmul(r, dot[chunk], delta, out=o[chunk])
        if S is not stored:
            stored.copy_(S)
    return o


def _weighted_rows(weights: Tensor, S: Tensor) -> Tensor:
    """S^T w for the two vectors of every head. weights: [b, HV, 2, DK], S: [b, HV, DK, DV] -> [b, HV, 2, DV].

    A batched product of a 2 x DK by a DK x DV matrix packs S before it multiplies. A bag of embeddings, which is a
    weighted sum of rows, streams it instead: 1.8 times faster than torch.bmm where both were measured.
    """
    b, HV, DK, DV = S.shape
    rows, bags = _bags(b * HV, DK, S.device)
    out, *_ = torch.embedding_bag(
        S.view(b * HV * DK, DV), rows, bags, mode=0, per_sample_weights=weights.flatten(), include_last_offset=False
    )
    return out.view(b, HV, 2, DV)


@lru_cache(maxsize=16)
def _bags(heads: int, DK: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Row numbers of each head's state, twice over (once for q, once for k), and where each of these bags starts."""
    rows = torch.arange(heads * DK, dtype=torch.int32, device=device).view(heads, 1, DK).expand(heads, 2, DK)
    return rows.flatten(), torch.arange(0, 2 * heads * DK, DK, dtype=torch.int32, device=device)
