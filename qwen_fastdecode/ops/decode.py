"""`gated_delta_decode`: the decode step as a function, for callers outside the patch."""

from __future__ import annotations

from torch import Tensor

from .backends import select_backend
from .step import check_arguments


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
    RMSNorm. Both states are updated in place. Value head hv reads key head hv // R.

    Args:
        q, k: [N, HK, DK], of N tokens in all; any strides but the last, which is 1: views of the projections' outputs.
        v, z: [N, HK, R, DV], strides likewise.
        b, a: [N, HK, R], any strides; beta = beta_scale * sigmoid(b), decay = exp(-exp(A_log) * softplus(a + dt_bias)).
        conv_state: [B, C, W], any strides; C = 2 * HK * DK + HV * DV channels [q | k | v], W taps, the oldest first.
        recurrent_state: [B, HV, DK, DV], float32 or bfloat16; computed in float32, rounded once a call.
        conv_weight: [C, W]. A_log, dt_bias: [HV]. norm_weight: [DV].
        eps: of the gated RMSNorm, added to the mean of squares.
        gate: activation of z, "silu" or "sigmoid".
        beta_scale: above 0, at most 2. With 2 the state's transition may have negative eigenvalues (arXiv:2411.12537).
        cu_seqlens: [B + 1], int32 or int64: sequence i owns tokens cu_seqlens[i] to cu_seqlens[i + 1]. None: each of
            the B sequences owns N / B tokens in a row.
        heads: (first, count), the value heads to compute; only their states, their v channels' taps and the q and k
            taps of the key heads that they read are updated. None: all. With a range, q, k, v, z, b and a may hold the
            key heads that it reads alone (as one tensor-parallel rank has them), in place of all HK.
        backend: "auto", "triton" or "torch".

    Returns:
        [N, count * DV] in the dtype of v.

    Raises:
        ValueError: an argument's shape, dtype, device, stride or value is not as above; the message names it.
        BackendUnavailable: `backend` cannot run on the device of q.
    """
    tensors = (q, k, v, z, b, a, conv_state, recurrent_state, conv_weight, A_log, dt_bias, norm_weight)
    heads = check_arguments(*tensors, gate=gate, beta_scale=beta_scale, cu_seqlens=cu_seqlens, heads=heads)
    decode = select_backend(backend, q.device).decode
    return decode(*tensors, eps=eps, gate=gate, beta_scale=beta_scale, cu_seqlens=cu_seqlens, heads=heads)
