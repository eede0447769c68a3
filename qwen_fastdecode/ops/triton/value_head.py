"""The decode step with a program or several a value head, for few sequences: JIT code alone, like `kernel`.

With a program a key head, most of a GPU is idle at small batches. Here each of its R value heads is worked on by TILES
programs, each on the BLOCK_V columns of its part. All of them read the same taps of q and k, so none may shift them
before all have read them: they are launched as a thread block cluster (`clusters`), and pass its barrier in between.

The norm needs the sum of o * o over a head. Where a head has parts, each leaves its own sum in `squares` before it
arrives at the same barrier, and reads those of its head after it has waited. That memory is allocated for each step
as `out` is, and whole heads need none: steps on other streams, and those of captured graphs, share nothing.

In the interpreter programs run one after the other, and the last of a key head is the one that shifts. No program can
read there what later ones leave, so parts need two launches (`Layout.phase`): of the first nothing but `squares` is
left, the second reads them.
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
    squares,
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
    """One token a sequence. The state, which is needed last, is asked for first.

    squares: float32 [items, R, TILES], the sum of o * o over each part; None where heads are whole.
    """
    index: tl.constexpr = tl.int64 if L.wide else tl.int32  # what multiplies the strides within a token or a sequence
    which = tl.arange(0, 2)[:, None].to(index)
    rows = tl.arange(0, L.BLOCK_K)
    PROGRAMS: tl.constexpr = L.R * L.TILES  # of a cluster
    program = tl.program_id(0)
    r = tl.cast(program % PROGRAMS // L.TILES, index)
    part = program % L.TILES
    columns = part * L.BLOCK_V + tl.arange(0, L.BLOCK_V).to(index)  # of the value head
    PAIR: tl.constexpr = 2 if L.pairs else 1  # numbers of the state in a word of its tiles
    words = part * (L.BLOCK_V // PAIR) + tl.arange(0, L.BLOCK_V // PAIR).to(index)
    cell = tl.broadcast_to(rows[None, :], [2, L.BLOCK_K]).to(index)
    qk_mask = cell < L.DK if L.BLOCK_K > L.DK else None
    column_mask = columns < L.DV if L.TILES * L.BLOCK_V > L.DV else None
    if L.skipped:  # the tensors begin at the first key head of the range
        q, k, v, z, b, a = before_range(q, k, v, z, b, a, L)
    item = program // PROGRAMS
    i = tl.cast(item // L.key_heads, tl.int64)  # the sequence, and its only token; 64 bits as it multiplies strides
    hk = tl.cast(L.first_key_head + item % L.key_heads, index)
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
    # A block of taps is held by several threads at once, and q's and k's by several programs: none is shifted before
    # all have been read. Whole heads arrive as soon as they have read theirs, parts when their squares are left too.
    # Parts shift their own of v before that: kept until then, they take registers that the state needs.
    if L.TILES == 1:
        barrier.arrive(PROGRAMS, L.nvidia)
        S, o = delta_rule(S, q_unit, k_unit, v_conv, dot, beta, decay, L)
        store_state(S_pointer, S, rows, words, L)
        square = tl.sum(o * o, 0)
    else:
        if L.phase != "squares":
            tl.debug_barrier()
            store_taps(taps, v_channel, conv_channel, column_mask, v0, v1, v2, v3, L)
        S, o = delta_rule(S, q_unit, k_unit, v_conv, dot, beta, decay, L)
        if L.phase != "rest":
            tl.store(squares + program, tl.sum(o * o, 0))
        if L.phase == "squares":
            return
        barrier.arrive(PROGRAMS, L.nvidia)
        store_state(S_pointer, S, rows, words, L)
        barrier.wait(L.nvidia)
        # Volatile: the compiler knows of no other writer, and could load before the barrier. All programs of a head add
        # the same block [TILES] in the same order, so that their columns are divided by the same number, bit for bit.
        square = tl.sum(tl.load(squares + (program - part) + tl.arange(0, L.TILES), volatile=True), 0)
    y = o * gate * tl.rsqrt(square / L.DV + L.eps)
    y_pointer = out + i * (L.key_heads * L.R * L.DV) + (hv - L.first_key_head * L.R) * L.DV + columns
    tl.store(y_pointer, y.to(out.dtype.element_ty), mask=column_mask)
    if L.TILES == 1:
        barrier.wait(L.nvidia)
        store_taps(taps, v_channel, conv_channel, column_mask, v0, v1, v2, v3, L)
    if program % PROGRAMS == PROGRAMS - 1:
        store_taps(taps, qk_channel, conv_channel, qk_mask, qk0, qk1, qk2, qk3, L)
