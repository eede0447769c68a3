"""`deferred_state=True` with `cuda_graph=True`, on the CPU with a stand-in for the graph: replays move the cursor."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from cuda_graph_stand_in import stand_in
from models import LINEAR, PROMPT, build, cache_tensors, generate
from small_rings import small_rings
from test_cuda_graph import ENDS, Meddler
from tolerances import DRIFT, relative_rms
from transformers import LogitsProcessorList

import qwen_fastdecode as qf
from qwen_fastdecode import graph
from qwen_fastdecode.graph import caches, call, state
from qwen_fastdecode.upstream.unsettled import Unsettled

pytestmark = pytest.mark.usefixtures(stand_in.__name__, small_rings.__name__)
KEPT = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}


def captured(model: Any) -> None:
    qf.patch(model, backend="torch", cuda_graph=True, deferred_state=True)


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_next"])
def test_the_same_tokens_from_replays(family: str) -> None:
    model = build(family)
    expected = generate(model, 24)
    captured(model)
    assert torch.equal(generate(model, 24), expected)
    found = graph.describe(model)
    assert (found.captures, found.compared, found.replays, found.reasons) == (1, 1, 21, {})
    assert found.worst == 0.0  # the ring and its cursor are among what is compared
    status = qf.status(model)
    assert status.fast_steps == status.deferred_steps == 23 * LINEAR


def test_a_cursor_that_is_elsewhere_is_a_difference() -> None:
    """Integers are compared as well: a replay that did not count its step would be noticed."""
    one, two = torch.tensor([[3, 3]], dtype=torch.int32), torch.tensor([[3, 4]], dtype=torch.int32)
    assert call._distance([one], [one]) == 0
    assert call._distance([two], [one]) > max(call.DISTANCE.values())


def test_the_cache_that_comes_back_is_settled_by_who_reads_it() -> None:
    model = build()
    expected = model.generate(PROMPT, **KEPT)
    captured(model)
    found = model.generate(PROMPT, **KEPT)
    assert graph.describe(model).replays == 17
    linear = [layer for layer in found.past_key_values.layers if isinstance(layer, Unsettled)]
    assert len(linear) == LINEAR
    pairs = zip(cache_tensors(found.past_key_values), cache_tensors(expected.past_key_values), strict=True)
    assert all(relative_rms(mine, theirs) < DRIFT for mine, theirs in pairs)
    assert not any(isinstance(layer, Unsettled) for layer in linear)  # no graph holds them any more


def test_a_long_call_grows_and_captures_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caches, "STEP", 8)
    model = build()
    expected = generate(model, 80)
    captured(model)
    assert torch.equal(generate(model, 80), expected)
    assert graph.describe(model).captures == 5
    assert qf.status(model).deferred_steps == 79 * LINEAR


def _cache_layers() -> list[Any]:
    """Of the call that is under way, those of gated DeltaNet layers."""
    return [x for x in state.innermost()._growing.static.layers if "recurrent_states" in vars(x)]


def _recurrent(layer: Any) -> torch.Tensor:
    held = layer.recurrent_states
    return held[0] if isinstance(held, dict) else held


def _halve(model: Any) -> None:
    for layer in _cache_layers():
        _recurrent(layer).mul_(0.5)


def _reset(model: Any) -> None:
    for layer in _cache_layers():
        layer.reset()
        for name in ("has_previous_state",):  # the next step is a decode step all the same: on states of zero
            value = getattr(layer, name)
            setattr(layer, name, dict.fromkeys(value, True) if isinstance(value, dict) else True)


def _reorder(model: Any) -> None:
    for layer in _cache_layers():
        layer.reorder_cache(torch.tensor([1, 0]))


def _read(model: Any, found: list[torch.Tensor]) -> None:
    found += [_recurrent(layer).clone() for layer in _cache_layers()]


@pytest.mark.parametrize("act", [_halve, _reset, _reorder])
@pytest.mark.parametrize("step", [2, 3, 8, 9, 12])
def test_what_is_done_to_the_states_between_replays(act: Callable[[Any], None], step: int) -> None:
    """Beside the same call on the same caches without a ring."""
    tokens = []
    for deferred in (False, True):
        model = build()
        qf.patch(model, backend="torch", cuda_graph=True, deferred_state=deferred)
        processors = LogitsProcessorList([Meddler(partial(act, model), step)])
        tokens.append(generate(model, 24, logits_processor=processors))
        assert graph.describe(model).replays >= 17
    assert torch.equal(*tokens)


def test_who_reads_at_every_step_sees_the_truth_and_replays_go_on() -> None:
    seen: list[list[torch.Tensor]] = []
    for deferred in (False, True):
        model, found = build(), []
        qf.patch(model, backend="torch", cuda_graph=True, deferred_state=deferred)
        readers = LogitsProcessorList([Meddler(partial(_read, model, found), step) for step in range(2, 20)])
        generate(model, 24, logits_processor=readers)
        counts = graph.describe(model)
        assert (counts.captures, counts.replays) == (1, 21)
        seen.append(found)
    assert len(seen[0]) == 18 * LINEAR
    assert all(relative_rms(mine, theirs) < DRIFT for theirs, mine in zip(*seen, strict=True))


@pytest.mark.parametrize("reason", ENDS)
def test_what_ends_replaying_during_a_call(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN_FASTDECODE", "1")
    model = build()
    expected = generate(model, 24)
    captured(model)
    own = state.state_of(model)
    processors = LogitsProcessorList([Meddler(partial(ENDS[reason], model))])
    assert torch.equal(generate(model, 24, logits_processor=processors), expected)
    assert (own.captures, own.replays) == (1, 5)
    assert {str(found): count for found, count in own.reasons.items()} == {reason: 1}


def test_a_prompt_whose_last_chunk_is_one_token() -> None:
    """The step before the call is captured has left a debt already."""
    model, prompt = build(), torch.cat([PROMPT, PROMPT[:, :1]], dim=1)
    expected = generate(model, 20, prompt, prefill_chunk_size=3)
    captured(model)
    assert torch.equal(generate(model, 20, prompt, prefill_chunk_size=3), expected)
    assert graph.describe(model).reasons == {}
    assert graph.describe(model).replays == 17
