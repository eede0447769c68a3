"""patch, unpatch, patched, status, reset_counters: look, check everything, and only then change anything."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from . import graph
from .layer import everything, install
from .layer.cover import (
    check,
    check_model,
    check_settings,
    cover,
    notes_of,
    notes_on,
    ranks,
    settle_caches,
    shared,
    touched_layers,
)
from .layer.everything import Everything
from .layer.find import describe, describe_gone, describe_plan, find_layers
from .layer.plan import Plan, Settings, plan_of
from .names import Backend, HeadParallel
from .report import CUDA_GRAPH_HINT, PatchReport, Status
from .steps.ranks import agreement
from .steps.split import spoil_caches
from .switch import switched_off

_log = logging.getLogger("qwen_fastdecode")  # says at level INFO what was patched and undone
_PATCH = "patch"  # the holder of what `patch` does; each `patched` is a holder of its own


def patch(
    model: nn.Module | None = None,
    *,
    backend: Backend = "auto",
    strict: bool = True,
    state_dtype: torch.dtype | None = None,
    head_parallel: HeadParallel = "auto",
    cuda_graph: bool = False,
    deferred_state: bool = False,
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
        cuda_graph: on a GPU, decode steps of `generate` are captured as one CUDA graph and replayed, where they can be;
            `status` says how many were and why others were not. docs/cuda-graph.md says when it is worth it. The ranks
            of a tensor-parallel model capture together; `generate` raises RanksDisagree on one that cannot go on so.
        deferred_state: on a GPU, batches that are large enough write their recurrent states every N-th step only, which
            is less memory traffic; whoever reads a state in between finds it settled. docs/deferred-state.md says when
            it is worth it. A tensor that was taken out of a cache and kept is a snapshot.

    Returns:
        A report with one entry a layer; `print` it.

    Raises:
        NothingToPatch: the model has no layer of a supported family.
        LayerNotCovered: a layer's forward was replaced, or its parts are not the ones that were reviewed.
        UnknownUpstream: Transformers' own code is not a version that was reviewed and does not pass the self-test, or
            somebody else's patch lies over it.
        BackendUnavailable: `backend` cannot run on the layers' device.
        PatchError: deferred_state with a Transformers before 5.5, whose caches do not show who reads a state.
        ValueError: there is no such backend or head_parallel, or a state cannot have that dtype.
        TypeError: `model` is no model.
        RanksDisagree: another rank of a tensor-parallel model was patched otherwise, failed, or did not come in time.
    """
    settings = Settings(backend, state_dtype, head_parallel, cuda_graph, deferred_state)
    with everything.lock:
        if model is None:
            report = everything.patch_everything(Everything(settings, strict, everything.kept_plans()), lasting=True)
        else:
            report = _patch_model(model, settings, strict, _PATCH)
        graph.refresh()
        return report


def _patch_model(model: nn.Module, settings: Settings, strict: bool, holder: Any) -> PatchReport:
    check_settings(settings)
    check_model(model)
    switched_off()  # says so if the environment's word for it means nothing
    layers = find_layers(model, settings)
    with agreement(ranks(layers), shared(layers, settings)):
        check(model, layers, settings.backend, strict)
    if settings.head_parallel == "off":
        settle_caches([layer.module for layer in layers])
    cover(layers, holder)
    entries = tuple(describe(layer, everything=everything.is_on()) for layer in layers)
    on_gpu = any(layer.module.A_log.is_cuda for layer in layers if isinstance(layer.plan, Plan))
    hint = (CUDA_GRAPH_HINT,) if on_gpu and not settings.cuda_graph else ()
    report = PatchReport(entries, notes_of(layers) + hint)
    _log.info("patched %s: %d of %d layers covered", type(model).__qualname__, report.covered, len(entries))
    return report


def unpatch(model: nn.Module | None = None) -> None:
    """Puts back the very objects that were there: in `model`, or, with None, everywhere.

    Whatever patched it: `patched` blocks that are open end with nothing left to undo. While a `patch()` of everything
    is on, `unpatch(model)` excludes this model from it. Of a tensor-parallel model, caches that were decoded with split
    heads are made whole first, by all ranks together: RanksDisagree if one does not come.
    """
    if model is not None:
        check_model(model)
    with everything.lock:
        touched = touched_layers(model)
        settle_caches([layer for layer, _ in touched])
        for layer, layer_class in touched:
            install.clear(layer, layer_class)
        if model is None:
            everything.end_all()
        else:
            everything.exclude(model)
        everything.release_classes()
        graph.refresh()
    _log.info("unpatched %s: %d layers", "everything" if model is None else type(model).__qualname__, len(touched))


@contextmanager
def patched(
    model: nn.Module | None = None,
    *,
    backend: Backend = "auto",
    strict: bool = True,
    state_dtype: torch.dtype | None = None,
    head_parallel: HeadParallel = "auto",
    cuda_graph: bool = False,
    deferred_state: bool = False,
) -> Iterator[PatchReport]:
    """`patch` for the length of a with block. Yields the report.

    Blocks may overlap, in other threads and tasks too: a layer has the plan of the block that was entered last among
    those that are open, and what `patch` gave it once all have ended.
    """
    settings = Settings(backend, state_dtype, head_parallel, cuda_graph, deferred_state)
    holder: Any = object() if model is not None else Everything(settings, strict)
    with everything.lock:
        if model is None:
            report = everything.patch_everything(holder, lasting=False)
        else:
            report = _patch_model(model, settings, strict, holder)
        graph.refresh()
    try:
        yield report
        settle_caches([layer for layer, _ in touched_layers(model)])
    except BaseException:  # the other ranks may not have one, and would not come
        spoil_caches([layer for layer, _ in touched_layers(model)])
        raise
    finally:
        with everything.lock:
            everything.end(holder)
            install.let_go(holder)
            everything.release_classes()
            graph.refresh()


def status(model: nn.Module | None = None) -> Status:
    """How the layers of `model`, or with None all patched layers, have decoded so far."""
    if model is not None:
        check_model(model)
    switched_off()  # has compiled steps heed the switch as it is now
    with everything.lock:
        if model is not None:
            layers, graphs = find_layers(model), graph.describe(model)
            entries = [describe(layer, everything=everything.is_on()) for layer in layers]
            return Status(tuple(entries), notes_of(layers), graphs)
        graphs = graph.describe()
        plans = [(module, plan_of(module)) for module, _ in install.touched_layers()]
        entries = [describe_plan(plan.name, module, plan) for module, plan in plans if plan is not None]
        living = {id(plan) for _, plan in plans}
        entries += [describe_gone(plan) for plan in everything.kept_plans() or () if id(plan) not in living]
        notes = ["patch() of everything is on: a layer is listed from its first use."] if everything.is_on() else []
        notes += notes_on({layer_class for _, layer_class in install.touched_layers()})
        return Status(tuple(sorted(entries, key=lambda entry: entry.name)), tuple(notes), graphs)


def reset_counters(model: nn.Module | None = None) -> None:
    """Has the counters of `status` begin anew: of `model`, or, with None, of all patched layers."""
    if model is not None:
        check_model(model)
    with everything.lock:
        plans = [plan_of(module) for module, _ in touched_layers(model)]
        if model is None:
            plans += everything.kept_plans() or ()
        for plan in plans:
            if plan is not None:
                plan.reset_counters()
        graph.reset_counters(model)
