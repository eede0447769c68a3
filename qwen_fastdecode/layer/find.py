"""Finding gated DeltaNet layers, and saying of each what can be done with it. Changes nothing."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from torch import nn

from ..errors import LayerNotCovered, PatchError
from ..names import EXCLUDED, PLAN
from ..ops.backends import select_backend
from ..report import LayerStatus
from ..upstream.seams import Upstream, upstream_of
from . import install
from .plan import DEFAULT, Plan, Settings, make_plan, plan_of
from .review import Review, State, review


class FoundLayer(NamedTuple):
    """A gated DeltaNet layer: upstream's class (None: of no supported family), and a plan or why there can be none.

    `note`: what a report has to say about the class.
    """

    name: str
    module: nn.Module
    upstream: Upstream | None
    plan: Plan | PatchError
    note: str = ""


def find_layers(model: nn.Module, settings: Settings = DEFAULT) -> list[FoundLayer]:
    """Every gated DeltaNet layer in `model`, with the plan that it has if that is what is asked for, else a new one."""
    found = []
    for name, module in model.named_modules():
        upstream = upstream_of(type(module))
        if upstream is not None:
            found.append(inspect_layer(name, module, review(upstream), settings))
        elif type(module).__name__.endswith("GatedDeltaNet"):
            kind = f"{type(module).__module__}.{type(module).__qualname__}"
            found.append(FoundLayer(name, module, None, LayerNotCovered(f"{kind} is of no supported family")))
    return found


def living_layers() -> Iterator[tuple[nn.Module, Upstream]]:
    """Every gated DeltaNet layer of a supported family in the process, in the order of their creation."""
    gc.collect()  # a model that was deleted may lie in a reference cycle: it is neither patched nor refused
    kinds: dict[int, Upstream | None] = {}  # by id: somebody's class may not be hashable
    for thing in gc.get_objects():
        kind = type(thing)  # isinstance would ask proxies for a class that they load on demand
        if id(kind) not in kinds:
            kinds[id(kind)] = upstream_of(kind) if any(base is nn.Module for base in kind.__mro__) else None
        upstream = kinds[id(kind)]
        if upstream is not None:
            yield thing, upstream


def inspect_layer(name: str, module: nn.Module, verdict: Review, settings: Settings) -> FoundLayer:
    """What can be done with one layer whose class got this verdict."""
    upstream, error = verdict.upstream, verdict.error
    if error is not None:
        return FoundLayer(name, module, upstream, error)
    note = verdict.detail if verdict.state is State.VERIFIED else ""
    detour = install.bypass(module, upstream.layer_class)
    if detour is not None:
        return FoundLayer(name, module, upstream, LayerNotCovered(detour))
    current = plan_of(module)
    if current is not None and current.settings == settings and current.holds_for(module):
        return FoundLayer(name, module, upstream, current, note)
    plan = make_plan(module, name, upstream, settings)
    return FoundLayer(name, module, upstream, LayerNotCovered(plan) if isinstance(plan, str) else plan, note)


def describe(layer: FoundLayer, *, everything: bool) -> LayerStatus:
    """The layer as it is now; `everything`: a `patch()` of everything is on."""
    family = "unsupported" if layer.upstream is None else layer.upstream.family
    plan = plan_of(layer.module)
    status = LayerStatus(layer.name, family, "upstream", covered=False)
    if plan is not None:
        status = describe_plan(layer.name, layer.module, plan)
    if isinstance(layer.plan, PatchError):  # also of a layer that was changed after patching: it keeps its counters
        return replace(status, backend="upstream", covered=False, reason=str(layer.plan))
    if plan is not None:
        return status
    if vars(layer.module).get(PLAN) is EXCLUDED:  # None: the copy of a patched layer
        return replace(status, reason="excluded")
    if everything:
        return replace(status, backend=layer.plan.settings.backend, covered=True, reason="from its first use")
    return replace(status, reason="not patched")


def describe_plan(name: str, module: nn.Module, plan: Plan) -> LayerStatus:
    """A patched layer and what its counters say."""
    device = module.A_log.device
    backend = plan.settings.backend if device.type == "meta" else select_backend(plan.settings.backend, device).name
    return _counted(plan, name, backend)


def describe_gone(plan: Plan) -> LayerStatus:
    """What the counters say of a layer that is no longer there."""
    return _counted(plan, plan.name, plan.last_backend, reason="no longer there")


def _counted(plan: Plan, name: str, backend: str, reason: str = "") -> LayerStatus:
    fallbacks = {str(reason): count for reason, count in plan.fallbacks.items()}
    notes = "; ".join(filter(None, (plan.strategy.note_on(backend), reason, plan.unsupported)))
    return LayerStatus(
        name,
        plan.family.name,
        backend,
        covered=True,
        reason=notes,
        fast_steps=plan.fast_steps,
        split_steps=plan.split_steps,
        deferred_steps=plan.deferred_steps,
        ring_bytes=plan.ring_bytes,
        fallbacks=fallbacks,
    )
