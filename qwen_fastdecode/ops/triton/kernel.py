"""The fused decode step as Triton kernels: JIT code alone. `launch` has their launcher, `reference` is the law.

One program owns one key head of one sequence: it alone reads and shifts the convolution taps of that head's q and k,
and walks over the R value heads that use them. So no tap is shared between programs, and one launch needs neither
atomics nor scratch. The recurrent state is read once and written once (folded form of the delta rule, eq. 10 of
arXiv:2412.06464 with both products taken from the old state):

    p = S^T k,  r = S^T q,  delta = beta * (v - decay * p),  o = decay * r + (q.k) * delta,  S <- decay * S + k delta^T

Sizes: HK key heads, R value heads a key head, DK x DV state a value head, W convolution taps (the oldest first).
`L` is the `layout.Layout` of a call: all that the kernel is compiled for. Arguments whose names end in _token,
_sequence or _channel are strides; `items` is sequences x key heads.
"""

import triton
import triton.language as tl

from .parts import (
    activation,
    before_range,
    convolve,
    convolve_token,
    delta_rule,
    gates,
    load,
    load_qk,
    load_state,
    load_taps,
    load_weight,
    state_words,
    store_state,
    store_taps,
    unit_qk,
)


@triton.jit(
    do_not_specialize=["items", "tokens", "b_token", "a_token"],
    do_not_specialize_on_alignment=["b", "a", "A_log", "dt_bias", "cu_seqlens"],
)
def decode_token(
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
    """One token a sequence.

    The state of a value head is walked in tiles [DK, BLOCK_V]; what will be written waits in registers (y) until the
    norm over the whole head is known.
    """
    index: tl.constexpr = tl.int64 if L.wide else tl.int32  # what multiplies the strides within a token or a sequence
    which = tl.arange(0, 2)[:, None].to(index)
    rows = tl.arange(0, L.BLOCK_K)
    columns = tl.arange(0, L.BLOCK_V).to(index)
    PAIR: tl.constexpr = 2 if L.pairs else 1  # numbers of the state in a word of its tiles
    words = tl.arange(0, L.BLOCK_V // PAIR).to(index)
    states = state_words(state, L)
    tiles = tl.arange(0, L.TILES)
    cell = tl.broadcast_to(rows[None, :], [2, L.BLOCK_K]).to(index)
    head_column = (tiles * L.BLOCK_V)[:, None] + columns[None, :]  # [TILES, BLOCK_V]
    qk_mask = cell < L.DK if L.BLOCK_K > L.DK else None
    head_mask = head_column < L.DV if L.TILES * L.BLOCK_V > L.DV else None
    if L.skipped:  # the tensors begin at the first key head of the range
        q, k, v, z, b, a = before_range(q, k, v, z, b, a, L)
    program = tl.program_id(0)
    stop = items if L.strided else program + 1
    for item in range(program, stop, tl.num_programs(0) if L.strided else 1):
        i = tl.cast(item // L.key_heads, tl.int64)  # the sequence, and its only token; 64 bits as it multiplies strides
        hk = tl.cast(L.first_key_head + item % L.key_heads, index)
        sequence = i * (state_sequence // PAIR) if L.pairs else i * state_sequence
        key_head = hk * (L.R * L.state_head // PAIR)
        S_first = states + sequence + key_head + (rows * (L.DV // PAIR))[:, None] + words[None, :]
        if L.prefetch:
            S_next = load_state(S_first, rows, words, 1, L)

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
        # A block of taps is held by several threads at once: none may shift them before all have read them.
        tl.debug_barrier()
        store_taps(taps, qk_channel, conv_channel, qk_mask, qk0, qk1, qk2, qk3, L)
        q_unit, k_unit, dot = unit_qk(qk_conv, which, L.scale)

        y = tl.full([L.TILES, L.BLOCK_V], 0.0, tl.float32)
        square = tl.full([L.BLOCK_V], 0.0, tl.float32)  # of o, summed over the tiles of a value head
        for step in range(L.R * L.TILES):
            r = tl.cast(step // L.TILES, index)
            tile = step % L.TILES
            hv = hk * L.R + r
            column = tile * L.BLOCK_V + columns
            column_mask = column < L.DV if L.TILES * L.BLOCK_V > L.DV else None
            word = tile * (L.BLOCK_V // PAIR) + words if L.pairs else column
            S_pointer = S_first + (r * (L.state_head // PAIR) + tile * (L.BLOCK_V // PAIR))
            S = S_next if L.prefetch else load_state(S_pointer, rows, word, 1, L)
            beta, decay = gates(
                tl.load(b + i * b_token + hk * L.b_head + r * L.b_value).to(tl.float32),
                tl.load(a + i * a_token + hk * L.a_head + r * L.a_value).to(tl.float32),
                tl.load(A_log + hv).to(tl.float32),
                tl.load(dt_bias + hv).to(tl.float32),
                L.beta_scale,
            )
            v_channel = 2 * L.HK * L.DK + hv * L.DV + column
            v_conv, v0, v1, v2, v3 = convolve_token(
                load(v + i * v_token + hk * L.v_head + r * L.v_value + column, column_mask),
                taps,
                conv_weight,
                v_channel,
                conv_channel,
                column_mask,
                L,
            )
            # Loaded with the rest: after the state, its latency would stand alone.
            gate = activation(load(z + i * z_token + hk * L.z_head + r * L.z_value + column, column_mask), L.silu)
            gate *= load(norm_weight + column, column_mask)
            tl.debug_barrier()  # as above
            store_taps(taps, v_channel, conv_channel, column_mask, v0, v1, v2, v3, L)
            S, o = delta_rule(S, q_unit, k_unit, v_conv, dot, beta, decay, L)
            store_state(S_pointer, S, rows, word, L)
            if L.prefetch:
                r_next = tl.cast((step + 1) // L.TILES, index)
                tile_next = (step + 1) % L.TILES * (L.BLOCK_V // PAIR)
                S_pointer = S_first + (r_next * (L.state_head // PAIR) + tile_next)
                left = L.R * L.TILES - (step + 1)
                S_next = load_state(S_pointer, rows, tile_next + words, left, L)

            square += o * o
            y = tl.where((tiles == tile)[:, None], (o * gate)[None, :], y) if L.TILES > 1 else (o * gate)[None, :]
            if tile == L.TILES - 1:
                y_head = y * tl.rsqrt(tl.sum(square, 0) / L.DV + L.eps)
                square = tl.full([L.BLOCK_V], 0.0, tl.float32)
                y_pointer = out + i * (L.key_heads * L.R * L.DV) + (hv - L.first_key_head * L.R) * L.DV + head_column
                tl.store(y_pointer, y_head.to(out.dtype.element_ty), mask=head_mask)


@triton.jit(
    do_not_specialize=["items", "tokens", "b_token", "a_token"],
    do_not_specialize_on_alignment=["b", "a", "A_log", "dt_bias", "cu_seqlens"],
)
def decode_tokens(
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
    """Any number of tokens a sequence: `tokens` each, or those between two entries of cu_seqlens.

    State and taps of a value head stay in registers over its tokens, so a tile is the whole head: the norm of o is
    needed at each token. q and k are convolved again for each value head, which is cheaper than keeping them.
    """
    index: tl.constexpr = tl.int64 if L.wide else tl.int32  # what multiplies the strides within a token or a sequence
    which = tl.arange(0, 2)[:, None].to(index)
    rows = tl.arange(0, L.BLOCK_K)
    columns = tl.arange(0, L.BLOCK_V).to(index)
    cell = tl.broadcast_to(rows[None, :], [2, L.BLOCK_K]).to(index)
    qk_mask = cell < L.DK if L.BLOCK_K > L.DK else None
    column_mask = columns < L.DV if L.BLOCK_V > L.DV else None
    weight = load(norm_weight + columns, column_mask)
    if L.skipped:  # the tensors begin at the first key head of the range
        q, k, v, z, b, a = before_range(q, k, v, z, b, a, L)
    program = tl.program_id(0)
    stop = items if L.strided else program + 1
    for item in range(program, stop, tl.num_programs(0) if L.strided else 1):
        i = tl.cast(item // L.key_heads, tl.int64)
        hk = tl.cast(L.first_key_head + item % L.key_heads, index)
        taps = conv_state + i * conv_sequence
        qk_channel = (which * L.HK + hk) * L.DK + cell
        if cu_seqlens is None:
            begin = i * tokens
            end = begin + tokens
        else:
            begin = tl.load(cu_seqlens + i).to(tl.int64)
            end = tl.load(cu_seqlens + i + 1).to(tl.int64)

        values = tl.where(begin < end, L.R, 0)  # no token: nothing is touched
        for value in range(values):
            r = tl.cast(value, index)
            hv = hk * L.R + r
            v_channel = 2 * L.HK * L.DK + hv * L.DV + columns
            S_pointer = state + i * state_sequence + hv * L.state_head + (rows * L.DV)[:, None] + columns[None, :]
            S = load_state(S_pointer, rows, columns, 1, L).to(tl.float32)
            qk1, qk2, qk3, qk4 = load_taps(taps, qk_channel, conv_channel, L.tap_stride, L.packed_taps, qk_mask, L.W)
            qkw0, qkw1, qkw2, qkw3 = load_weight(conv_weight, qk_channel, qk_mask, L)
            v1, v2, v3, v4 = load_taps(taps, v_channel, conv_channel, L.tap_stride, L.packed_taps, column_mask, L.W)
            vw0, vw1, vw2, vw3 = load_weight(conv_weight, v_channel, column_mask, L)
            rate = tl.load(A_log + hv).to(tl.float32)
            bias = tl.load(dt_bias + hv).to(tl.float32)
            for token in range(begin, end):
                t = tl.cast(token, tl.int64)
                qk0 = load_qk(q + t * q_token + hk * L.q_head, k + t * k_token + hk * L.k_head, which, cell, qk_mask)
                v0 = load(v + t * v_token + hk * L.v_head + r * L.v_value + columns, column_mask)
                z0 = load(z + t * z_token + hk * L.z_head + r * L.z_value + columns, column_mask)
                beta, decay = gates(
                    tl.load(b + t * b_token + hk * L.b_head + r * L.b_value).to(tl.float32),
                    tl.load(a + t * a_token + hk * L.a_head + r * L.a_value).to(tl.float32),
                    rate,
                    bias,
                    L.beta_scale,
                )
                qk = convolve(qk0, qk1, qk2, qk3, qkw0, qkw1, qkw2, qkw3, L.W)
                q_unit, k_unit, dot = unit_qk(qk, which, L.scale)
                v_conv = convolve(v0, v1, v2, v3, vw0, vw1, vw2, vw3, L.W)
                S, o = delta_rule(S, q_unit, k_unit, v_conv, dot, beta, decay, L)
                y = o * tl.rsqrt(tl.sum(o * o, 0) / L.DV + L.eps) * weight * activation(z0, L.silu)
                y_pointer = out + t * (L.key_heads * L.R * L.DV) + (hv - L.first_key_head * L.R) * L.DV + columns
                tl.store(y_pointer, y.to(out.dtype.element_ty), mask=column_mask)
                qk1, qk2, qk3, qk4 = qk0, qk1, qk2, qk3
                v1, v2, v3, v4 = v0, v1, v2, v3

            store_state(S_pointer, S, rows, columns, L)
            # A block of taps is held by several threads at once: none may shift them before all have read them.
            tl.debug_barrier()
            store_taps(taps, v_channel, conv_channel, column_mask, v1, v2, v3, v4, L)
            if value == L.R - 1:  # the other value heads have read q's and k's taps
                store_taps(taps, qk_channel, conv_channel, qk_mask, qk1, qk2, qk3, qk4, L)
