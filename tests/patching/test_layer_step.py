"""One decode step of one layer on real hidden states: upstream's and ours beside the float64 reference."""

from __future__ import annotations

import copy
import logging
from typing import Any, NamedTuple

import pytest
import torch
from models import TRAINED, call_layer, forward, linear_layers, load, prompt
from tolerances import BFLOAT16_UPSTREAM, FLOAT32, relative_rms
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

import qwen_fastdecode as qf
from qwen_fastdecode.layer.plan import plan_of
from qwen_fastdecode.ops.reference import decode_reference
from qwen_fastdecode.ops.step import States, Step
from qwen_fastdecode.upstream.caches import read_states
from qwen_fastdecode.upstream.calls import cache_name

STEPS = 6  # decode steps of a text that is given


class Call(NamedTuple):
    """What a layer was called with at a decode step, before it changed its states."""

    layer: Any
    hidden_states: Tensor  # [B, 1, hidden size]
    cache: Any


class Result(NamedTuple):
    """What a decode step gives: the input of the output projection, and the states."""

    out: Tensor  # [B, HV * DV]
    conv: Tensor  # [B, C, W]
    recurrent: Tensor  # [B, HV, DK, DV]


def decode_calls(model: PreTrainedModel, tokens: Tensor) -> list[Call]:
    """Every call of a gated DeltaNet layer while the last STEPS tokens [B, T] are decoded by upstream."""
    calls: list[Call] = []

    def keep(layer: Any, args: Any, kwargs: Any) -> None:
        hidden_states = args[0] if args else kwargs["hidden_states"]
        calls.append(Call(layer, hidden_states.clone(), copy.deepcopy(kwargs[cache_name(kwargs)])))

    _, cache = forward(model, tokens[:, :-STEPS])
    hooks = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in linear_layers(model)]
    for token in tokens[:, -STEPS:].split(1, dim=1):
        _, cache = forward(model, token, cache)
    for hook in hooks:
        hook.remove()
    return calls


@torch.no_grad()
def run(call: Call) -> Result:
    """The layer as it now is, from a copy of the states."""
    cache, outs = copy.deepcopy(call.cache), []
    with call.layer.out_proj.register_forward_pre_hook(lambda module, args: outs.append(args[0].flatten(1))):
        call_layer(call.layer, call.hidden_states, cache)
    return Result(outs[0], *read_states(cache, call.layer.layer_idx))


@torch.no_grad()
def reference(call: Call) -> Result:
    """The same step in float64, from the same projections."""
    layer, plan = call.layer, plan_of(call.layer)
    states = read_states(call.cache, layer.layer_idx)
    conv, recurrent = states.conv.double(), states.recurrent.double()
    full = plan.strategy
    parts = plan.family.parts(layer)
    sources, weights = parts.project(call.hidden_states), parts.weights
    step = Step(sources, full.read, States(conv, recurrent), weights)
    return Result(decode_reference(step, full.recipe), conv, recurrent)


def compare(checkpoint: str, dtype: torch.dtype) -> tuple[Result, Result, Result]:
    """Upstream's, ours and the reference's results, of all layers and steps together."""
    model = load(checkpoint, dtype)
    calls = decode_calls(model, prompt(checkpoint))
    upstreams = [run(call) for call in calls]
    qf.patch(model)
    ours, exact = [run(call) for call in calls], [reference(call) for call in calls]
    assert qf.status(model).fast_steps == len(calls) == STEPS * len(linear_layers(model))
    return tuple(
        Result(*(torch.stack([x.double() for x in part]) for part in zip(*results, strict=True)))
        for results in (upstreams, ours, exact)
    )


@pytest.mark.parametrize("checkpoint", TRAINED)
def test_in_bfloat16_we_are_nearer_to_the_truth_than_upstream(checkpoint: str) -> None:
    upstreams, ours, exact = compare(checkpoint, torch.bfloat16)
    assert relative_rms(ours.out, exact.out) <= relative_rms(upstreams.out, exact.out)
    assert relative_rms(ours.recurrent, exact.recurrent) <= relative_rms(upstreams.recurrent, exact.recurrent)
    assert relative_rms(ours.out, upstreams.out) < BFLOAT16_UPSTREAM
    assert relative_rms(ours.recurrent, upstreams.recurrent) < BFLOAT16_UPSTREAM
    assert torch.equal(ours.conv, upstreams.conv)


@pytest.mark.parametrize("checkpoint", TRAINED)
def test_in_float32_the_step_is_exact(checkpoint: str) -> None:
    upstreams, ours, exact = compare(checkpoint, torch.float32)
    assert relative_rms(ours.out, exact.out) < FLOAT32
    assert relative_rms(ours.recurrent, exact.recurrent) < FLOAT32
    assert torch.equal(ours.conv, upstreams.conv)


class CountOperators(TorchDispatchMode):
    """Counts what a step dispatches, views aside."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not function.is_view
        return function(*args, **kwargs or {})


@torch.no_grad()
def operators(call: Call) -> int:
    with CountOperators() as counter:
        call_layer(call.layer, call.hidden_states, call.cache)
    return counter.count


@pytest.mark.parametrize("checkpoint", TRAINED)
def test_a_step_is_few_operators_and_logs_nothing(checkpoint: str, caplog: pytest.LogCaptureFixture) -> None:
    model = load(checkpoint, torch.bfloat16)
    call = decode_calls(model, prompt(checkpoint))[0]
    before = operators(call)
    qf.patch(model)
    run(call)  # the first step prepares what the others use again
    caplog.clear()
    with caplog.at_level(logging.DEBUG):
        after = operators(call)
    assert after < before
    assert caplog.records == []
