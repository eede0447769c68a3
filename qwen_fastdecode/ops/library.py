"""The decode step as a registered PyTorch operator, for torch.compile: one node of the graph, mutations declared.

Eager code calls a backend directly; passing through the dispatcher costs several times a launch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .backends import select_backend

_LIBRARY = torch.library.Library("qwen_fastdecode", "DEF")
_LIBRARY.define(
    "gated_delta_decode("
    "Tensor q, Tensor k, Tensor v, Tensor z, Tensor b, Tensor a, Tensor(a!) conv_state, Tensor(b!) recurrent_state, "
    "Tensor conv_weight, Tensor A_log, Tensor dt_bias, Tensor norm_weight, "
    "float eps, str gate, float beta_scale, str backend, Tensor? cu_seqlens, int first_head, int head_count) -> Tensor",
    # The kernel takes strides as they are, so the compiler must not lay an argument out anew (q to a have unit stride).
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)


@torch.library.impl(_LIBRARY, "gated_delta_decode", "CompositeExplicitAutograd")
def _decode(
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
    eps: float,
    gate: str,
    beta_scale: float,
    backend: str,
    cu_seqlens: Tensor | None,
    first_head: int,
    head_count: int,
) -> Tensor:
    tensors = (q, k, v, z, b, a, conv_state, recurrent_state, conv_weight, A_log, dt_bias, norm_weight)
    decode = select_backend(backend, v.device).decode
    options = {"eps": eps, "gate": gate, "beta_scale": beta_scale, "cu_seqlens": cu_seqlens}
    return decode(*tensors, **options, heads=(first_head, head_count))


@torch.library.register_fake("qwen_fastdecode::gated_delta_decode", lib=_LIBRARY)
def _fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    head_count = rest[-1]
    return v.new_empty(v.shape[0], head_count * v.shape[3])


def decode_registered(
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
    eps: float,
    gate: str,
    beta_scale: float = 1.0,
    backend: str,
    cu_seqlens: Tensor | None,
    heads: tuple[int, int],
) -> Tensor:
    """`gated_delta_decode`, its arguments unchecked, as the operator qwen_fastdecode::gated_delta_decode."""
    tensors = (q, k, v, z, b, a, conv_state, recurrent_state, conv_weight, A_log, dt_bias, norm_weight)
    options = eps, gate, beta_scale, backend, cu_seqlens
    return torch.ops.qwen_fastdecode.gated_delta_decode(*tensors, *options, *heads)
