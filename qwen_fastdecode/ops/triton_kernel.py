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
def _convolve_token(pointer, taps, conv_weight, channel, conv_channel, mask, L: tl.constexpr):
    """One new token through the convolution; returns it and the four newest inputs, the new one first."""
    x1, x2, x3, _ = _load_taps(taps, channel, conv_channel, L.tap_stride, L.packed_taps, mask, L.W)
    w0, w1, w2, w3 = _load_weight(conv_weight, channel, mask, L)
    x0 = _load(pointer, mask)
    return _convolve(x0, x1, x2, x3, w0, w1, w2, w3, L.W), x0, x1, x2, x3


@triton.jit
def _normalise(x):
    """x / |x|, the epsilon inside the square root as Transformers has it."""
    return x * tl.rsqrt(tl.sum(x * x, 0) + 1e-6)


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
def _gate_norm(o, z, weight, square_mean, eps, silu: tl.constexpr):
    """Gated RMSNorm: weight * o / rms(o) * (silu or sigmoid)(z)."""
    gate = 1.0 / (1.0 + tl.exp(-z))
    if silu:
        gate *= z
    return o * tl.rsqrt(square_mean + eps) * weight * gate


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

    The state of a value head is walked in tiles [DK, BLOCK_V]; o waits in registers until its norm is known.
    """
    rows = tl.arange(0, L.BLOCK_K)
    columns = tl.arange(0, L.BLOCK_V)
    tiles = tl.arange(0, L.TILES)
    row_mask = rows < L.DK if L.BLOCK_K > L.DK else None
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        i = tl.cast(item // L.key_heads, tl.int64)  # the sequence, and its only token; 64 bits as it multiplies strides
        hk = L.first // L.R + item % L.key_heads
        taps = conv_state + i * conv_sequence
        q_channel = hk * L.DK + rows
        k_channel = L.HK * L.DK + q_channel

        q_conv, q0, q1, q2, q3 = _convolve_token(
            q + i * q_token + hk * L.q_head + rows, taps, conv_weight, q_channel, conv_channel, row_mask, L
        )
        k_conv, k0, k1, k2, k3 = _convolve_token(
            k + i * k_token + hk * L.k_head + rows, taps, conv_weight, k_channel, conv_channel, row_mask, L
        )
        q_unit = _normalise(q_conv) * L.scale
        k_unit = _normalise(k_conv)
        dot = tl.sum(q_unit * k_unit, 0)

        for hv in range(tl.maximum(hk * L.R, L.first), tl.minimum(hk * L.R + L.R, L.first + L.count)):
            r = hv - hk * L.R
            beta, decay = _gates(
                tl.load(b + i * b_token + hk * L.b_head + r * L.b_value).to(tl.float32),
                tl.load(a + i * a_token + hk * L.a_head + r * L.a_value).to(tl.float32),
                tl.load(A_log + hv).to(tl.float32),
                tl.load(dt_bias + hv).to(tl.float32),
            )
            o = tl.full([L.TILES, L.BLOCK_V], 0.0, tl.float32)
            for tile in range(L.TILES):
                column = tile * L.BLOCK_V + columns
                column_mask = column < L.DV if L.TILES * L.BLOCK_V > L.DV else None
                mask = None
                if row_mask is not None or column_mask is not None:
                    mask = (rows < L.DK)[:, None] & (column < L.DV)[None, :]
                S_pointer = state + i * state_sequence + hv * L.state_head
                S_pointer = S_pointer + (rows * L.DV)[:, None] + column[None, :]
                S = _load(S_pointer, mask)

                v_channel = 2 * L.HK * L.DK + hv * L.DV + column
                v_pointer = v + i * v_token + hk * L.v_head + r * L.v_value + column
                v_conv, v0, v1, v2, v3 = _convolve_token(
                    v_pointer, taps, conv_weight, v_channel, conv_channel, column_mask, L
                )
                S, o_tile = _delta_rule(S, q_unit, k_unit, v_conv, dot, beta, decay)
                tl.store(S_pointer, S.to(state.dtype.element_ty), mask=mask)
                # A 1-D block is held by several threads at once: none may shift the taps before all have read them.
                tl.debug_barrier()
                _store_taps(taps, v_channel, conv_channel, column_mask, v0, v1, v2, v3, L)
                o = tl.where((tiles == tile)[:, None], o_tile[None, :], o)

            column = (tiles * L.BLOCK_V)[:, None] + columns[None, :]  # [TILES, BLOCK_V]
            mask = column < L.DV if L.TILES * L.BLOCK_V > L.DV else None
            gate = _load(z + i * z_token + hk * L.z_head + r * L.z_value + column, mask)
            weight = _load(norm_weight + column, mask)
            square_mean = tl.sum(tl.sum(o * o, 1), 0) / L.DV
            o = _gate_norm(o, gate, weight, square_mean, L.eps, L.silu)
            o_pointer = out + i * (L.count * L.DV) + (hv - L.first) * L.DV + column
            tl.store(o_pointer, o.to(out.dtype.element_ty), mask=mask)

        tl.debug_barrier()  # as above; the value heads of this program have all used q and k
        _store_taps(taps, q_channel, conv_channel, row_mask, q0, q1, q2, q3, L)
        _store_taps(taps, k_channel, conv_channel, row_mask, k0, k1, k2, k3, L)


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
    rows = tl.arange(0, L.BLOCK_K)
    columns = tl.arange(0, L.BLOCK_V)
    row_mask = rows < L.DK if L.BLOCK_K > L.DK else None
    column_mask = columns < L.DV if L.BLOCK_V > L.DV else None
    mask = None
    if row_mask is not None or column_mask is not None:
        mask = (rows < L.DK)[:, None] & (columns < L.DV)[None, :]
    weight = _load(norm_weight + columns, column_mask)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        i = tl.cast(item // L.key_heads, tl.int64)
        hk = L.first // L.R + item % L.key_heads
        taps = conv_state + i * conv_sequence
        q_channel = hk * L.DK + rows
        k_channel = L.HK * L.DK + q_channel
        if cu_seqlens is None:
            begin = i * tokens
            end = begin + tokens
        else:
            begin = tl.load(cu_seqlens + i).to(tl.int64)
            end = tl.load(cu_seqlens + i + 1).to(tl.int64)

        first = tl.maximum(hk * L.R, L.first)
        last = tl.minimum(hk * L.R + L.R, L.first + L.count) - 1
        last = tl.where(begin < end, last, first - 1)  # no token: nothing is touched
        for hv in range(first, last + 1):
            r = hv - hk * L.R
            v_channel = 2 * L.HK * L.DK + hv * L.DV + columns
            S_pointer = state + i * state_sequence + hv * L.state_head + (rows * L.DV)[:, None] + columns[None, :]
            S = _load(S_pointer, mask)
            q1, q2, q3, q4 = _load_taps(taps, q_channel, conv_channel, L.tap_stride, L.packed_taps, row_mask, L.W)
            k1, k2, k3, k4 = _load_taps(taps, k_channel, conv_channel, L.tap_stride, L.packed_taps, row_mask, L.W)
            v1, v2, v3, v4 = _load_taps(taps, v_channel, conv_channel, L.tap_stride, L.packed_taps, column_mask, L.W)
            qw0, qw1, qw2, qw3 = _load_weight(conv_weight, q_channel, row_mask, L)
            kw0, kw1, kw2, kw3 = _load_weight(conv_weight, k_channel, row_mask, L)
            vw0, vw1, vw2, vw3 = _load_weight(conv_weight, v_channel, column_mask, L)
            rate = tl.load(A_log + hv).to(tl.float32)
            bias = tl.load(dt_bias + hv).to(tl.float32)
            for t in range(begin, end):
                q0 = _load(q + t * q_token + hk * L.q_head + rows, row_mask)
                k0 = _load(k + t * k_token + hk * L.k_head + rows, row_mask)
                v0 = _load(v + t * v_token + hk * L.v_head + r * L.v_value + columns, column_mask)
                gate = _load(z + t * z_token + hk * L.z_head + r * L.z_value + columns, column_mask)
                beta, decay = _gates(
                    tl.load(b + t * b_token + hk * L.b_head + r * L.b_value).to(tl.float32),
                    tl.load(a + t * a_token + hk * L.a_head + r * L.a_value).to(tl.float32),
                    rate,
                    bias,
                )
                q_unit = _normalise(_convolve(q0, q1, q2, q3, qw0, qw1, qw2, qw3, L.W)) * L.scale
                k_unit = _normalise(_convolve(k0, k1, k2, k3, kw0, kw1, kw2, kw3, L.W))
                v_conv = _convolve(v0, v1, v2, v3, vw0, vw1, vw2, vw3, L.W)
                S, o = _delta_rule(S, q_unit, k_unit, v_conv, tl.sum(q_unit * k_unit, 0), beta, decay)
                o = _gate_norm(o, gate, weight, tl.sum(o * o, 0) / L.DV, L.eps, L.silu)
                o_pointer = out + t * (L.count * L.DV) + (hv - L.first) * L.DV + columns
                tl.store(o_pointer, o.to(out.dtype.element_ty), mask=column_mask)
                q1, q2, q3, q4 = q0, q1, q2, q3
                k1, k2, k3, k4 = k0, k1, k2, k3
                v1, v2, v3, v4 = v0, v1, v2, v3

            tl.store(S_pointer, S.to(state.dtype.element_ty), mask=mask)
            # A 1-D block is held by several threads at once: none may shift the taps before all have read them.
            tl.debug_barrier()
            _store_taps(taps, v_channel, conv_channel, column_mask, v1, v2, v3, v4, L)
            if hv == last:  # the other value heads have read q's and k's taps
                _store_taps(taps, q_channel, conv_channel, row_mask, q1, q2, q3, q4, L)
                _store_taps(taps, k_channel, conv_channel, row_mask, k1, k2, k3, k4, L)
