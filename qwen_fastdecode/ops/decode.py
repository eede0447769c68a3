"""`gated_delta_decode`: the decode step as a function, for callers outside the patch."""

from __future__ import annotations

import torch
from torch import Tensor

from .backends import select_backend
from .library import decode_registered
from .step import Recipe, States, Step, Tokens, Weights, check_gradients, check_step, check_values


def gated_delta_decode(
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
    eps: float = 1e-6,
    gate: str = "silu",
    beta_scale: float = 1.0,
    cu_seqlens: Tensor | None = None,
    heads: tuple[int, int] | None = None,
    backend: str = "auto",
) -> Tensor:
    """One decode step of a gated DeltaNet layer, from its input projections to the input of its output projection.

    Causal convolution with silu, l2-norm of q and k, gates, gated delta rule (arXiv:2412.06464, eq. 10), gated
    RMSNorm. Both states are updated in place. Value head hv reads key head hv // R. It has no gradient.

    Args:
        q, k: [N, HK, DK], of N tokens in all; any strides but the last, which is 1: views of the projections' outputs.
        v, z: [N, HK, R, DV], strides likewise.
        b, a: [N, HK, R], any strides; beta = beta_scale * sigmoid(b), decay = exp(-exp(A_log) * softplus(a + dt_bias)).
        conv_state: [B, C, W], any strides; C = 2 * HK * DK + HV * DV channels [q | k | v], W taps, the oldest first.
        recurrent_state: [B, HV, DK, DV], float32 or bfloat16; computed in float32, rounded once a call.
        conv_weight: [C, W], or [C, 1, W]. A_log, dt_bias: [HV]. norm_weight: [DV].
        eps: of the gated RMSNorm, added to the mean of squares.
        gate: activation of z, "silu" or "sigmoid".
        beta_scale: above 0, at most 2. With 2 the state's transition may have negative eigenvalues (arXiv:2411.12537).
        cu_seqlens: [B + 1], int32 or int64, from 0 to N: sequence i owns tokens cu_seqlens[i] to cu_seqlens[i + 1].
            Its values are read on the host. None: each of the B sequences owns N / B tokens in a row.
        heads: (first, count), the value heads to compute, those of whole key heads; only their states and the taps of
            their q, k and v channels are updated. None: all. With a range, q, k, v, z, b and a may hold its key heads
            alone (as one tensor-parallel rank has them), in place of all HK.
        backend: "auto", "triton" or "torch".

    Returns:
        [N, count * DV] in the dtype of v.

    Raises:
        UnsupportedStep: an argument's shape, dtype, device, stride or value is not as above, or the backend does not
            take it (a ValueError; the message names the argument).
        ValueError: cu_seqlens does not deal out every token once, or an argument wants a gradient.
        BackendUnavailable: `backend` cannot run on the device of q.
    """
    tokens, states = Tokens(q, k, v, z, b, a), States(conv_state, recurrent_state)
    step = Step.of(tokens, states, Weights(conv_weight, A_log, dt_bias, norm_weight), cu_seqlens)
    if heads is None:
        heads = 0, recurrent_state.shape[1] if recurrent_state.dim() == 4 else 0
    recipe = Recipe(heads, eps, gate, beta_scale)
    check_gradients((*tokens, *states, *step.weights))
    if torch.compiler.is_compiling():
        return decode_registered(step, recipe, backend)  # one node of the graph, which checks when it runs
    check_step(step, recipe)
    check_values(step)
    return select_backend(backend, q.device).decode(step, recipe)
