"""What the decode kernels are made of: loads and stores of taps and state, and the step's mathematics. JIT code alone.

Blocks are one-dimensional over the channels of a head, [2, DK] for q and k together, or [DK, BLOCK_V] for the state.
"""

import triton
import triton.language as tl


@triton.jit
def load(pointer, mask):
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
def load_taps(row, channel, channel_stride, tap_stride: tl.constexpr, packed: tl.constexpr, mask, W: tl.constexpr):
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
        x1 = load(pointer + (W - 1) * tap_stride, mask)
        x2 = load(pointer + (W - 2) * tap_stride, mask)
        x3 = x2
        x4 = x2
        if W >= 3:
            x3 = load(pointer + (W - 3) * tap_stride, mask)
            x4 = x3
        if W >= 4:
            x4 = load(pointer + (W - 4) * tap_stride, mask)
        return x1, x2, x3, x4


@triton.jit
def load_weight(conv_weight, channel, mask, L: tl.constexpr):
    """The convolution's weights of some channels, that of the new token first."""
    return load_taps(conv_weight, channel, L.weight_channel, L.weight_tap, L.packed_weight, mask, L.W)


@triton.jit
def store_taps(row, channel, channel_stride, mask, x1, x2, x3, x4, L: tl.constexpr):
    """Writes the W newest inputs of some channels, x1 being the newest: the inverse of `load_taps`."""
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
def convolve(x0, x1, x2, x3, w0, w1, w2, w3, W: tl.constexpr):
    """silu of the causal convolution: x0 is the new token, xi the input i tokens ago, wi its weight."""
    y = x0 * w0 + x1 * w1
    if W >= 3:
        y += x2 * w2
    if W >= 4:
        y += x3 * w3
    return y / (1.0 + tl.exp(-y))


@triton.jit
def convolve_token(x0, taps, conv_weight, channel, conv_channel, mask, L: tl.constexpr):
    """silu of the convolution of one new token x0, and the four newest inputs, x0 first."""
    x1, x2, x3, _ = load_taps(taps, channel, conv_channel, L.tap_stride, L.packed_taps, mask, L.W)
    w0, w1, w2, w3 = load_weight(conv_weight, channel, mask, L)
    return convolve(x0, x1, x2, x3, w0, w1, w2, w3, L.W), x0, x1, x2, x3


@triton.jit
def before_range(q, k, v, z, b, a, L: tl.constexpr):
    """Where key head 0 of each tensor would lie, so that all heads are counted as in the states."""
    return (
        q - L.skipped * L.q_head,
        k - L.skipped * L.k_head,
        v - L.skipped * L.v_head,
        z - L.skipped * L.z_head,
        b - L.skipped * L.b_head,
        a - L.skipped * L.a_head,
    )


@triton.jit
def load_qk(q, k, which, cell, mask):
    """q and k of one token and head as a block [2, DK]; `which` is 0 on q's row and 1 on k's."""
    q_mask = which == 0
    k_mask = which == 1
    if mask is not None:
        q_mask = q_mask & mask
        k_mask = k_mask & mask
    return load(q + cell, q_mask) + load(k + cell, k_mask)


@triton.jit
def unit_qk(qk, which, scale):
    """[2, DK] -> q / |q| * scale, k / |k| (the epsilon inside the root, as in Transformers), each [DK], and q.k."""
    qk *= tl.rsqrt(tl.sum(qk * qk, 1) + 1e-6)[:, None]
    q = tl.sum(tl.where(which == 0, qk, 0.0), 0) * scale
    k = tl.sum(tl.where(which == 1, qk, 0.0), 0)
    return q, k, tl.sum(q * k, 0)


@triton.jit
def gates(b, a, A_log, dt_bias, beta_scale: tl.constexpr):
    """beta = beta_scale * sigmoid(b) and decay = exp(-exp(A_log) * softplus(a + dt_bias)), scalars in float32."""
    x = a + dt_bias
    u = tl.exp(-tl.abs(x))  # in (0, 1]: softplus(x) = max(x, 0) + log1p(u) cannot overflow
    w = 1.0 + u
    log1p = tl.where(w == 1.0, u, tl.log(w) * (u / (w - 1.0)))  # Kahan: exact where 1 + u rounds
    rate = tl.exp(A_log) * (tl.maximum(x, 0.0) + log1p)
    # There softplus(x) is exp(x) in float32; the product could be inf * 0.
    rate = tl.where(x < -15.0, tl.exp(A_log + x), rate)
    return beta_scale / (1.0 + tl.exp(-b)), tl.exp(-rate)


@triton.jit
def widen(S):
    """Pairs of bfloat16 in 32-bit words -> those in the low halves and those in the high halves, as float32."""
    return (S << 16).to(tl.float32, bitcast=True), (S & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def widen_again(S, late, L: tl.constexpr):
    """`widen`, in words which the compiler does not know to give the same, and not before `late` [V / 2] is known.

    It would keep the wide tile from the first use to the second, in twice the registers of the tile itself.
    """
    if L.nvidia:
        zero = tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,f", [late], tl.uint32, True, 1) >> 6
        low_bytes, high_bytes = (zero + 0x1044)[None, :], (zero + 0x3244)[None, :]
        low = tl.inline_asm_elementwise("prmt.b32 $0, $1, 0, $2;", "=f,r,r", [S, low_bytes], tl.float32, True, 1)
        high = tl.inline_asm_elementwise("prmt.b32 $0, $1, 0, $2;", "=f,r,r", [S, high_bytes], tl.float32, True, 1)
    else:
        low, high = widen(S)
    return low, high


@triton.jit
def narrow(low, high, L: tl.constexpr):
    """The inverse of `widen`, each rounded to the nearest bfloat16."""
    if L.nvidia:
        words = tl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], tl.uint32, True, 1)
    else:
        low = low.to(tl.bfloat16).to(tl.uint16, bitcast=True).to(tl.uint32)
        words = low | (high.to(tl.bfloat16).to(tl.uint16, bitcast=True).to(tl.uint32) << 16)
    return words


@triton.jit
def project(S, x, L: tl.constexpr):
    """S^T x for a state tile S and x [DK]; of pairs, the columns of the low and of the high halves in turn."""
    if L.pairs:
        low, high = widen(S)
        y = tl.interleave(tl.sum(low * x[:, None], 0), tl.sum(high * x[:, None], 0))
    else:
        y = tl.sum(S.to(tl.float32) * x[:, None], 0)
    return y


@triton.jit
def delta_rule(S, q, k, v, dot, beta, decay, L: tl.constexpr):
    """One token on a state tile: S [DK, V], q and k [DK], v [V], dot = q.k; returns the new S and o [V]."""
    p = project(S, k, L)
    r = project(S, q, L)
    delta = beta * (v - decay * p)
    if L.pairs:
        even, odd = tl.split(tl.reshape(delta, [L.BLOCK_V // 2, 2]))
        low, high = widen_again(S, even, L)
        low = decay * low + k[:, None] * even[None, :]
        S = narrow(low, decay * high + k[:, None] * odd[None, :], L)
    else:
        S = decay * S.to(tl.float32) + k[:, None] * delta[None, :]
    return S, decay * r + dot * delta


@triton.jit
def state_words(state, L: tl.constexpr):
    """The states as a tile holds them: numbers, or pairs of bfloat16 as 32-bit words."""
    if L.pairs:
        words = state.to(tl.pointer_type(tl.uint32), bitcast=True)
    else:
        words = state
    return words


@triton.jit
def _state_mask(rows, columns, L: tl.constexpr):
    if L.BLOCK_K > L.DK or L.TILES * L.BLOCK_V > L.DV:
        mask = (rows < L.DK)[:, None] & (columns < L.DV // (2 if L.pairs else 1))[None, :]
    else:
        mask = None
    return mask


@triton.jit
def load_state(pointer, rows, columns, left, L: tl.constexpr):
    """A tile [DK, BLOCK_V] as `state_words` has it; nothing is read if there is no tile left.

    evict_last: the line stays in the L2 cache until it is written back in place (5 % faster at large batch on an H200).
    """
    mask = _state_mask(rows, columns, L)
    # A branch would keep the old tile beside the new.
    wanted = tl.full([L.BLOCK_K, L.BLOCK_V // (2 if L.pairs else 1)], left, tl.int32) > 0
    if mask is None:
        S = tl.load(pointer, mask=wanted, eviction_policy="evict_last")
    else:
        S = tl.load(pointer, mask=mask & wanted, other=0, eviction_policy="evict_last")
    return S


@triton.jit
def store_state(pointer, S, rows, columns, L: tl.constexpr):
    """Writes a tile [DK, BLOCK_V], rounded once to the state's dtype."""
    tl.store(pointer, S.to(pointer.dtype.element_ty), mask=_state_mask(rows, columns, L))


@triton.jit
def activation(z, silu: tl.constexpr):
    """silu(z) or sigmoid(z), the gate of the norm."""
    y = 1.0 / (1.0 + tl.exp(-z))
    if silu:
        y *= z
    return y
