"""Patching what was found: everything is looked at and checked before anything is changed."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

from ..errors import NothingToPatch, PatchError
from ..names import BACKENDS, HEAD_PARALLEL
from ..ops.backends import select_backend
from ..steps.deferred import DeferredStep
from ..steps.split import SplitStep, settle_on_ranks
from ..upstream.caches import ARE_WATCHED
from ..upstream.families import FAMILIES
from ..upstream.seams import upstream_classes
from ..upstream.sharding import Ranks, ranks_of
from . import install
from .find import FoundLayer
from .plan import Plan, Settings, plan_of
from .review import review

LENIENT = "Pass strict=False (qwen-fastdecode run: --no-strict) to leave such layers to upstream."
_STATE_DTYPES = (None, torch.float32, torch.bfloat16)


def check_settings(settings: Settings) -> None:
    """Raises ValueError for what no layer can have, PatchError for what this Transformers cannot."""
    for name, choices in {"backend": BACKENDS, "head_parallel": HEAD_PARALLEL}.items():
        value = getattr(settings, name)
        if value not in choices:
            raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(repr, choices))}")
    if settings.state_dtype not in _STATE_DTYPES:
        raise ValueError(
            f"state_dtype: got {settings.state_dtype!r}, expected torch.bfloat16, torch.float32 or None (as upstream "
            "has it)"
        )
    if settings.deferred_state and not ARE_WATCHED:
        raise PatchError(
            f"deferred_state=True: got Transformers {transformers.__version__}, expected 5.5 or later: its caches are "
            "lists of tensors, and who reads one cannot be noticed"
        )


def check_model(model: Any) -> None:
    """Raises TypeError for what is no model, and says what to pass."""
    if isinstance(model, nn.Module):
        return
    what = f"the class {model.__qualname__}" if isinstance(model, type) else f"a {type(model).__qualname__}"
    inner = getattr(model, "model", None)
    hint = "Pass its .model" if isinstance(inner, nn.Module) else "Pass the model that generates, one at a time"
    raise TypeError(f"model: got {what}, expected a torch.nn.Module or None (everything). {hint}")


def check(model: nn.Module, layers: list[FoundLayer], backend: str, strict: bool) -> None:
    """Raises what `patch` is to raise, before anything was changed."""
    for device in {layer.module.A_log.device for layer in layers if isinstance(layer.plan, Plan)}:
        if device.type != "meta":
            select_backend(backend, device)
    if strict and all(layer.upstream is None for layer in layers):
        others = f" ({layers[0].plan})" if layers else ""
        raise NothingToPatch(
            f"{type(model).__qualname__} has no gated DeltaNet layer of a supported family{others}. "
            "Pass the model itself, with its linear_attn layers, or strict=False to accept this."
        )
    if strict:
        refuse_problems(layers)


def refuse_problems(layers: list[FoundLayer]) -> None:
    """Raises the first layer's problem."""
    problems = [(layer.name, layer.plan) for layer in layers if isinstance(layer.plan, PatchError)]
    if problems:
        name, error = problems[0]
        more = f"{len(problems)} of {len(layers)} layers have a problem. " if len(problems) > 1 else ""
        raise type(error)(f"{name}: {error}. {more}{LENIENT}") from error


def notes_of(layers: list[FoundLayer]) -> tuple[str, ...]:
    """What is to be said about upstream's code of the classes of these layers."""
    return tuple(dict.fromkeys(layer.note for layer in layers if layer.note))


def notes_on(layer_classes: set[type]) -> list[str]:
    """What is to be said about upstream's code of these classes."""
    upstreams = (
        upstream for upstream in upstream_classes(import_missing=False) if upstream.layer_class in layer_classes
    )
    return [detail for detail in (review(upstream).detail for upstream in upstreams) if detail]


def ranks(layers: list[FoundLayer]) -> set[Ranks]:
    """The groups of ranks over which layers are sharded."""
    families = [(layer.module, FAMILIES[layer.upstream.family]) for layer in layers if layer.upstream is not None]
    found = (ranks_of(module, family.projections) for module, family in families)
    return {ranks for ranks in found if ranks is not None}


def shared(layers: list[FoundLayer], settings: Settings) -> dict[str, Any]:
    """What every rank must patch alike, as JSON has it."""
    covered = [layer.name for layer in layers if isinstance(layer.plan, Plan)]
    return {**settings._asdict(), "state_dtype": str(settings.state_dtype), "covered layers": covered}


def touched_layers(model: nn.Module | None) -> list[tuple[nn.Module, type]]:
    """The layers of `model`, or all, of which somebody wants something: by what was installed, whatever became of the
    names that they were found by."""
    if model is None:
        return install.touched_layers()
    scope = {id(module) for module in model.modules()}
    return [(layer, layer_class) for layer, layer_class in install.touched_layers() if id(layer) in scope]


def settle_caches(layers: list[nn.Module]) -> None:
    """Before plans are taken away whose steps leave something undone."""
    plans = [plan for plan in map(plan_of, layers) if plan is not None]
    groups = dict.fromkeys(plan.strategy.ranks for plan in plans if isinstance(plan.strategy, SplitStep))
    for ranks in groups:
        settle_on_ranks(ranks, layers)
    for plan in plans:
        if isinstance(plan.strategy, DeferredStep):
            plan.strategy.settle_all()


def cover(layers: list[FoundLayer], holder: Any) -> None:
    """Gives every layer that has a plan its plan, in the name of `holder`."""
    changed = False
    for layer in layers:
        if isinstance(layer.plan, Plan) and layer.upstream is not None:
            changed |= plan_of(layer.module) is not layer.plan
            install.hold(holder, layer.module, layer.upstream.layer_class, layer.plan)
    if changed:
        install.reset_compiled()
