"""The float64 reference of one gated DeltaNet decode step. Short on purpose: it is the law for every backend.

Formula: gated delta rule (Yang, Kautz, Hatamizadeh, "Gated Delta Networks", arXiv:2412.06464, eq. 10) with the
causal convolution, the l2-norm of q and k, and the gated RMSNorm that Qwen3-Next puts around it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .step import Recipe, Step, StepShapes


def decode_reference(step: Step, recipe: Recipe) -> Tensor:
    """The step in float64, one token at a time.

    Both states are updated in place (rounded once, to their own dtype, at the end of each sequence); returns the
    output as float64 [N, count * DV].
    """
    q, k, v, z, b, a = tokens = step.tokens
    (conv_state, recurrent_state), weights = step.states, step.weights
    s = StepShapes.of(tokens, step.states)
    (first, count), (low, n) = recipe.heads, s.key_heads(recipe)
    if q.shape[1] < s.HK:  # only the key heads that are read: the others' places hold what is not used
        q, k, v, z, b, a = (F.pad(x.movedim(1, -1), (low, s.HK - low - n)).movedim(-1, 1) for x in tokens)
    value_heads = torch.arange(first, first + count, device=q.device)
    key_heads = value_heads // s.R  # value head hv reads key head hv // R
    channels = s.conv_channels(recipe, q.device)  # the q, k and v channels that these heads own
    weight = weights.conv.double().reshape(s.C, s.W)
    rate, bias = weights.A_log.double().exp()[value_heads], weights.dt_bias.double()[value_heads]
    activation = {"silu": F.silu, "sigmoid": torch.sigmoid}[recipe.gate]

    out = torch.empty(s.N, count * s.DV, dtype=torch.float64, device=q.device)
    bounds = range(0, s.N + 1, s.N // s.B) if step.cu_seqlens is None else step.cu_seqlens.tolist()
    for i in range(s.B):
        taps, S = conv_state[i].double(), recurrent_state[i, value_heads].double()  # [C, W], [count, DK, DV]
        for t in range(bounds[i], bounds[i + 1]):
            x = torch.cat([q[t].flatten(), k[t].flatten(), v[t].flatten()]).double()  # [C]
            taps = torch.cat([taps[:, 1:], x[:, None]], dim=1)
            y = F.silu((taps * weight).sum(1))
            qc, kc, vc = y.split([s.HK * s.DK, s.HK * s.DK, s.HV * s.DV])
            qh, kh = qc.view(s.HK, s.DK), kc.view(s.HK, s.DK)
            qh = (qh * torch.rsqrt((qh * qh).sum(-1, keepdim=True) + 1e-6) / s.DK**0.5)[key_heads]
            kh = (kh * torch.rsqrt((kh * kh).sum(-1, keepdim=True) + 1e-6))[key_heads]
            vh = vc.view(s.HV, s.DV)[value_heads]
            beta = recipe.beta_scale * torch.sigmoid(b[t].double().flatten()[value_heads])
            x = a[t].double().flatten()[value_heads] + bias
            decay = torch.exp(-rate * torch.logaddexp(x, torch.zeros_like(x)))  # logaddexp(x, 0) = softplus(x)
            S = decay[:, None, None] * S
            delta = beta[:, None] * (vh - torch.einsum("hkv,hk->hv", S, kh))
            S = S + kh[:, :, None] * delta[:, None, :]
            o = torch.einsum("hkv,hk->hv", S, qh)
            o = weights.norm.double() * o * torch.rsqrt(o.square().mean(-1, keepdim=True) + recipe.eps)
            out[t] = (o * activation(z[t].double().reshape(s.HV, s.DV)[value_heads])).flatten()
        conv_state[i, channels] = taps[channels].to(conv_state.dtype)
        recurrent_state[i, value_heads] = S.to(recurrent_state.dtype)
    return out
