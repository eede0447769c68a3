"""The package made to capture on the CPU, with a stand-in for the graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from recorded_graph import Pool, RecordedGraph

import qwen_fastdecode as qf
from qwen_fastdecode.graph import call, capture, eligible, norms, state


class Event:
    """PyTorch has none for the CPU."""

    def __init__(self, **_: Any) -> None:
        pass

    def record(self) -> None:
        pass

    synchronize = record


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Everything but the graph itself is the package's own. Norms are upstream's, as Triton's interpreter would take
    most of a test's time for them."""
    yield from without_norms(monkeypatch)


def without_norms(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The same for whoever is no test: a rank."""
    monkeypatch.setattr(norms, "zero_centred_norm", lambda module: None)
    yield from _capturing(monkeypatch)


@pytest.fixture
def stand_in_with_norms(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Everything but the graph itself is the package's own."""
    yield from _capturing(monkeypatch)


def _capturing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(eligible, "device_is_supported", lambda device: True)
    monkeypatch.setattr(eligible, "group_is_supported", lambda ranks: True)
    monkeypatch.setattr(capture, "recorder", RecordedGraph)
    monkeypatch.setattr(state, "Pool", Pool)
    monkeypatch.setattr(call, "worth_it", lambda eager_ms, replay_ms: True)
    monkeypatch.setattr(torch, "Event", Event)
    yield
    qf.unpatch()
    assert RecordedGraph.living == 0


def captured(model: torch.nn.Module) -> None:
    """Patches, with `cuda_graph=True`."""
    qf.patch(model, backend="torch", cuda_graph=True)
