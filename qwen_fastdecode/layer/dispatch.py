"""The function that stands in for upstream's forward: a fast decode step where it can be one, else the original."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..names import EXCLUDED, PLAN
from ..ops.library import decode_registered
from ..reasons import Reason
from ..steps.split import HeadSplit, complete
from ..upstream.caches import DecodeStates, Partial, convert_recurrent_state
from ..upstream.calls import Call, call_reader
from .eligibility import decode_states
from .plan import DecodePlan

_PROMPT = (Reason.SEVERAL_TOKENS, Reason.NO_PREVIOUS_STATE)  # calls that leave a state for the next one to decode from

# While `patch()` of everything is on: makes the plan of a layer that has none yet; None if it cannot be covered.
adopt: Callable[[Any], DecodePlan | None] | None = None


@functools.cache  # copies of a model with hooks stay bound to it: a later patch must know it again
def make_dispatcher(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A plain function to install over `original` (Dynamo would trace through a wrapper object to the original)."""

    read = call_reader(original)

    @functools.wraps(original)
    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        plan = self.__dict__.get(PLAN)
        if plan is None and adopt is not None:
            plan = _adopt(self)
        call = None if plan is None or plan is EXCLUDED else read(args, kwargs)
        if call is None:  # not ours, or one that upstream refuses
            return original(self, hidden_states, *args, **kwargs)
        states = decode_states(plan, self, hidden_states, call)
        if isinstance(states, Reason):
            _before_upstream(plan, self, call, states)
            out = original(self, hidden_states, *args, **kwargs)
            _after_upstream(plan, self, hidden_states, call, states)
            return out
        return _fast_step(plan, self, hidden_states, call, _convert(plan, self, call, states))

    return forward


def _before_upstream(plan: DecodePlan, layer: Any, call: Call, reason: Reason) -> None:
    if plan.split is not None:
        complete(call.cache, layer.layer_idx)  # upstream reads every head's states
    if not torch.compiler.is_dynamo_compiling():  # a counter that is traced recompiles the graph every step
        plan.count_fallback(reason)


def _after_upstream(plan: DecodePlan, layer: Any, hidden_states: Tensor, call: Call, reason: Reason) -> None:
    """A prompt's pass leaves a state that the next step decodes from: it is converted here, where nothing compiles."""
    if plan.settings.state_dtype is not None and reason in _PROMPT:
        states = decode_states(plan, layer, hidden_states[:, -1:], call._replace(attention_mask=None))
        if not isinstance(states, Reason):
            _convert(plan, layer, call, states)


def _convert(plan: DecodePlan, layer: Any, call: Call, states: DecodeStates) -> DecodeStates:
    """The states, the recurrent one in the dtype that `patch` was asked for.

    Not while compiling: a captured graph must not own a tensor that outlives it. A step that is compiled therefore
    takes the state as it is, which an eager prompt's pass has converted (`generate` does not compile that one).
    """
    dtype = plan.settings.state_dtype
    if dtype is None or dtype == states.recurrent.dtype or torch.compiler.is_compiling():
        return states
    return states._replace(recurrent=convert_recurrent_state(call.cache, layer.layer_idx, dtype))


def _fast_step(plan: DecodePlan, layer: Any, hidden_states: Tensor, call: Call, states: DecodeStates) -> Tensor:
    """On all heads or, under tensor parallelism and where that pays, on this rank's."""
    split = plan.split
    if split is None:
        return decode_step(plan, layer, hidden_states, states)
    if split.serves(hidden_states.shape[0]):
        Partial.put(call.cache.layers[layer.layer_idx], split)
        return split_step(plan, split, layer, hidden_states, states)
    complete(call.cache, layer.layer_idx)
    return decode_step(plan, layer, hidden_states, states)


@torch.compiler.assume_constant_result  # Dynamo calls it while it traces, instead of tracing it
def _adopt(layer: Any) -> DecodePlan | None:
    return None if adopt is None else adopt(layer)


def decode_step(plan: DecodePlan, layer: Any, hidden_states: Tensor, states: DecodeStates) -> Tensor:
    """hidden_states [B, 1, hidden size] -> the layer's output, of the same shape; both states are updated in place.

    The projections are called as modules (adapters, quantised weights and tensor parallelism live there).
    """
    views = plan.family.project(layer, hidden_states, plan.sizes)
    weights = plan.family.weights(layer)
    if torch.compiler.is_compiling():
        out = decode_registered(*views, *states, *weights, backend=plan.settings.backend, **plan.options)
    else:
        out = plan.backend_on(hidden_states.device).decode(*views, *states, *weights, **plan.options)
        plan.count_fast_step(split=False)
    return plan.family.project_out(layer, out)


def split_step(plan: DecodePlan, split: HeadSplit, layer: Any, hidden_states: Tensor, states: DecodeStates) -> Tensor:
    """`decode_step` on this tensor-parallel rank's heads: only their states are updated, and their outputs gathered."""
    views = split.project(layer, hidden_states)
    weights = plan.family.weights(layer)
    out = plan.backend_on(hidden_states.device).decode(*views, *states, *weights, **plan.rank_options)
    plan.count_fast_step(split=True)
    return plan.family.project_out(layer, split.gather(out))
