"""What `patch`, `unpatch` and `status` call: `refresh` after plans came or went, `describe`."""

from __future__ import annotations

from collections import Counter

from torch import nn

from ..layer import everything
from ..layer.install import touched_layers
from ..layer.plan import plan_of
from ..report import GraphStatus
from . import install
from .state import State, forget, gone, states, wanted


def refresh() -> None:
    """After plans came or went: the stand-ins are on where a plan wants them, states go from models that have none."""
    for model in states():
        if not wanted(model):
            forget(model)
    if _anybody():
        install.ensure_installed()
    else:
        install.remove()


def _anybody() -> bool:
    settings = everything.current_settings()
    if settings is not None and settings.cuda_graph:
        return True
    plans = [plan_of(layer) for layer, _ in touched_layers()]
    return any(plan is not None and plan.settings.cuda_graph for plan in plans)


def describe(model: nn.Module | None = None) -> GraphStatus | None:
    """What was done for `model`, or for all models; None where none has a state."""
    found = _states_in(model)
    if not found:
        return None
    reasons: Counter[str] = Counter()
    details: dict[str, str] = {}
    totals: Counter[str] = Counter()
    left: Counter[str] = Counter()
    worst = 0.0
    for own in found:
        own.settle()
        reasons.update({str(reason): count for reason, count in own.reasons.items()})
        details.update({str(reason): detail for reason, detail in own.details.items()})
        worst = max(worst, own.worst)
        for name in ("captures", "compared", "replays", "tokens", "grouped_calls"):
            totals[name] += getattr(own, name)
        if own.norms is not None:
            totals.update(norms=own.norms.in_one, norms_in_three=own.norms.in_three)
            left.update(own.norms.reasons)
    return GraphStatus(worst=worst, norms_left=dict(left), reasons=dict(reasons), details=details, **totals)


def reset_counters(model: nn.Module | None = None) -> None:
    """Has what `describe` says begin anew."""
    for own in _states_in(model):
        own.settle()
        own.reset_counters()


def _states_in(model: nn.Module | None) -> list[State]:
    if model is None:
        return [*states().values(), *gone()]
    inside = {id(module) for module in model.modules()}
    return [own for one, own in states().items() if id(one) in inside]
