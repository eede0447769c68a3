"""The decode step on states that are read every step and written every N-th, as Triton kernels: JIT code alone.

A step adds decay and one outer product k delta^T to the state. Here the last ones wait in a ring, and the state that
the step means is never formed (`ops.ring` has the mathematics and the ring's parts):

    S = G * state + sum_j w_j k_j d_j^T,    S^T x = G * (state^T x) + sum_j w_j (k_j . x) d_j

One program owns one key head of one sequence, as in `kernel`: its cursor, its ring, its taps. (For few sequences it has
one value head of it, and is in a cluster with the others, as in `value_head`.) It folds what is pending into the state
once in N steps, before it uses it, so that the fold is one pass over the state that waits for nothing. Programs fold at
different steps, a N-th of them at each, but for the last of a launch (`ring.new_ring`).
"""

import triton
import triton.language as tl

from .. import ring
from . import barrier
from .parts import activation, convolve_token, gates, load, load_qk, project, state_words, store_taps, unit_qk

LEFT = tl.constexpr(ring.LEFT)
COUNT_BITS = tl.constexpr(ring.COUNT_BITS)


@triton.jit
def read_cursor(t):
    """How many entries of the ring wait, and how many steps are left before they are folded."""
    return t & (LEFT - 1), t >> COUNT_BITS


@triton.jit
def state_mask(rows, columns, L: tl.constexpr):
    """None where the block fits exactly."""
    if L.BLOCK_K > L.DK or L.BLOCK_V > L.DV:
        mask = (rows < L.DK)[:, None] & (columns < L.DV)[None, :]
    else:
        mask = None
    return mask


@triton.jit
def load_rows(pointer, mask, left, L: tl.constexpr):
    """Some rows of a value head's state as float32; nothing is read if there are none left."""
    wanted = tl.full(pointer.shape, left, tl.int32) > 0
    if mask is not None:
        wanted = wanted & mask
    return tl.load(pointer, mask=wanted, other=0.0).to(tl.float32)


@triton.jit
def fold_entries(
    state,
    ring_k,
    ring_d,
    ring_w,
    i,
    hk,
    first,
    count,
    L: tl.constexpr,
    N: tl.constexpr,
    PARTS: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Adds the first `count` entries of the ring to the states of HEADS value heads, a part of rows at a time.

    They are those of key head hk from the `first` on, whose state `state` is.
    """
    rows = tl.arange(0, L.BLOCK_K // PARTS)
    columns = tl.arange(0, L.BLOCK_V)
    ring_k += (i * L.HK + hk) * (N * L.DK)
    for value in range(HEADS):
        r = tl.cast(value, hk.dtype)
        head = i * (L.HK * L.R) + hk * L.R + first + r
        d_head = ring_d + head * (N * L.DV) + columns
        w_head = ring_w + head * (N + 1)
        G = tl.load(w_head + N)
        # Loaded once, and all at once: one after the other each would cost the latency of the memory. (Triton's tuples
        # do not unpack.)
        ds = ()
        ws = ()
        for j in tl.static_range(N):
            ds = ds + (tl.load(d_head + j * L.DV, mask=(j < count) & (columns < L.DV), other=0.0),)  # type: ignore[assignment]  # noqa: RUF005
            ws = ws + (tl.load(w_head + j, mask=j < count, other=0.0),)  # type: ignore[assignment]  # noqa: RUF005
        top = state + r * L.state_head + (rows * L.DV)[:, None] + columns[None, :]
        S_next = load(top, state_mask(rows, columns, L))
        for part in range(PARTS):
            own = part * (L.BLOCK_K // PARTS) + rows
            pointer = state + r * L.state_head + (own * L.DV)[:, None] + columns[None, :]
            S = S_next * G
            # Asked for before the present rows are stored: afterwards, each part would cost the memory's latency.
            following = state_mask(own + L.BLOCK_K // PARTS, columns, L)
            S_next = load_rows(pointer + (L.BLOCK_K // PARTS) * L.DV, following, PARTS - 1 - part, L)
            for j in tl.static_range(N):
                k = tl.load(ring_k + j * L.DK + own, mask=(j < count) & (own < L.DK), other=0.0)
                S += (ws[j] * k)[:, None] * ds[j][None, :]
            tl.store(pointer, S.to(state.dtype.element_ty), mask=state_mask(own, columns, L))


@triton.jit
def load_keys(k_head, slots, rows, count, L: tl.constexpr):
    """The first `count` keys of a key head's ring [slots, DK], zero where there are none."""
    pointer = k_head + slots[:, None] * L.DK + rows[None, :]
    return tl.load(pointer, mask=(slots < count)[:, None] & (rows < L.DK)[None, :], other=0.0)


@triton.jit
def read_state(state, rows, left, L: tl.constexpr):
    """The state of a value head [DK, DV] as `state_words` has it; nothing is read if there is no head left."""
    PAIR: tl.constexpr = 2 if L.pairs else 1
    words = tl.arange(0, L.BLOCK_V // PAIR)
    wanted = tl.full([L.BLOCK_K, L.BLOCK_V // PAIR], left, tl.int32) > 0
    if L.BLOCK_K > L.DK or L.BLOCK_V > L.DV:
        wanted = wanted & (rows < L.DK)[:, None] & (words < L.DV // PAIR)[None, :]
    pointer = state_words(state, L) + (rows * (L.DV // PAIR))[:, None] + words[None, :]
    return tl.load(pointer, mask=wanted, other=0)


@triton.jit(
    do_not_specialize=["items", "b_token", "a_token"],
    do_not_specialize_on_alignment=["b", "a", "A_log", "dt_bias"],
)
def decode_deferred(
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
    ring_k,
    ring_d,
    ring_w,
    cursor,
    out,
    items,
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
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PARTS: tl.constexpr,
    HEADS: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    """One token a sequence, all value heads: HEADS a program, which are all R of a key head, or one in a cluster of R.

    The state is read in whole heads, and folded in PARTS of their rows.
    """
    CLUSTER: tl.constexpr = L.R // HEADS
    index: tl.constexpr = tl.int64 if L.wide else tl.int32  # what multiplies the strides within a token or a sequence
    which = tl.arange(0, 2)[:, None].to(index)
    rows = tl.arange(0, L.BLOCK_K)
    columns = tl.arange(0, L.BLOCK_V).to(index)
    slots = tl.arange(0, BLOCK_N)
    cell = tl.broadcast_to(rows[None, :], [2, L.BLOCK_K]).to(index)
    qk_mask = cell < L.DK if L.BLOCK_K > L.DK else None
    column_mask = columns < L.DV if L.BLOCK_V > L.DV else None
    program = tl.program_id(0) // CLUSTER
    first = tl.cast(tl.program_id(0) % CLUSTER, index) * HEADS
    stop = items if L.strided else program + 1
    for item in range(program, stop, tl.num_programs(0) // CLUSTER if L.strided else 1):
        i = tl.cast(item // L.HK, tl.int64)  # the sequence, and its only token
        hk = tl.cast(item % L.HK, index)
        S_first = state + i * state_sequence + (hk * L.R + first) * L.state_head
        t = tl.load(cursor + item)
        k_head = ring_k + (i * L.HK + hk) * (N * L.DK)
        if PREFETCH:
            S = read_state(S_first, rows, 1, L)
            # All that there may be: which of them wait, the cursor will say.
            entry = load_keys(k_head, slots, rows, N, L)

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
        count, left = read_cursor(t)
        fold = (left == 0) & (count > 0)
        if fold:
            fold_entries(S_first, ring_k, ring_d, ring_w, i, hk, first, count, L, N, PARTS, HEADS)
            tl.debug_barrier()  # the state is read again, other parts of it by each thread
            if PREFETCH:
                S = read_state(S_first, rows, 1, L)
        count = tl.where(fold, 0, count)
        waits = slots < count  # [BLOCK_N]
        waits_d = waits[:, None] & (columns < L.DV)[None, :]
        if PREFETCH:
            entry = tl.where(waits[:, None], entry, 0.0)
        else:
            entry = load_keys(k_head, slots, rows, count, L)
        t_next = count + 1 + LEFT * (tl.where(left == 0, N, left) - 1)
        if CLUSTER == 1:
            # What several threads hold, taps or cursor, none may change before all have read it.
            tl.debug_barrier()
            store_taps(taps, qk_channel, conv_channel, qk_mask, qk0, qk1, qk2, qk3, L)
            tl.store(cursor + item, t_next)
        q_unit, k_unit, dot = unit_qk(qk_conv, which, L.scale)
        k_k = tl.sum(entry * k_unit[None, :], 1)
        k_q = tl.sum(entry * q_unit[None, :], 1)
        for step in range(HEADS):
            value = tl.cast(step, index)
            r = first + value
            hv = hk * L.R + r
            head = i * (L.HK * L.R) + hv
            d_head = ring_d + head * (N * L.DV)
            w_head = ring_w + head * (N + 1)
            beta, decay = gates(
                tl.load(b + i * b_token + hk * L.b_head + r * L.b_value).to(tl.float32),
                tl.load(a + i * a_token + hk * L.a_head + r * L.a_value).to(tl.float32),
                tl.load(A_log + hv).to(tl.float32),
                tl.load(dt_bias + hv).to(tl.float32),
                L.beta_scale,
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
            gate = activation(load(z + i * z_token + hk * L.z_head + r * L.z_value + columns, column_mask), L.silu)
            gate *= load(norm_weight + columns, column_mask)
            w = tl.load(w_head + slots, mask=waits, other=0.0)
            G = tl.load(w_head + N, mask=count > 0, other=1.0)  # of a state just folded or settled: 1
            d = tl.load(d_head + slots[:, None] * L.DV + columns[None, :], mask=waits_d, other=0.0)
            if not PREFETCH:
                S = read_state(S_first + value * L.state_head, rows, 1, L)
            tl.debug_barrier()  # as above: taps and weights
            store_taps(taps, v_channel, conv_channel, column_mask, v0, v1, v2, v3, L)
            S_k = G * project(S, k_unit, L) + tl.sum((w * k_k)[:, None] * d, 0)
            S_q = G * project(S, q_unit, L) + tl.sum((w * k_q)[:, None] * d, 0)
            # The old state is done with: the next one comes while the rest is computed.
            if PREFETCH and HEADS > 1:
                S = read_state(S_first + (value + 1) * L.state_head, rows, HEADS - 1 - value, L)
            if CLUSTER > 1:
                barrier.arrive(CLUSTER, L.nvidia)
            delta = beta * (v_conv - decay * S_k)
            o = decay * S_q + dot * delta
            y = o * tl.rsqrt(tl.sum(o * o, 0) / L.DV + L.eps) * gate
            tl.store(w_head + slots, tl.where(waits, w * decay, 1.0), mask=slots <= count)
            tl.store(w_head + N, G * decay)
            tl.store(d_head + count * L.DV + columns, delta, mask=column_mask)
            y_pointer = out + head * L.DV + columns
            tl.store(y_pointer, y.to(out.dtype.element_ty), mask=column_mask)
        if CLUSTER > 1:  # nor before the other programs of the key head have: one of them then changes what they share
            barrier.wait(L.nvidia)
            if first == L.R - 1:
                store_taps(taps, qk_channel, conv_channel, qk_mask, qk0, qk1, qk2, qk3, L)
                tl.store(cursor + item, t_next)
        if first + HEADS == L.R:
            tl.store(k_head + count * L.DK + rows, k_unit, mask=rows < L.DK)


@triton.jit(do_not_specialize=["items"])
def settle_states(
    state,
    ring_k,
    ring_d,
    ring_w,
    cursor,
    items,
    state_sequence,
    L: tl.constexpr,
    N: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Folds what is pending into the states, after which nothing waits."""
    program = tl.program_id(0)
    stop = items if L.strided else program + 1
    for item in range(program, stop, tl.num_programs(0) if L.strided else 1):
        i = tl.cast(item // L.HK, tl.int64)
        hk = tl.cast(item % L.HK, tl.int64)
        t = tl.load(cursor + item)
        count, _ = read_cursor(t)
        tl.debug_barrier()  # none may change the cursor before all have read it
        tl.store(cursor + item, t - count)
        if count > 0:
            S_first = state + i * state_sequence + hk * (L.R * L.state_head)
            fold_entries(S_first, ring_k, ring_d, ring_w, i, hk, 0, count, L, N, PARTS, L.R)
