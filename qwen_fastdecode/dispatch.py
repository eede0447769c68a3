"""The function that stands in for upstream's forward: a fast decode step where it can be one, else the original."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .caches import DecodeStates, Partial
from .eligibility import decode_states
from .ops.library import decode_registered
from .plan import EXCLUDED, PLAN, DecodePlan
from .reasons import Reason
from .tensor_parallel import HeadSplit, complete

# While `patch()` of everything is on: makes the plan of a layer that has none yet; None if it cannot be covered.
adopt: Callable[[Any], DecodePlan | None] | None = None


@functools.cache  # copies of a model with hooks stay bound to it: a later patch must know it again
def make_dispatcher(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A plain function to install over `original` (Dynamo would trace through a wrapper object to the original)."""

    @functools.wraps(original)
    def forward(
        self: Any,
        hidden_states: Tensor,
        cache_params: Any = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        plan = self.__dict__.get(PLAN)
        if plan is None and adopt is not None:
            plan = _adopt(self)
        if plan is None or plan is EXCLUDED:
            return original(self, hidden_states, cache_params=cache_params, attention_mask=attention_mask, **kwargs)
        states = decode_states(plan, self, hidden_states, cache_params, attention_mask, kwargs)
        if isinstance(states, Reason):
            if plan.split is not None:
                complete(cache_params, self.layer_idx)  # upstream reads every head's states
            if not torch.compiler.is_dynamo_compiling():  # a counter that is traced recompiles the graph every step
                plan.count_fallback(states)
            return original(self, hidden_states, cache_params=cache_params, attention_mask=attention_mask, **kwargs)
        split = plan.split
        if split is not None and split.serves(hidden_states.shape[0]):
            Partial.put(cache_params.layers[self.layer_idx], split)
            return split_step(plan, split, self, hidden_states, states)
        if split is not None:
            complete(cache_params, self.layer_idx)
        return decode_step(plan, self, hidden_states, states)

    return forward


@torch.compiler.assume_constant_result  # Dynamo calls it while it traces, instead of tracing it
def _adopt(layer: Any) -> DecodePlan | None:
    return None if adopt is None else adopt(layer)


def decode_step(plan: DecodePlan, layer: Any, hidden_states: Tensor, states: DecodeStates) -> Tensor:
    """hidden_states [B, 1, hidden size] -> the layer's output, of the same shape; both states are updated in place.

    The projections are called as modules (adapters, quantised weights and tensor parallelism live there).
    """
    views = plan.family.project(layer, hidden_states, plan.sizes)
    weights = layer.conv1d.weight.squeeze(1), layer.A_log, layer.dt_bias, layer.norm.weight
    if torch.compiler.is_compiling():
        tensors = (*views, *states, *weights)
        out = decode_registered(
            *tensors, eps=plan.eps, gate=plan.gate, backend=plan.backend, cu_seqlens=None, heads=plan.all_heads
        )
    else:
        decode = plan.backend_on(hidden_states.device).decode
        out = decode(*views, *states, *weights, eps=plan.eps, gate=plan.gate, cu_seqlens=None, heads=plan.all_heads)
        plan.count_fast_step(split=False)
    return layer.out_proj(out.unsqueeze(1))  # [B, 1, HV * DV]


def split_step(plan: DecodePlan, split: HeadSplit, layer: Any, hidden_states: Tensor, states: DecodeStates) -> Tensor:
    """`decode_step` on this tensor-parallel rank's heads: only their states are updated, and their outputs gathered."""
    views = split.project(layer, hidden_states)
    weights = layer.conv1d.weight.squeeze(1), layer.A_log, layer.dt_bias, layer.norm.weight
    decode = plan.backend_on(hidden_states.device).decode
    out = decode(*views, *states, *weights, eps=plan.eps, gate=plan.gate, cu_seqlens=None, heads=plan.heads)
    plan.count_fast_step(split=True)
    return layer.out_proj(split.gather(out).unsqueeze(1))  # [B, 1, HV * DV]
