"""`cuda_graph=True` on the CPU, with a stand-in for the graph: what is said, what stays eager, what is undone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from models import LINEAR, build, generate
from recorded_graph import Pool, RecordedGraph

import qwen_fastdecode as qf
from qwen_fastdecode import graph
from qwen_fastdecode.graph import call, capture, eligible, state

FAMILIES = ["qwen3_5", "qwen3_next", "qwen3_5_moe", "qwen3_5 with vision"]


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(eligible, "device_is_supported", lambda device: True)
    monkeypatch.setattr(capture, "recorder", RecordedGraph)
    monkeypatch.setattr(state, "Pool", Pool)
    monkeypatch.setattr(call, "worth_it", lambda eager_ms, replay_ms: True)
    yield
    graph.disable()
    assert RecordedGraph.living == 0


def captured(model: torch.nn.Module) -> None:
    qf.patch(model, backend="torch")
    graph.enable(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_tokens_from_replays(family: str) -> None:
    model = build(family)
    expected = generate(model, 24)
    captured(model)
    assert torch.equal(generate(model, 24), expected)
    found = graph.describe(model)
    print(found)
    assert (found.captures, found.compared, found.replays, found.tokens) == (1, 1, 21, 42)
    assert found.reasons == {}
    assert qf.status(model).fast_steps == 23 * LINEAR
