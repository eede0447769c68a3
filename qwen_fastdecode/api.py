"""patch, unpatch, patched, status: look, check everything, and only then change anything."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from .errors import NothingToPatch, PatchError
from .layer import dispatch, install
from .layer.find import FoundLayer, describe, describe_gone, describe_plan, find_layers, inspect_layer, living_layers
from .layer.plan import DecodePlan, Settings, plan_of
from .layer.review import State, review
from .names import BACKENDS, EXCLUDED, PLAN
from .ops.backends import select_backend
from .report import PatchReport, Status
from .steps.ranks import Ranks, agreement
from .steps.split import HEAD_PARALLEL, complete_caches, ranks_of, spoil_caches
from .upstream.families import FAMILIES
from .upstream.seams import upstream_classes

_LENIENT = "Pass strict=False (qwen-fastdecode run: --no-strict) to leave such layers to upstream."
_STATE_DTYPES = (None, torch.float32, torch.bfloat16)
_lock = threading.RLock()


class _Everything(NamedTuple):
    """What the `patch()` of everything that is on was asked for."""

    settings: Settings
    strict: bool
    kept: list[DecodePlan] | None = None  # every plan that was made, where layers that are gone are to be listed


_everything: _Everything | None = None


def patch(
    model: nn.Module | None = None,
    *,
    backend: str = "auto",
    strict: bool = True,
    state_dtype: torch.dtype | None = None,
    head_parallel: str = "auto",
) -> PatchReport:
    """Makes gated DeltaNet layers decode one token through one fused step instead of dozens of kernels.

    Prefill, weights and every other layer stay as they are. Patching twice changes nothing.

    Args:
        model: the model to patch, alone: others of its class stay upstream's. None: every layer of the supported
            families in this process, those created later included.
        backend: "auto" (Triton on a GPU that can run it, else PyTorch), "triton" or "torch".
        strict: raise where a layer cannot be covered. False: leave it to upstream and say so in the report.
        state_dtype: torch.bfloat16 keeps the recurrent states in the cache in bfloat16 from the prompt's end on, for
            half their memory and traffic, at a cost in quality (README, "Same text?"). None: as upstream made them.
            torch.float32 is the other choice. Inside torch.compile a state keeps the dtype that it has.
        head_parallel: of a tensor-parallel model, whether each rank runs only its own heads ("on"), all of them as
            upstream does ("off"), or its own where that costs no more gathers or the batch is large ("auto").
            Every rank must patch, and unpatch, alike.

    Returns:
        A report with one entry a layer; `print` it.

    Raises:
        NothingToPatch: the model has no layer of a supported family.
        LayerNotCovered: a layer's forward was replaced, or its parts are not the ones that were reviewed.
        UnknownUpstream: Transformers' own code is not a version that was reviewed and does not pass the self-test, or
            somebody else's patch lies over it.
        BackendUnavailable: `backend` cannot run on the layers' device.
        ValueError: there is no such backend or head_parallel, or a state cannot have that dtype.
        RanksDisagree: another rank of a tensor-parallel model was patched otherwise, failed, or did not come in time.
    """
    settings = Settings(backend, state_dtype, head_parallel)
    _check_settings(settings)
    with _lock:
        if model is None:
            return _patch_everything(_Everything(settings, strict, _kept()))
        layers = find_layers(model, settings)
        with agreement(_ranks(layers), _shared(layers, settings)):
            _check(model, layers, backend, strict)
        if head_parallel == "off":
            _make_caches_whole(model)
        _cover(layers)
        entries = tuple(describe(layer, everything=_everything is not None) for layer in layers)
        return PatchReport(entries, _notes(layers))


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
    model: nn.Module | None = None,
    *,
    backend: str = "auto",
    strict: bool = True,
    state_dtype: torch.dtype | None = None,
    head_parallel: str = "auto",
) -> Iterator[PatchReport]:
    """`patch` for the length of a with block; what was patched before stays as it was. Yields the report."""
    with _lock:
        everything = _everything
        before = {module: vars(module)[PLAN] for module, _ in install.touched_layers()}
        report = patch(model, backend=backend, strict=strict, state_dtype=state_dtype, head_parallel=head_parallel)
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
            layers = find_layers(model)
            return Status(tuple(describe(layer, everything=everything) for layer in layers), _notes(layers))
        plans = [(module, plan_of(module)) for module, _ in install.touched_layers()]
        entries = [describe_plan(plan.name, module, plan) for module, plan in plans if plan is not None]
        living = {id(plan) for _, plan in plans}
        entries += [describe_gone(plan) for plan in _kept() or () if id(plan) not in living]
        notes = ["patch() of everything is on: a layer is listed from its first use."] if everything else []
        notes += _notes_on({layer_class for _, layer_class in install.touched_layers()})
        return Status(tuple(sorted(entries, key=lambda entry: entry.name)), tuple(notes))


def _check_settings(settings: Settings) -> None:
    """Raises ValueError for what no layer can have. (What cannot run raises later.)"""
    for name, choices in {"backend": BACKENDS, "head_parallel": HEAD_PARALLEL}.items():
        value = getattr(settings, name)
        if value not in choices:
            raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(repr, choices))}")
    if settings.state_dtype not in _STATE_DTYPES:
        raise ValueError(
            f"state_dtype: got {settings.state_dtype!r}, expected torch.bfloat16, torch.float32 or None (as upstream "
            "has it)"
        )


def _check(model: nn.Module, layers: list[FoundLayer], backend: str, strict: bool) -> None:
    """Raises what `patch` is to raise, before anything was changed."""
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


def _notes(layers: list[FoundLayer]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(layer.note for layer in layers if layer.note))


def _notes_on(layer_classes: set[type]) -> list[str]:
    """What is to be said about upstream's code of these classes."""
    upstreams = (
        upstream for upstream in upstream_classes(import_missing=False) if upstream.layer_class in layer_classes
    )
    return [detail for detail in (review(upstream).detail for upstream in upstreams) if detail]


def _ranks(layers: list[FoundLayer]) -> set[Ranks]:
    """The groups of ranks over which layers are sharded."""
    families = [(layer.module, FAMILIES[layer.upstream.family]) for layer in layers if layer.upstream is not None]
    found = (ranks_of(module, family.projections) for module, family in families)
    return {ranks for ranks in found if ranks is not None}


def _shared(layers: list[FoundLayer], settings: Settings) -> dict[str, Any]:
    """What every rank must patch alike, as JSON has it."""
    covered = [layer.name for layer in layers if isinstance(layer.plan, DecodePlan)]
    return {**settings._asdict(), "state_dtype": str(settings.state_dtype), "covered layers": covered}


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
    _check_default_device(everything)
    upstreams = {upstream.layer_class: upstream for upstream in upstream_classes(import_missing=True)}
    verdicts = {layer_class: review(upstream) for layer_class, upstream in upstreams.items()}
    unknown = [verdict.error for verdict in verdicts.values() if verdict.error is not None]
    if unknown and everything.strict:
        raise type(unknown[0])(f"{unknown[0]}. {_LENIENT}") from unknown[0]
    layers = [
        inspect_layer(_name(module), module, verdicts[upstream.layer_class], everything.settings)
        for module, upstream in living_layers(upstreams)
    ]
    with agreement(_ranks(layers), _shared(layers, everything.settings)):
        if everything.strict:
            _refuse_problems(layers)
    if everything.settings.head_parallel == "off":
        _make_caches_whole(None)
    for layer_class, verdict in verdicts.items():
        if verdict.state is not State.REFUSED:
            install.ensure_patched(layer_class)
    _switch_everything(everything)
    _cover(layers)
    notes = ["patch() of everything is on: a layer created later is covered from its first use."]
    notes += [verdict.detail for verdict in verdicts.values() if verdict.detail]
    return PatchReport(tuple(describe(layer, everything=True) for layer in layers), tuple(notes))


def patch_imported(module: str, *, backend: str, strict: bool, keep: bool) -> None:
    """As `patch()`, for the classes of one module that was just imported: `qwen-fastdecode run` calls it.

    With `keep`, `status()` goes on listing layers that are no longer there (one plan a layer is kept for it).
    """
    with _lock:
        everything = _Everything(Settings(backend), strict, _kept() or ([] if keep else None))
        _check_default_device(everything)
        for upstream in upstream_classes(import_missing=False):
            if upstream.layer_class.__module__ == module:
                error = review(upstream).error
                if error is None:
                    install.ensure_patched(upstream.layer_class)
                elif strict:
                    raise type(error)(f"{error}. {_LENIENT}") from error
                else:
                    warnings.warn(f"{upstream.label} stays with upstream: {error}", stacklevel=2)
        _switch_everything(everything)


def _kept() -> list[DecodePlan] | None:
    return None if _everything is None else _everything.kept


def _check_default_device(everything: _Everything) -> None:
    """Raises what the backend raises where models are going to run."""
    select_backend(everything.settings.backend, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def _name(module: Any) -> str:
    return f"{type(module).__qualname__}[{module.layer_idx}]"


def _adopt(module: Any) -> DecodePlan | None:
    """The plan of a layer that is used for the first time while `patch()` of everything is on."""
    with _lock:
        if _everything is None:
            return None
        upstreams = {upstream.layer_class: upstream for upstream in upstream_classes(import_missing=False)}
        upstream = next(upstreams[base] for base in type(module).__mro__ if base in upstreams)
        layer = inspect_layer(_name(module), module, review(upstream), _everything.settings)
        with agreement(_ranks([layer]), _shared([layer], _everything.settings)):
            if _everything.strict:
                _refuse_problems([layer])
        if isinstance(layer.plan, DecodePlan):
            install.set_plan(module, upstream.layer_class, layer.plan)
            if _everything.kept is not None:
                _everything.kept.append(layer.plan)
            return layer.plan
        install.set_plan(module, upstream.layer_class, EXCLUDED)
        warnings.warn(f"{layer.name} stays with upstream: {layer.plan}", stacklevel=4)
        return None
