"""The decode step in PyTorch, in place: one read and one write of the recurrent state, no temporary of its size.

Runs anywhere PyTorch runs. The state is walked in chunks small enough to stay in a core's cache between the four
passes over a chunk (decay, S^T k, rank-one update, S^T q), so that memory sees each element once. Around them are some
thirty operators on small tensors, whose dispatch is half of the time of a step at batch 1: hence their small number,
and inference mode, which spares each of them autograd's bookkeeping.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .prepared import Prepared
from .step import Recipe, States, Step, Tokens, Weights, check_step

CHUNK_ELEMENTS = 1 << 19  # of recurrent state: 2 MB in float32


def decode_torch(step: Step, recipe: Recipe) -> Tensor:
    """Computes in float32 (float64 for float64 activations); returns [N, count * DV] in the dtype of v.

    Several tokens a sequence are worked off one after another, sequence by sequence. Raises UnsupportedStep.
    """
    decode, dtype = _prepared.find(step, recipe)
    with torch.inference_mode():
        out = decode(step)
    return out.to(dtype, copy=True)  # made out here it is an ordinary tensor, free for any use


def _prepare(step: Step, recipe: Recipe) -> tuple[Callable[[Step], Tensor], torch.dtype]:
    s = check_step(step, recipe)
    key_heads = s.key_heads(recipe)
    narrow = step.tokens.q.shape[1] > key_heads[1]
    one_token = step.cu_seqlens is None and s.N == s.B
    every = s.N // s.B

    def decode(step: Step) -> Tensor:
        tokens, (conv_state, recurrent), weights = step.tokens, step.states, step.weights
        if narrow:
            tokens = Tokens(*(x.narrow(1, *key_heads) for x in tokens))
        states = States(conv_state, recurrent.narrow(1, *recipe.heads))  # all taps, [B, count, DK, DV]
        if weights.conv.dim() == 3:
            weights = weights._replace(conv=weights.conv.squeeze(1))
        if one_token:
            return _decode_token(tokens, states, weights, recipe)
        cu_seqlens = step.cu_seqlens
        bounds = [i * every for i in range(s.B + 1)] if cu_seqlens is None else cu_seqlens.tolist()
        return _decode_sequences(tokens, states, weights, recipe, bounds)

    return decode, step.tokens.v.dtype


_prepared = Prepared(_prepare)


def _decode_sequences(tokens: Tokens, states: States, weights: Weights, recipe: Recipe, bounds: list[int]) -> Tensor:
    """Sequence i owns tokens bounds[i] to bounds[i + 1]; returns [N, count * DV] in the dtype that we compute in."""
    v, (conv, recurrent) = tokens.v, states
    dtype = _compute_dtype(v)
    out = v.new_empty(v.shape[0], recurrent.shape[1] * recurrent.shape[3], dtype=dtype)
    for i, begin in enumerate(bounds[:-1]):
        stored = States(conv[i : i + 1], recurrent[i : i + 1])
        # Rounded to the states' own dtypes once, after the last token. Taps are copied in and out: the inputs of the
        # last W tokens, which have the activations' dtype, are then the very values that came.
        own = States(*(x.to(torch.promote_types(x.dtype, dtype)) for x in stored))
        for t in range(begin, bounds[i + 1]):
            token = Tokens(*(x[t : t + 1] for x in tokens))
            out[t] = _decode_token(token, own, weights, recipe)
        for x, y in zip(stored, own, strict=True):
            if x is not y and begin < bounds[i + 1]:
                x.copy_(y)
    return out


def _compute_dtype(v: Tensor) -> torch.dtype:
    return torch.promote_types(v.dtype, torch.float32)


def _decode_token(tokens: Tokens, states: States, weights: Weights, recipe: Recipe) -> Tensor:
    """One token a sequence; tokens of the recipe's key heads, all taps, recurrent states [B, count, DK, DV] of its
    value heads. Returns [B, count * DV]."""
    q, _, v, z, b, a = tokens
    A_log, dt_bias, DK, DV = weights.A_log, weights.dt_bias, q.shape[2], v.shape[3]
    if recipe.heads[1] < A_log.shape[0]:
        A_log, dt_bias = A_log.narrow(0, *recipe.heads), dt_bias.narrow(0, *recipe.heads)
    beta = torch.sigmoid(b.to(_compute_dtype(v))).flatten(1)  # [B, count], as decay
    if recipe.beta_scale != 1.0:
        beta.mul_(recipe.beta_scale)
    decay = _decay(a.to(_compute_dtype(v)).flatten(1), A_log, dt_bias)
    o = _attend(tokens, states, weights.conv, beta, decay, recipe)  # [B, count, DV]

    # q was not scaled by 1 / sqrt(DK): the norm undoes any scale of o, if its epsilon is scaled as well.
    o.div_(_length(o, recipe.eps * DK * DV).mul_(DV**-0.5)).mul_(weights.norm)
    z = z.to(o.dtype)
    o.view(z.shape).mul_(F.silu(z) if recipe.gate == "silu" else torch.sigmoid(z))
    return o.flatten(1)


def _attend(tokens: Tokens, states: States, conv_weight: Tensor, beta: Tensor, decay: Tensor, recipe: Recipe) -> Tensor:
    """Convolution, unit lengths, delta rule; updates both states and returns o, [B, count, DV]."""
    qk, v = _convolve(tokens, states.conv, conv_weight, recipe)  # [B, 2, key heads, DK], [B, count, DV]
    qk.div_(_length(qk, 1e-6))
    R = v.shape[1] // qk.shape[2]
    qk = qk.unsqueeze(3).expand(-1, -1, -1, R, -1).flatten(2, 3)  # [B, 2, count, DK]
    return _delta_rule(states.recurrent, qk, v, beta.unsqueeze(2), decay.view(*decay.shape, 1, 1))


def _convolve(tokens: Tokens, conv_state: Tensor, weight: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """silu(conv) of some value heads, v [B, count, DV], and of the key heads that they read, q and k [B, 2, ..., DK].

    Shifts the new token into the taps of their channels.
    """
    q, k, v = tokens[:3]
    (B, key_heads, DK), (R, DV), (first, count) = q.shape, v.shape[2:], recipe.heads
    HK = weight.shape[0] // (2 * DK + R * DV)
    if count == HK * R:
        x = torch.cat((torch.cat((q, k), dim=1).flatten(1), v.flatten(1)), dim=1)  # [B, C]
        taps = _shift(conv_state, x)
        x = x.to(_compute_dtype(x))
        y = _convolve_channels_(x, taps, weight)
    else:
        starts = first // R * DK, (HK + first // R) * DK, 2 * HK * DK + first * DV
        spans = zip((q, k, v), starts, strict=True)
        y = torch.cat([_convolve_span(x, conv_state, weight, start) for x, start in spans], dim=1)
    key = y.shape[1] - count * DV
    return y.narrow(1, 0, key).view(B, 2, key_heads, DK), y.narrow(1, key, count * DV).view(B, count, DV)


def _convolve_span(x: Tensor, conv_state: Tensor, weight: Tensor, start: int) -> Tensor:
    """The same for the channels from `start` on. x: [B, heads, DK or (R, DV)] -> [B, channels]."""
    x = x.flatten(1)
    span = start, x.shape[1]
    taps = _shift(conv_state.narrow(1, *span), x)
    return _convolve_channels_(x.to(_compute_dtype(x), copy=True), taps, weight.narrow(0, *span))


def _shift(conv_state: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    """Each tap [B, channels, W] takes the place of the next older one; x [B, channels] becomes the newest of them."""
    taps = conv_state.unbind(2)
    if _are_words(conv_state):
        conv_state.view(torch.int64).bitwise_right_shift_(8 * conv_state.element_size())
    else:
        for older, newer in pairwise(taps):
            older.copy_(newer)
    taps[-1].copy_(x)
    return taps


def _are_words(conv_state: Tensor) -> bool:
    """Whether a channel's taps are a 64-bit word with the oldest in its lowest bits (four of 16 bits, as usual)."""
    W = conv_state.shape[2]
    starts = conv_state.storage_offset(), conv_state.stride(0), conv_state.stride(1)
    fits = conv_state.stride(2) == 1 and W * conv_state.element_size() == 8
    return fits and sys.byteorder == "little" and not any(start % W for start in starts)


def _convolve_channels_(x: Tensor, taps: tuple[Tensor, ...], weight: Tensor) -> Tensor:
    """Turns x [B, channels], the newest of the taps in the dtype that we compute in, into silu(conv).

    One tap at a time: all of them in float32 would take a fifth of the memory of the recurrent state.
    """
    weights = weight.unbind(1)
    x.mul_(weights[-1])
    for tap, w in zip(taps[:-1], weights[:-1], strict=True):
        x.addcmul_(tap, w)
    return F.silu(x, inplace=True)


def _length(x: Tensor, eps: float) -> Tensor:
    """sqrt(sum x^2 + eps) over the last dimension, which is kept."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot_(_constant(eps**0.5, x.dtype, x.device))


def _decay(a: Tensor, A_log: Tensor, dt_bias: Tensor) -> Tensor:
    """exp(-exp(A_log) * softplus(a + dt_bias)), in logarithms so that exp(A_log) cannot overflow to inf * 0."""
    x = a + dt_bias
    # log(softplus(x)) is below x, and equals it to float32 precision below -15, where softplus nears its underflow.
    log_softplus = torch.minimum(x, F.softplus(x).clamp_min_(3e-7).log_())  # 3e-7 is softplus(-15)
    return log_softplus.add_(A_log).exp_().neg_().exp_()


def _delta_rule(state: Tensor, qk: Tensor, v: Tensor, beta: Tensor, decay: Tensor) -> Tensor:
    """state <- decay * state + k delta^T, in place; returns o = state^T q, [B, HV, DV].

    state: [B, HV, DK, DV] of any dtype, qk: [B, 2, HV, DK], v: [B, HV, DV], beta: [B, HV, 1], decay: [B, HV, 1, 1].
    """
    B, HV, DK, DV = state.shape
    # Several sequences are worked on in place only where no other memory lies between their states.
    chunk = max(1, CHUNK_ELEMENTS // (HV * DK * DV)) if state.is_contiguous() else 1
    if chunk < B:
        chunks = zip(*(x.split(chunk) for x in (state, qk, v, beta, decay)), strict=True)
        return torch.cat([_delta_rule(*arguments) for arguments in chunks])

    S = state.to(v.dtype).contiguous()  # the state itself wherever it can be
    q, k = qk.unbind(1)
    S.mul_(decay)
    delta = torch.sub(v, _weighted_rows(k, S)).mul_(beta)
    S.addcmul_(k.unsqueeze(3), delta.unsqueeze(2))
    if S is not state:
        state.copy_(S)
    return _weighted_rows(q, S)


def _weighted_rows(x: Tensor, S: Tensor) -> Tensor:
    """S^T x of every head. x: [B, HV, DK], S: [B, HV, DK, DV] -> [B, HV, DV].

    A batched product of a vector and a DK x DV matrix packs S before it multiplies. A bag of embeddings, which is a
    weighted sum of rows, streams it instead: 1.8 times faster than torch.bmm where both were measured.
    """
    B, HV, DK, DV = S.shape
    rows, bags = _bags(B * HV, DK, S.device)
    out, *_ = torch.embedding_bag(S.view(-1, DV), rows, bags, mode=0, per_sample_weights=x.reshape(-1))
    return out.view(B, HV, DV)


def _kept(make: Callable[..., Any]) -> Callable[..., Any]:
    """Keeps what `make` returned for the last few arguments; under FakeTensorMode nothing is kept, or found."""
    found: dict[Any, Any] = {}

    @wraps(make)
    def get(*arguments: Any) -> Any:
        if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
            return make(*arguments)
        made = found.get(arguments)
        if made is None:
            if len(found) >= 16:
                found.clear()
            made = found[arguments] = make(*arguments)
        return made

    return get


@_kept
def _bags(heads: int, DK: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Row numbers of all heads' states, and where the bag of each head starts."""
    rows = torch.arange(heads * DK, dtype=torch.int32, device=device)
    return rows, rows[::DK].contiguous()


@_kept
def _constant(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(value, dtype=dtype, device=device)
