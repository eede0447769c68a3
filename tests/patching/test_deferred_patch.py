"""`patch(model, deferred_state=True)`: what is refused, and what a report says of steps in two passes after all."""

from __future__ import annotations

import json

import pytest
import torch
from models import LINEAR, build, forward, generate, linear_layers

import qwen_fastdecode as qf
from qwen_fastdecode.errors import PatchError
from qwen_fastdecode.layer import cover
from qwen_fastdecode.layer.plan import plan_of
from qwen_fastdecode.ops.deferral import deferral
from qwen_fastdecode.ops.step import States
from qwen_fastdecode.upstream.caches import ARE_WATCHED

watched = pytest.mark.skipif(not ARE_WATCHED, reason="refused: see the test of caches that cannot be watched")


@watched
def test_the_torch_backend_says_that_it_takes_two_passes() -> None:
    model = build()
    expected = generate(model, 8)
    report = qf.patch(model, backend="torch", deferred_state=True)
    assert "deferred_state: two passes on the torch backend, which gains nothing" in str(report)
    assert torch.equal(generate(model, 8), expected)
    status = qf.status(model)
    assert (status.fast_steps, status.deferred_steps, status.ring_bytes) == (7 * LINEAR, 0, 0)
    assert "two passes on the torch backend" in str(status)


@watched
def test_a_small_batch_takes_two_passes_and_the_report_says_so() -> None:
    model = build()
    assert "deferred_state" not in str(qf.patch(model, backend="triton", deferred_state=True))
    generate(model, 4)
    status = qf.status(model)
    assert (status.fast_steps, status.deferred_steps) == (3 * LINEAR, 0)
    assert "deferred_state: two passes below 64 sequences" in str(status)


@watched
def test_from_how_many_sequences_on_is_the_tables_choice() -> None:
    """128 sequences x key heads of float32 states: 64 sequences of a model with two key heads."""
    found = deferral("triton", torch.float32)
    assert found is not None
    assert (found.N, found.least_work) == (8, 128)
    model = build()
    qf.patch(model, backend="triton", deferred_state=True)
    tokens = torch.ones(64, 3, dtype=torch.int64)
    cache = forward(model, tokens)[1]
    layer = linear_layers(model)[0]
    states = cache.layers[layer.layer_idx]
    strategy = plan_of(layer).strategy  # type: ignore[union-attr]
    held = [vars(states)[name] for name in ("conv_states", "recurrent_states")]
    conv, recurrent = [x[0] if isinstance(x, dict) else x for x in held]
    whole = States(conv, recurrent)
    fewer = States(conv[:63], recurrent[:63])
    narrow = States(conv, recurrent.bfloat16())
    assert [strategy.choose(states_, states).defers for states_ in (whole, fewer, narrow)] == [True, False, False]


def test_caches_that_cannot_be_watched_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers up to 5.4; whichever is installed, as one of them."""
    monkeypatch.setattr(cover, "ARE_WATCHED", False)
    model = build()
    with pytest.raises(PatchError, match=r"deferred_state=True: got Transformers .*, expected 5\.5 or later"):
        qf.patch(model, deferred_state=True)
    assert plan_of(linear_layers(model)[0]) is None
    with pytest.raises(PatchError, match="deferred_state=True"):
        qf.patch(deferred_state=True)


@watched
def test_patching_everything_and_a_block() -> None:
    qf.patch(deferred_state=True, backend="triton")
    model = build()
    generate(model, 4)
    assert "two passes below 64 sequences" in str(qf.status(model))
    qf.unpatch()
    with qf.patched(model, deferred_state=True) as report:
        assert plan_of(linear_layers(model)[0]).settings.deferred_state  # type: ignore[union-attr]
        found = json.loads(json.dumps(report.to_dict()))
    assert (found["deferred_steps"], found["ring_bytes"]) == (0, 0)
