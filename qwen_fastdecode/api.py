"""patch, unpatch, patched, status: look, check everything, and only then change anything."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from . import dispatch, install
from .agreement import Ranks, agreement
from .errors import NothingToPatch, PatchError
from .families import FAMILIES
from .layers import FoundLayer, describe, describe_plan, find_layers, inspect_layer, living_layers, review
from .ops.backends import BACKENDS, select_backend
from .plan import EXCLUDED, PLAN, DecodePlan, plan_of
from .report import PatchReport, Status
from .seams import upstream_classes
from .tensor_parallel import HEAD_PARALLEL, complete_caches, ranks_of, spoil_caches

_LENIENT = "Pass strict=False to leave such layers to upstream."
_lock = threading.RLock()


class _Everything(NamedTuple):
    """The arguments of the `patch()` of everything that is on."""

    backend: str
    strict: bool
    head_parallel: str


_everything: _Everything | None = None


def patch(
    model: nn.Module | None = None, *, backend: str = "auto", strict: bool = True, head_parallel: str = "auto"
) -> PatchReport:
    """Makes gated DeltaNet layers decode one token through one fused step instead of dozens of kernels.

    Prefill, weights and every other layer stay as they are. Patching twice changes nothing.

    Args:
        model: the model to patch, alone: others of its class stay upstream's. None: every layer of the supported
            families in this process, those created later included.
        backend: "auto" (Triton on a GPU that can run it, else PyTorch), "triton" or "torch".
        strict: raise where a layer cannot be covered. False: leave it to upstream and say so in the report.
        head_parallel: of a tensor-parallel model, whether each rank runs only its own heads ("on"), all of them as
            upstream does ("off"), or its own where that costs no more gathers or the batch is large ("auto").
            Every rank must patch, and unpatch, alike.

    Returns:
        A report with one entry a layer; `print` it.

    Raises:
        NothingToPatch: the model has no layer of a supported family.
        LayerNotCovered: a layer's forward was replaced, or its parts are not the ones that were reviewed.
        UnknownUpstream: Transformers' own code is not a version that was reviewed.
        BackendUnavailable: `backend` cannot run on the layers' device.
        RanksDisagree: another rank of a tensor-parallel model was patched otherwise, failed, or did not come in time.
    """
    if head_parallel not in HEAD_PARALLEL:
        raise ValueError(f"head_parallel: got {head_parallel!r}, expected one of {', '.join(map(repr, HEAD_PARALLEL))}")
    with _lock:
        if model is None:
            return _patch_everything(_Everything(backend, strict, head_parallel))
        layers = find_layers(model, backend, head_parallel)
        with agreement(_ranks(layers), _settings(layers, backend, head_parallel)):
            _check(model, layers, backend, strict)
        if head_parallel == "off":
            _make_caches_whole(model)
        _cover(layers)
        return PatchReport(tuple(describe(layer, everything=_everything is not None) for layer in layers))


def unpatch(model: nn.Module | None = None) -> None:
    """Puts back the very objects that were there: in `model`, or, with None, everywhere.

    While a `patch()` of everything is on, `unpatch(model)` excludes this model from it. Of a tensor-parallel model,
    caches that were decoded with split heads are made whole first, by all ranks together: RanksDisagree if one does
    not come.
    """
    with _lock:
        _make_caches_whole(model)
        if model is None:
            _switch_everything(None)
            for module, layer_class in install.touched_layers():
                install.clear_plan(module, layer_class)
        else:
            for layer in find_layers(model):
                if layer.upstream is not None and _everything is not None:
                    install.set_plan(layer.module, layer.upstream.layer_class, EXCLUDED)
                elif layer.upstream is not None:
                    install.clear_plan(layer.module, layer.upstream.layer_class)
        _settle()


@contextmanager
def patched(
    model: nn.Module | None = None, *, backend: str = "auto", strict: bool = True, head_parallel: str = "auto"
) -> Iterator[PatchReport]:
    """`patch` for the length of a with block; what was patched before stays as it was. Yields the report."""
    with _lock:
        everything = _everything
        before = {module: vars(module)[PLAN] for module, _ in install.touched_layers()}
        report = patch(model, backend=backend, strict=strict, head_parallel=head_parallel)
    try:
        yield report
        _make_caches_whole(model)
    except BaseException:  # the other ranks may not have one, and would not come
        spoil_caches()
        raise
    finally:
        with _lock:
            _switch_everything(everything)
            scope = None if model is None else set(model.modules())
            for module, layer_class in install.touched_layers():
                if scope is not None and module not in scope:
                    continue
                if module in before:
                    install.set_plan(module, layer_class, before[module])
                else:
                    install.clear_plan(module, layer_class)
            _settle()


def status(model: nn.Module | None = None) -> Status:
    """How the layers of `model`, or with None all patched layers, have decoded so far."""
    with _lock:
        everything = _everything is not None
        if model is not None:
            return Status(tuple(describe(layer, everything=everything) for layer in find_layers(model)))
        plans = [(module, plan_of(module)) for module, _ in install.touched_layers()]
        entries = [describe_plan(plan.name, module, plan) for module, plan in plans if plan is not None]
        notes = ("patch() of everything is on: a layer is listed from its first use.",) if everything else ()
        return Status(tuple(sorted(entries, key=lambda entry: entry.name)), notes)


def _check(model: nn.Module, layers: list[FoundLayer], backend: str, strict: bool) -> None:
    """Raises what `patch` is to raise, before anything was changed."""
    if backend not in BACKENDS:  # whatever the model has
        raise ValueError(f"backend: got {backend!r}, expected one of {', '.join(map(repr, BACKENDS))}")
    for device in {layer.module.A_log.device for layer in layers if isinstance(layer.plan, DecodePlan)}:
        if device.type != "meta":
            select_backend(backend, device)
    if strict and all(layer.upstream is None for layer in layers):
        others = f" ({layers[0].plan})" if layers else ""
        raise NothingToPatch(
            f"{type(model).__qualname__} has no gated DeltaNet layer of a supported family{others}. "
            "Pass the model itself, with its linear_attn layers, or strict=False to accept this."
        )
    if strict:
        _refuse_problems(layers)


def _refuse_problems(layers: list[FoundLayer]) -> None:
    """Raises the first layer's problem."""
    problems = [(layer.name, layer.plan) for layer in layers if isinstance(layer.plan, PatchError)]
    if problems:
        name, error = problems[0]
        more = f"{len(problems)} of {len(layers)} layers have a problem. " if len(problems) > 1 else ""
        raise type(error)(f"{name}: {error}. {more}{_LENIENT}") from error


def _ranks(layers: list[FoundLayer]) -> set[Ranks]:
    """The groups of ranks over which layers are sharded."""
    families = [(layer.module, FAMILIES[layer.upstream.family]) for layer in layers if layer.upstream is not None]
    found = (ranks_of(module, family.projections) for module, family in families)
    return {ranks for ranks in found if ranks is not None}


def _settings(layers: list[FoundLayer], backend: str, head_parallel: str) -> dict[str, Any]:
    """What every rank must patch alike."""
    covered = [layer.name for layer in layers if isinstance(layer.plan, DecodePlan)]
    return {"backend": backend, "head_parallel": head_parallel, "covered layers": covered}


def _make_caches_whole(model: nn.Module | None) -> None:
    """Before plans that split heads are taken away."""
    scope = None if model is None else set(model.modules())
    planned = [layer for layer, _ in install.planned_layers() if scope is None or layer in scope]
    splits = [plan.split for plan in map(plan_of, planned) if plan is not None and plan.split is not None]
    for ranks in {split.ranks for split in splits}:
        complete_caches(ranks)


def _cover(layers: list[FoundLayer]) -> None:
    changed = False
    for layer in layers:
        if isinstance(layer.plan, DecodePlan) and layer.upstream is not None:
            changed |= plan_of(layer.module) is not layer.plan
            install.set_plan(layer.module, layer.upstream.layer_class, layer.plan)
    if changed:
        install.reset_compiled()


def _settle() -> None:
    """After plans were taken away: classes that serve nobody and compiled graphs go back to upstream."""
    install.release(keep_classes=_everything is not None)
    install.reset_compiled()


def _switch_everything(everything: _Everything | None) -> None:
    global _everything
    _everything = everything
    dispatch.adopt = None if everything is None else _adopt


def _patch_everything(everything: _Everything) -> PatchReport:
    select_backend(everything.backend, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    upstreams = {upstream.layer_class: upstream for upstream in upstream_classes(import_missing=True)}
    verdicts = {layer_class: review(upstream) for layer_class, upstream in upstreams.items()}
    unknown = [error for error in verdicts.values() if error is not None]
    if unknown and everything.strict:
        raise type(unknown[0])(f"{unknown[0]}. {_LENIENT}") from unknown[0]
    asked = everything.backend, everything.head_parallel
    layers = [
        inspect_layer(_name(module), module, upstream, verdicts[upstream.layer_class], *asked)
        for module, upstream in living_layers(upstreams)
    ]
    with agreement(_ranks(layers), _settings(layers, *asked)):
        if everything.strict:
            _refuse_problems(layers)
    if everything.head_parallel == "off":
        _make_caches_whole(None)
    for layer_class, error in verdicts.items():
        if error is None:
            install.ensure_patched(layer_class)
    _switch_everything(everything)
    _cover(layers)
    notes = ("patch() of everything is on: a layer created later is covered from its first use.",)
    return PatchReport(
        tuple(describe(layer, everything=True) for layer in layers), notes + tuple(str(error) for error in unknown)
    )


def _name(module: Any) -> str:
    return f"{type(module).__qualname__}[{module.layer_idx}]"


def _adopt(module: Any) -> DecodePlan | None:
    """The plan of a layer that is used for the first time while `patch()` of everything is on."""
    with _lock:
        if _everything is None:
            return None
        upstreams = {upstream.layer_class: upstream for upstream in upstream_classes(import_missing=False)}
        upstream = next(upstreams[base] for base in type(module).__mro__ if base in upstreams)
        asked = _everything.backend, _everything.head_parallel
        layer = inspect_layer(_name(module), module, upstream, review(upstream), *asked)
        with agreement(_ranks([layer]), _settings([layer], *asked)):
            if _everything.strict:
                _refuse_problems([layer])
        if isinstance(layer.plan, DecodePlan):
            install.set_plan(module, upstream.layer_class, layer.plan)
            return layer.plan
        install.set_plan(module, upstream.layer_class, EXCLUDED)
        warnings.warn(f"{layer.name} stays with upstream: {layer.plan}", stacklevel=4)
        return None
