"""Registered PyTorch operators: the decode step, for torch.compile (one node of the graph, mutations declared), and the
norm that stands in for upstream's while a step is recorded.

Eager code calls a backend directly; passing through the dispatcher costs several times a launch.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from .backends import Backends
from .step import Recipe, States, Step, Tokens, Weights, check_values

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
def _decode(*arguments: Any) -> Tensor:
    tensors, (eps, gate, beta_scale, backend, cu_seqlens, *heads) = arguments[:12], arguments[12:]
    step = Step.of(Tokens(*tensors[:6]), States(*tensors[6:8]), Weights(*tensors[8:]), cu_seqlens)
    check_values(step)
    recipe = Recipe(tuple(heads), eps, gate, beta_scale)
    return _backends(backend).on(tensors[0].device).decode(step, recipe)


@cache  # a compiled graph asks at every step
def _backends(name: str) -> Backends:
    return Backends(name)


@torch.library.register_fake("qwen_fastdecode::gated_delta_decode", lib=_LIBRARY)
def _fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    head_count = rest[-1]
    return v.new_empty(v.shape[0], head_count * v.shape[3])


def decode_registered(step: Step, recipe: Recipe, backend: str) -> Tensor:
    """The step through the operator qwen_fastdecode::gated_delta_decode, which checks it when it runs."""
    options = recipe.eps, recipe.gate, recipe.beta_scale, backend, step.cu_seqlens, *recipe.heads
    return torch.ops.qwen_fastdecode.gated_delta_decode(*step.tokens, *step.states, *step.weights, *options)


_LIBRARY.define("zero_centred_rms_norm(Tensor x, Tensor weight, float eps, bool in_one) -> Tensor")


@torch.library.impl(_LIBRARY, "zero_centred_rms_norm", "CompositeExplicitAutograd")
def _rms_norm(x: Tensor, weight: Tensor, eps: float, in_one: bool) -> Tensor:
    from .triton.rms_norm import rms_norm

    return rms_norm(x, weight, eps, in_one)


def rms_norm_registered(x: Tensor, weight: Tensor, eps: float, in_one: bool) -> Tensor:
    """`triton.rms_norm.rms_norm` through the operator qwen_fastdecode::zero_centred_rms_norm: whoever records operators
    sees one, not what is launched in it."""
    return torch.ops.qwen_fastdecode.zero_centred_rms_norm(x, weight, eps, in_one)
