"""The decode step with a program a value head, for few sequences: JIT code alone, like `kernel`.

With a program a key head, most of a GPU is idle at small batches. Here the R programs of a key head read the same taps
of q and k, so none may shift them before all have read them: they are launched as a thread block cluster (`clusters`),
and pass its barrier in between. That needs no memory beside the step's own, so that steps on other streams, and those
of captured graphs, have nothing to share.

In the interpreter programs run one after the other, and the last of a key head is the one that shifts.
"""

import triton
import triton.language as tl

from . import barrier
from .parts import (
    activation,
    before_range,
    convolve_token,
    delta_rule,
    gates,
    load,
    load_qk,
    load_state,
    state_words,
    store_state,
    store_taps,
    unit_qk,
)


@triton.jit(
    do_not_specialize=["items", "tokens", "b_token", "a_token"],
    do_not_specialize_on_alignment=["b", "a", "A_log", "dt_bias", "cu_seqlens"],
)
def decode_value_head(
    q,
    k,
    v,
    z,
    b,
    a,
    conv_state,
    state,
    conv_weight,
    A_log,
    dt_bias,
    norm_weight,
    cu_seqlens,
    out,
    items,
    tokens,
    q_token,
    k_token,
    v_token,
    z_token,
    b_token,
    a_token,
    conv_sequence,
    conv_channel,
    state_sequence,
    L: tl.constexpr,
):
    """One token a sequence. A tile is a whole value head: its state, which is needed last, is asked for first."""
    index: tl.constexpr = tl.int64 if L.wide else tl.int32  # what multiplies the strides within a token or a sequence
    which = tl.arange(0, 2)[:, None].to(index)
    rows = tl.arange(0, L.BLOCK_K)
    columns = tl.arange(0, L.BLOCK_V).to(index)
    PAIR: tl.constexpr = 2 if L.pairs else 1  # numbers of the state in a word of its tiles
    words = tl.arange(0, L.BLOCK_V // PAIR).to(index)
    cell = tl.broadcast_to(rows[None, :], [2, L.BLOCK_K]).to(index)
    qk_mask = cell < L.DK if L.BLOCK_K > L.DK else None
    column_mask = columns < L.DV if L.BLOCK_V > L.DV else None
    if L.skipped:  # the tensors begin at the first key head of the range
        q, k, v, z, b, a = before_range(q, k, v, z, b, a, L)
    item = tl.program_id(0) // L.R
    i = tl.cast(item // L.key_heads, tl.int64)  # the sequence, and its only token; 64 bits as it multiplies strides
    hk = tl.cast(L.first_key_head + item % L.key_heads, index)
    r = tl.cast(tl.program_id(0) % L.R, index)
    hv = hk * L.R + r

    sequence = i * (state_sequence // PAIR) if L.pairs else i * state_sequence
    head = hv * (L.state_head // PAIR)
    S_pointer = state_words(state, L) + sequence + head + (rows * (L.DV // PAIR))[:, None] + words[None, :]
    S = load_state(S_pointer, rows, words, 1, L)

    taps = conv_state + i * conv_sequence
    qk_channel = (which * L.HK + hk) * L.DK + cell
    qk_conv, qk0, qk1, qk2, qk3 = convolve_token(
        load_qk(q + i * q_token + hk * L.q_head, k + i * k_token + hk * L.k_head, which, cell, qk_mask),
        taps,
        conv_weight,
        qk_channel,
        conv_channel,
        qk_mask,
        L,
    )
    v_channel = 2 * L.HK * L.DK + hv * L.DV + columns
    v_conv, v0, v1, v2, v3 = convolve_token(
        load(v + i * v_token + hk * L.v_head + r * L.v_value + columns, column_mask),
        taps,
        conv_weight,
        v_channel,
        conv_channel,
        column_mask,
        L,
    )
    beta, decay = gates(
        tl.load(b + i * b_token + hk * L.b_head + r * L.b_value).to(tl.float32),
        tl.load(a + i * a_token + hk * L.a_head + r * L.a_value).to(tl.float32),
        tl.load(A_log + hv).to(tl.float32),
        tl.load(dt_bias + hv).to(tl.float32),
        L.beta_scale,
    )
    gate = activation(load(z + i * z_token + hk * L.z_head + r * L.z_value + columns, column_mask), L.silu)
    gate *= load(norm_weight + columns, column_mask)
    q_unit, k_unit, dot = unit_qk(qk_conv, which, L.scale)
    # A block of taps is held by several threads at once, and q's and k's by several programs.
    barrier.arrive(L.R, L.nvidia)
    S, o = delta_rule(S, q_unit, k_unit, v_conv, dot, beta, decay, L)
    store_state(S_pointer, S, rows, words, L)
    y = o * gate * tl.rsqrt(tl.sum(o * o, 0) / L.DV + L.eps)
    y_pointer = out + i * (L.key_heads * L.R * L.DV) + (hv - L.first_key_head * L.R) * L.DV + columns
    tl.store(y_pointer, y.to(out.dtype.element_ty), mask=column_mask)
    barrier.wait(L.nvidia)
    store_taps(taps, v_channel, conv_channel, column_mask, v0, v1, v2, v3, L)
    if r == L.R - 1:
        store_taps(taps, qk_channel, conv_channel, qk_mask, qk0, qk1, qk2, qk3, L)
