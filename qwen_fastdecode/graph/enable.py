"""Enable, disable, describe: what `patch(model, cuda_graph=True)`, `unpatch` and `status` call."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers.generation.utils import GenerationMixin

from . import install, state
from .state import STATE, State

_states: weakref.WeakKeyDictionary[nn.Module, State] = weakref.WeakKeyDictionary()
_everything: Callable[[Any], bool] | None = None

HINT = "patch(model, cuda_graph=True) also runs decode steps of generate as one CUDA graph: docs/cuda-graph.md"


@dataclass(frozen=True)
class GraphStatus:
    """What `cuda_graph=True` has done so far; `str()` is a few lines to read."""

    models: int = 0  # that have it
    captures: int = 0
    compared: int = 0  # captures whose first replay was compared with an eager step
    worst: float = 0.0  # of those, the largest relative distance
    replays: int = 0
    tokens: int = 0  # that replays gave: one a sequence
    grouped_calls: int = 0  # calls in which experts kept grouped_mm while decoding
    reasons: dict[str, int] = field(default_factory=dict)  # calls, or the rest of them, that ran eagerly
    details: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [
            f"cuda_graph: {self.captures} captured, {self.replays} replays, {self.tokens} tokens; "
            f"{self.compared} of {self.captures} first replays were compared with an eager step (distance "
            f"{self.worst:.1e})"
        ]
        if self.grouped_calls:
            lines.append(f"cuda_graph: experts kept grouped_mm while decoding in {self.grouped_calls} calls")
        for reason, count in sorted(self.reasons.items()):
            detail = f" ({self.details[reason]})" if reason in self.details else ""
            lines.append(f"cuda_graph: eager: {reason}: {count}{detail}")
        return "\n".join(lines)


def enable(model: nn.Module) -> None:
    """Gives every model in `model` that can generate a state, unless it has one."""
    found = [*generating(model)]
    if found:
        install.ensure_installed()
    for one in found:
        if vars(one).get(STATE) is None:
            vars(one)[STATE] = _states[one] = State()


def disable(model: nn.Module | None = None) -> None:
    """Takes the states away, and with the last of them the stand-ins; with None from every model."""
    for one in list(_states) if model is None else [*generating(model)]:
        own = _states.pop(one, None)
        vars(one).pop(STATE, None)
        if own is not None:
            own.active = False
    release()


def exclude(model: nn.Module) -> None:
    """While `cuda_graph=True` is on for everything, this model is left to upstream."""
    disable(model)
    for one in generating(model):
        vars(one)[STATE] = None


def everything(serves: Callable[[Any], bool] | None) -> None:
    """Every model for which `serves` is true gets a state when it first generates; None ends that."""
    global _everything
    _everything = serves
    state.adopt = None if serves is None else _adopt
    if serves is not None:
        install.ensure_installed()
    release()


def release() -> None:
    """Takes the stand-ins off if they serve nobody."""
    if _everything is None and not _states:
        install.remove()


def describe(model: nn.Module | None = None) -> GraphStatus | None:
    """What was done for `model`, or for all models; None where none has a state."""
    models = list(_states) if model is None else [one for one in generating(model) if one in _states]
    if not models:
        return None
    reasons: Counter[str] = Counter()
    details: dict[str, str] = {}
    totals: Counter[str] = Counter()
    worst = 0.0
    for own in map(_states.__getitem__, models):
        own.settle()
        reasons.update({str(reason): count for reason, count in own.reasons.items()})
        details.update({str(reason): detail for reason, detail in own.details.items()})
        worst = max(worst, own.worst)
        for name in ("captures", "compared", "replays", "tokens", "grouped_calls"):
            totals[name] += getattr(own, name)
    return GraphStatus(models=len(models), worst=worst, reasons=dict(reasons), details=details, **totals)


def has(model: nn.Module) -> bool:
    """Whether `cuda_graph=True` is on for a model."""
    return any(one in _states for one in generating(model))


def generating(model: nn.Module) -> Iterator[Any]:
    """The models in a model that have Transformers' `generate` (adapters wrap it)."""
    return (module for module in model.modules() if isinstance(module, GenerationMixin))


def _adopt(model: Any) -> State | None:
    if _everything is None or not isinstance(model, nn.Module) or not _everything(model):
        return None
    vars(model)[STATE] = own = _states[model] = State()
    return own
