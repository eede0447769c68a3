"""The fused decode step as Triton kernels: JIT code alone. `triton_backend` launches them, `reference` is the law.

One program owns one key head of one sequence: it alone reads and shifts the convolution taps of that head's q and k,
and walks over the R value heads that use them. So no tap is shared between programs, and one launch needs neither
atomics nor scratch. The recurrent state is read once and written once (folded form of the delta rule, eq. 10 of
arXiv:2412.06464 with both products taken from the old state):

    p = S^T k,  r = S^T q,  delta = beta * (v - decay * p),  o = decay * r + (q.k) * delta,  S <- decay * S + k delta^T

Sizes: HK key heads, R value heads a key head, DK x DV state a value head, W convolution taps (the oldest first).
`L` is the `triton_backend.Layout` of a call: all that the kernel is compiled for.
"""

import triton
import triton.language as tl


@triton.jit
def _load(pointer, mask):
    """Loads as float32; `mask` is None where the block fits exactly (a mask would cost a predicate per access)."""
    if mask is None:
        x = tl.load(pointer)
    else:
        x = tl.load(pointer, mask=mask, other=0.0)
    return x.to(tl.float32)


@triton.jit
def _lane(word, i: tl.constexpr, dtype: tl.constexpr):
    """The i-th of the four 16-bit values in a 64-bit word, as float32."""
    return (word >> (16 * i)).to(tl.uint16).to(dtype, bitcast=True).to(tl.float32)


@triton.jit
def _bits(x, i: tl.constexpr, dtype: tl.constexpr):
    """x rounded to a 16-bit dtype, as the i-th 16 bits of a 64-bit word."""
    return x.to(dtype).to(tl.uint16, bitcast=True).to(tl.uint64) << (16 * i)


@triton.jit
def _load_taps(row, channel, channel_stride, tap_stride: tl.constexpr, packed: tl.constexpr, mask, W: tl.constexpr):
    """The W taps of some channels, the newest first, each [channels]; past the W-th, the W-th again.

    Separate loads, or 64 bits a channel when `packed`: a [channels, W] tile would impose its layout on the state tile.
    """
    if packed:
        words = row.to(tl.pointer_type(tl.uint64), bitcast=True) + channel
        if mask is None:
            word = tl.load(words)
        else:
            word = tl.load(words, mask=mask, other=0)
        dtype: tl.constexpr = row.dtype.element_ty
        return _lane(word, 3, dtype), _lane(word, 2, dtype), _lane(word, 1, dtype), _lane(word, 0, dtype)
    else:
        pointer = row + channel * channel_stride
        x1 = _load(pointer + (W - 1) * tap_stride, mask)
        x2 = _load(pointer + (W - 2) * tap_stride, mask)
        x3 = x2
        x4 = x2
        if W >= 3:
            x3 = _load(pointer + (W - 3) * tap_stride, mask)
            x4 = x3
        if W >= 4:
            x4 = _load(pointer + (W - 4) * tap_stride, mask)
        return x1, x2, x3, x4


@triton.jit
def _load_weight(conv_weight, channel, mask, L: tl.constexpr):
    """The convolution's weights of some channels, that of the new token first."""
    return _load_taps(conv_weight, channel, L.weight_channel, L.weight_tap, L.packed_weight, mask, L.W)


@triton.jit
def _store_taps(row, channel, channel_stride, mask, x1, x2, x3, x4, L: tl.constexpr):
    """Writes the W newest inputs of some channels, x1 being the newest: the inverse of `_load_taps`."""
    dtype: tl.constexpr = row.dtype.element_ty
    if L.packed_taps:
        words = row.to(tl.pointer_type(tl.uint64), bitcast=True) + channel
        word = _bits(x4, 0, dtype) | _bits(x3, 1, dtype) | _bits(x2, 2, dtype) | _bits(x1, 3, dtype)
        tl.store(words, word, mask=mask)
    else:
        pointer = row + channel * channel_stride
        tl.store(pointer + (L.W - 1) * L.tap_stride, x1.to(dtype), mask=mask)
        tl.store(pointer + (L.W - 2) * L.tap_stride, x2.to(dtype), mask=mask)
        if L.W >= 3:
            tl.store(pointer + (L.W - 3) * L.tap_stride, x3.to(dtype), mask=mask)
        if L.W >= 4:
            tl.store(pointer + (L.W - 4) * L.tap_stride, x4.to(dtype), mask=mask)


@triton.jit
def _silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def _convolve(x0, x1, x2, x3, w0, w1, w2, w3, W: tl.constexpr):
    """silu of the causal convolution: x0 is the new token, xi the input i tokens ago, wi its weight."""
    y = x0 * w0 + x1 * w1
    if W >= 3:
        y += x2 * w2
    if W >= 4:
        y += x3 * w3
    return _silu(y)


@triton.jit
def _convolve_token(x0, taps, conv_weight, channel, conv_channel, mask, L: tl.constexpr):
    """silu of the convolution of one new token x0, and the four newest inputs, x0 first."""
    x1, x2, x3, _ = _load_taps(taps, channel, conv_channel, L.tap_stride, L.packed_taps, mask, L.W)
    w0, w1, w2, w3 = _load_weight(conv_weight, channel, mask, L)
    return _convolve(x0, x1, x2, x3, w0, w1, w2, w3, L.W), x0, x1, x2, x3


@triton.jit
def _load_qk(q, k, which, cell, mask):
    """q and k of one token and head as a block [2, DK]; `which` is 0 on q's row and 1 on k's."""
    q_mask = which == 0
    k_mask = which == 1
    if mask is not None:
        q_mask = q_mask & mask
        k_mask = k_mask & mask
    return _load(q + cell, q_mask) + _load(k + cell, k_mask)


@triton.jit
def _unit_qk(qk, which, scale):
    """[2, DK] -> q / |q| * scale, k / |k| (the epsilon inside the root, as in Transformers), each [DK], and q.k."""
    qk *= tl.rsqrt(tl.sum(qk * qk, 1) + 1e-6)[:, None]
    q = tl.sum(tl.where(which == 0, qk, 0.0), 0) * scale
    k = tl.sum(tl.where(which == 1, qk, 0.0), 0)
    return q, k, tl.sum(q * k, 0)


@triton.jit
def _gates(b, a, A_log, dt_bias):
    """beta = sigmoid(b) and decay = exp(-exp(A_log) * softplus(a + dt_bias)), scalars in float32."""
    x = a + dt_bias
    u = tl.exp(-tl.abs(x))  # in (0, 1]: softplus(x) = max(x, 0) + log1p(u) cannot overflow
    w = 1.0 + u
    log1p = tl.where(w == 1.0, u, tl.log(w) * (u / (w - 1.0)))  # Kahan: exact where 1 + u rounds
    rate = tl.exp(A_log) * (tl.maximum(x, 0.0) + log1p)
    # There softplus(x) is exp(x) in float32; the product could be inf * 0.
    rate = tl.where(x < -15.0, tl.exp(A_log + x), rate)
    return 1.0 / (1.0 + tl.exp(-b)), tl.exp(-rate)


@triton.jit
def _delta_rule(S, q, k, v, dot, beta, decay):
    """One token on a state tile: S [DK, V], q and k [DK], v [V], dot = q.k; returns the new S and o [V]."""
    p = tl.sum(S * k[:, None], 0)
    r = tl.sum(S * q[:, None], 0)
    delta = beta * (v - decay * p)
    return decay * S + k[:, None] * delta[None, :], decay * r + dot * delta


@triton.jit
def _state_mask(rows, columns, L: tl.constexpr):
    if L.BLOCK_K > L.DK or L.TILES * L.BLOCK_V > L.DV:
        mask = (rows < L.DK)[:, None] & (columns < L.DV)[None, :]
    else:
        mask = None
    return mask


@triton.jit
def _load_state(pointer, rows, columns, left, L: tl.constexpr):
    """A tile [DK, BLOCK_V] in the state's dtype; nothing is read if there is no tile left.

    evict_last: the line stays in the L2 cache until it is written back in place (5 % faster at large batch on an H200).
    """
    mask = _state_mask(rows, columns, L)
    wanted = tl.full([L.BLOCK_K, L.BLOCK_V], left, tl.int32) > 0  # a branch would keep the old tile beside the new
    if mask is None:
        S = tl.load(pointer, mask=wanted, eviction_policy="evict_last")
    else:
        S = tl.load(pointer, mask=mask & wanted, other=0.0, eviction_policy="evict_last")
    return S


@triton.jit
def _store_state(pointer, S, rows, columns, L: tl.constexpr):
    tl.store(pointer, S.to(pointer.dtype.element_ty), mask=_state_mask(rows, columns, L))


@triton.jit
def _gate(z, silu: tl.constexpr):
    """silu(z) or sigmoid(z)."""
    gate = 1.0 / (1.0 + tl.exp(-z))
    if silu:
        gate *= z
    return gate


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
    """One token a sequence. Names ending in _token, _sequence, _channel are strides; `items` is sequences x key heads.

    The state of a value head is walked in tiles [DK, BLOCK_V]; what will be written waits in registers (y) until the
    norm over the whole head is known.
    """
    which = tl.arange(0, 2)[:, None]
    rows = tl.arange(0, L.BLOCK_K)
    columns = tl.arange(0, L.BLOCK_V)
    tiles = tl.arange(0, L.TILES)
    cell = tl.broadcast_to(rows[None, :], [2, L.BLOCK_K])
    head_column = (tiles * L.BLOCK_V)[:, None] + columns[None, :]  # [TILES, BLOCK_V]
    qk_mask = cell < L.DK if L.BLOCK_K > L.DK else None
    head_mask = head_column < L.DV if L.TILES * L.BLOCK_V > L.DV else None
    program = tl.program_id(0)
    stop = items if L.strided else program + 1
    for item in range(program, stop, tl.num_programs(0) if L.strided else 1):
        i = tl.cast(item // L.key_heads, tl.int64)  # the sequence, and its only token; 64 bits as it multiplies strides
        hk = L.first_head // L.R + item % L.key_heads
        # Of this key head's R value heads, those in range; the whole loop is known at compile time where all are.
        begin = tl.maximum(L.first_head - hk * L.R, 0) if L.first_head % L.R else 0
        end = tl.minimum(L.first_head + L.head_count - hk * L.R, L.R) if (L.first_head + L.head_count) % L.R else L.R
        S_first = state + i * state_sequence + hk * (L.R * L.state_head) + (rows * L.DV)[:, None] + columns[None, :]
        if L.prefetch:
            S_next = _load_state(S_first + begin * L.state_head, rows, columns, 1, L)

        taps = conv_state + i * conv_sequence
        qk_channel = (which * L.HK + hk) * L.DK + cell
        qk_conv, qk0, qk1, qk2, qk3 = _convolve_token(
            _load_qk(q + i * q_token + hk * L.q_head, k + i * k_token + hk * L.k_head, which, cell, qk_mask),
            taps,
            conv_weight,
            qk_channel,
            conv_channel,
            qk_mask,
            L,
        )
        # A block of taps is held by several threads at once: none may shift them before all have read them.
        tl.debug_barrier()
        _store_taps(taps, qk_channel, conv_channel, qk_mask, qk0, qk1, qk2, qk3, L)
        q_unit, k_unit, dot = _unit_qk(qk_conv, which, L.scale)

        y = tl.full([L.TILES, L.BLOCK_V], 0.0, tl.float32)
        square = tl.full([L.BLOCK_V], 0.0, tl.float32)  # of o, summed over the tiles of a value head
        for step in range(begin * L.TILES, end * L.TILES):
            r = step // L.TILES
            tile = step % L.TILES
            hv = hk * L.R + r
            column = tile * L.BLOCK_V + columns
            column_mask = column < L.DV if L.TILES * L.BLOCK_V > L.DV else None
            S_pointer = S_first + (r * L.state_head + tile * L.BLOCK_V)
            S = S_next if L.prefetch else _load_state(S_pointer, rows, column, 1, L)
            beta, decay = _gates(
                tl.load(b + i * b_token + hk * L.b_head + r * L.b_value).to(tl.float32),
                tl.load(a + i * a_token + hk * L.a_head + r * L.a_value).to(tl.float32),
                tl.load(A_log + hv).to(tl.float32),
                tl.load(dt_bias + hv).to(tl.float32),
            )
            v_channel = 2 * L.HK * L.DK + hv * L.DV + column
            v_conv, v0, v1, v2, v3 = _convolve_token(
                _load(v + i * v_token + hk * L.v_head + r * L.v_value + column, column_mask),
                taps,
                conv_weight,
                v_channel,
                conv_channel,
                column_mask,
                L,
            )
            # Loaded with the rest: after the state, its latency would stand alone.
            gate = _gate(_load(z + i * z_token + hk * L.z_head + r * L.z_value + column, column_mask), L.silu)
            gate *= _load(norm_weight + column, column_mask)
            tl.debug_barrier()  # as above
            _store_taps(taps, v_channel, conv_channel, column_mask, v0, v1, v2, v3, L)
            S, o = _delta_rule(S.to(tl.float32), q_unit, k_unit, v_conv, dot, beta, decay)
            _store_state(S_pointer, S, rows, column, L)
            if L.prefetch:
                r_next = (step + 1) // L.TILES
                tile_next = (step + 1) % L.TILES * L.BLOCK_V
                S_pointer = S_first + (r_next * L.state_head + tile_next)
                left = end * L.TILES - (step + 1)
                S_next = _load_state(S_pointer, rows, tile_next + columns, left, L)

            square += o * o
            y = tl.where((tiles == tile)[:, None], (o * gate)[None, :], y) if L.TILES > 1 else (o * gate)[None, :]
            if tile == L.TILES - 1:
                y_head = y * tl.rsqrt(tl.sum(square, 0) / L.DV + L.eps)
                square = tl.full([L.BLOCK_V], 0.0, tl.float32)
                y_pointer = out + i * (L.head_count * L.DV) + (hv - L.first_head) * L.DV + head_column
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
    which = tl.arange(0, 2)[:, None]
    rows = tl.arange(0, L.BLOCK_K)
    columns = tl.arange(0, L.BLOCK_V)
    cell = tl.broadcast_to(rows[None, :], [2, L.BLOCK_K])
    qk_mask = cell < L.DK if L.BLOCK_K > L.DK else None
    column_mask = columns < L.DV if L.BLOCK_V > L.DV else None
    weight = _load(norm_weight + columns, column_mask)
    program = tl.program_id(0)
    stop = items if L.strided else program + 1
    for item in range(program, stop, tl.num_programs(0) if L.strided else 1):
        i = tl.cast(item // L.key_heads, tl.int64)
        hk = L.first_head // L.R + item % L.key_heads
        taps = conv_state + i * conv_sequence
        qk_channel = (which * L.HK + hk) * L.DK + cell
        if cu_seqlens is None:
            begin = i * tokens
            end = begin + tokens
        else:
            begin = tl.load(cu_seqlens + i).to(tl.int64)
            end = tl.load(cu_seqlens + i + 1).to(tl.int64)

        first = tl.maximum(hk * L.R, L.first_head)
        last = tl.minimum(hk * L.R + L.R, L.first_head + L.head_count) - 1
        last = tl.where(begin < end, last, first - 1)  # no token: nothing is touched
        for hv in range(first, last + 1):
            r = hv - hk * L.R
            v_channel = 2 * L.HK * L.DK + hv * L.DV + columns
            S_pointer = state + i * state_sequence + hv * L.state_head + (rows * L.DV)[:, None] + columns[None, :]
            S = _load_state(S_pointer, rows, columns, 1, L).to(tl.float32)
            qk1, qk2, qk3, qk4 = _load_taps(taps, qk_channel, conv_channel, L.tap_stride, L.packed_taps, qk_mask, L.W)
            qkw0, qkw1, qkw2, qkw3 = _load_weight(conv_weight, qk_channel, qk_mask, L)
            v1, v2, v3, v4 = _load_taps(taps, v_channel, conv_channel, L.tap_stride, L.packed_taps, column_mask, L.W)
            vw0, vw1, vw2, vw3 = _load_weight(conv_weight, v_channel, column_mask, L)
            rate = tl.load(A_log + hv).to(tl.float32)
            bias = tl.load(dt_bias + hv).to(tl.float32)
            for token in range(begin, end):
                t = tl.cast(token, tl.int64)
                qk0 = _load_qk(q + t * q_token + hk * L.q_head, k + t * k_token + hk * L.k_head, which, cell, qk_mask)
                v0 = _load(v + t * v_token + hk * L.v_head + r * L.v_value + columns, column_mask)
                z0 = _load(z + t * z_token + hk * L.z_head + r * L.z_value + columns, column_mask)
                beta, decay = _gates(
                    tl.load(b + t * b_token + hk * L.b_head + r * L.b_value).to(tl.float32),
                    tl.load(a + t * a_token + hk * L.a_head + r * L.a_value).to(tl.float32),
                    rate,
                    bias,
                )
                qk = _convolve(qk0, qk1, qk2, qk3, qkw0, qkw1, qkw2, qkw3, L.W)
                q_unit, k_unit, dot = _unit_qk(qk, which, L.scale)
                v_conv = _convolve(v0, v1, v2, v3, vw0, vw1, vw2, vw3, L.W)
                S, o = _delta_rule(S, q_unit, k_unit, v_conv, dot, beta, decay)
                y = o * tl.rsqrt(tl.sum(o * o, 0) / L.DV + L.eps) * weight * _gate(z0, L.silu)
                y_pointer = out + t * (L.head_count * L.DV) + (hv - L.first_head) * L.DV + columns
                tl.store(y_pointer, y.to(out.dtype.element_ty), mask=column_mask)
                qk1, qk2, qk3, qk4 = qk0, qk1, qk2, qk3
                v1, v2, v3, v4 = v0, v1, v2, v3

            _store_state(S_pointer, S, rows, columns, L)
            # A block of taps is held by several threads at once: none may shift them before all have read them.
            tl.debug_barrier()
            _store_taps(taps, v_channel, conv_channel, column_mask, v1, v2, v3, v4, L)
            if hv == last:  # the other value heads have read q's and k's taps
                _store_taps(taps, qk_channel, conv_channel, qk_mask, qk1, qk2, qk3, qk4, L)
