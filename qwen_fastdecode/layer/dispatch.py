"""The function that stands in for upstream's forward: a fast decode step where it can be one, else the original."""

from __future__ import annotations

import functools
import inspect
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedStep
from ..names import EXCLUDED, PLAN
from ..ops.step import States, overlaps
from ..reasons import Reason
from ..steps.full import settle_outside_graphs
from ..upstream.caches import cache_layer, convert_recurrent_state
from ..upstream.calls import Call, call_reader
from ..upstream.families import Parts
from ..upstream.protocols import Forward, GatedDeltaNet
from ..upstream.unsettled import Unsettled, settle
from .eligibility import decode_step
from .plan import Plan

_PROMPT = (Reason.SEVERAL_TOKENS, Reason.NO_PREVIOUS_STATE)  # calls that leave a state for the next one to decode from
_originals: weakref.WeakKeyDictionary[Forward, Forward] = weakref.WeakKeyDictionary()

# While `patch()` of everything is on: makes the plan of a layer that has none yet; None if it cannot be covered.
adopt: Callable[[GatedDeltaNet], Plan | None] | None = None


@functools.cache  # copies of a model with hooks stay bound to it: a later patch must know it again
def make_dispatcher(original: Forward) -> Forward:
    """A plain function to install over `original` (Dynamo would trace through a wrapper object to the original)."""

    read = call_reader(original)

    @functools.wraps(original)
    def forward(self: GatedDeltaNet, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        plan: Any = self.__dict__.get(PLAN)  # or EXCLUDED, or None
        if plan is None and adopt is not None:
            plan = _adopt(self)
        call = None if plan is None or plan is EXCLUDED else read(args, kwargs)
        if call is None:  # not ours, or one that upstream refuses
            return original(self, hidden_states, *args, **kwargs)
        out = _decode(plan, self, hidden_states, call)
        if not isinstance(out, Reason):
            return out
        _before_upstream(plan, self, call, reason := out)
        out = original(self, hidden_states, *args, **kwargs)
        _after_upstream(plan, self, hidden_states, call, reason)
        return out

    _originals[forward] = original
    return forward


def original_of(forward: Any) -> Forward | None:
    """What one of our dispatchers stands over; None for any other function."""
    return _originals.get(forward) if inspect.isfunction(forward) else None


def _decode(plan: Plan, layer: GatedDeltaNet, hidden_states: Tensor, call: Call) -> Tensor | Reason:
    """The layer's output by a fast step, or why there is none."""
    found = decode_step(plan, layer, hidden_states, call)
    if isinstance(found, Reason):
        return found
    parts, states = found
    states = _convert(plan, layer, call, states)
    its_cache = cache_layer(call.cache, layer.layer_idx)
    step = plan.strategy.choose(states, its_cache)
    if torch.compiler.is_compiling():  # counters would be guarded, and recompile the graph every step
        if _refused_in_graphs(plan, parts, states):
            return Reason.UNSUPPORTED_STEP
        return step.run(parts, hidden_states, its_cache, states)
    try:
        out = step.run(parts, hidden_states, its_cache, states)
    except UnsupportedStep as error:
        plan.unsupported = str(error)
        return Reason.UNSUPPORTED_STEP
    plan.count_fast_steps(split=step.splits_heads, deferred=step.defers)
    return out


def _refused_in_graphs(plan: Plan, parts: Parts, states: States) -> bool:
    """Of what a backend refuses, that which would otherwise show only when the graph runs."""
    if overlaps(states.conv) or overlaps(states.recurrent):
        return True
    if all(x.dtype != torch.float64 for x in (*states, *parts.weights)):
        return False
    return plan.strategy.backends.on(states.conv.device).name == "triton"  # (a look-up that Dynamo would guard)


def _before_upstream(plan: Plan, layer: GatedDeltaNet, call: Call, reason: Reason) -> None:
    its_cache = cache_layer(call.cache, layer.layer_idx)
    if isinstance(its_cache, Unsettled):
        settle_outside_graphs(its_cache)  # by all ranks at once, as they all come here
    if not torch.compiler.is_dynamo_compiling():  # a counter that is traced recompiles the graph every step
        plan.count_fallback(reason)
        if reason is Reason.GRAD_ENABLED:
            _say_that_gradients_cost_the_fast_path()


def _after_upstream(plan: Plan, layer: GatedDeltaNet, hidden_states: Tensor, call: Call, reason: Reason) -> None:
    """A prompt's pass leaves a state that the next step decodes from: it is converted here, where nothing compiles."""
    if plan.settings.state_dtype is not None and reason in _PROMPT:
        # The prompt's mask says nothing of the token that follows it.
        found = decode_step(plan, layer, hidden_states[:, -1:], call._replace(attention_mask=None))
        if not isinstance(found, Reason):
            _convert(plan, layer, call, found[1])


def _convert(plan: Plan, layer: GatedDeltaNet, call: Call, states: States) -> States:
    """The states, the recurrent one in the dtype that `patch` was asked for.

    Not while compiling: a captured graph must not own a tensor that outlives it. A step that is compiled therefore
    takes the state as it is, which an eager prompt's pass has converted (`generate` does not compile that one).
    """
    dtype = plan.settings.state_dtype
    if dtype is None or dtype == states.recurrent.dtype or torch.compiler.is_compiling():
        return states
    assert call.cache is not None  # it has states
    settle(cache_layer(call.cache, layer.layer_idx))
    return states._replace(recurrent=convert_recurrent_state(call.cache, layer.layer_idx, dtype))


@functools.cache  # once a process
def _say_that_gradients_cost_the_fast_path() -> None:
    warnings.warn(
        "a decode step ran with gradients enabled, so Transformers served it: put a loop by hand under torch.no_grad() "
        "(generate does it itself). This is said once",
        stacklevel=4,
    )


@torch.compiler.assume_constant_result  # Dynamo calls it while it traces, instead of tracing it
def _adopt(layer: GatedDeltaNet) -> Plan | None:
    return None if adopt is None else adopt(layer)
