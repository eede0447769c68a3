"""`patch()` of everything: every layer of the supported families in the process, those created later included."""

from __future__ import annotations

import os
import threading
import warnings
from typing import Any

import torch
from torch import nn

from ..names import EXCLUDED
from ..ops.backends import select_backend
from ..report import PatchReport
from ..steps.ranks import agreement
from ..switch import switched_off
from ..upstream.protocols import GatedDeltaNet
from ..upstream.seams import upstream_classes, upstream_of
from . import dispatch, install
from .cover import LENIENT, check_settings, cover, ranks, refuse_problems, settle_caches, shared
from .find import describe, inspect_layer, living_layers
from .plan import Plan, Settings
from .review import State, review

lock = threading.RLock()  # of all that patching changes
# Nobody forks while another thread is in the middle of patching: the child would have half of it, and no lock.
os.register_at_fork(before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release)


class Everything:
    """What a `patch()` of everything was asked for; it is the holder of the layers that it covers."""

    def __init__(self, settings: Settings, strict: bool, kept: list[Plan] | None = None):
        self.settings = settings
        self.strict = strict
        self.kept = kept  # every plan that was made, where layers that are gone are to be listed
        self.lasting = False  # until `unpatch()`


_on: list[Everything] = []  # the last one counts


def is_on() -> bool:
    """Whether a `patch()` of everything is on."""
    return bool(_on)


def current_settings() -> Settings | None:
    """What the one that counts was asked for; None where none is on."""
    return _on[-1].settings if _on else None


def kept_plans() -> list[Plan] | None:
    """Every plan that was made, where they are kept."""
    return _on[-1].kept if _on else None


def patch_everything(everything: Everything, *, lasting: bool) -> PatchReport:
    """Covers what lives and is yet to come. lasting: it takes the place of the lasting one that was."""
    check_settings(everything.settings)
    _check_default_device(everything)
    switched_off()  # says so if the environment's word for it means nothing
    upstreams = {upstream.layer_class: upstream for upstream in upstream_classes(import_missing=True)}
    living = list(living_layers())
    upstreams |= {upstream.layer_class: upstream for _, upstream in living}
    verdicts = {layer_class: review(upstream) for layer_class, upstream in upstreams.items()}
    unknown = [verdict.error for verdict in verdicts.values() if verdict.error is not None]
    if unknown and everything.strict:
        raise type(unknown[0])(f"{unknown[0]}. {LENIENT}") from unknown[0]
    layers = [
        inspect_layer(_name(module), module, verdicts[upstream.layer_class], everything.settings)
        for module, upstream in living
    ]
    with agreement(ranks(layers), shared(layers, everything.settings)):
        if everything.strict:
            refuse_problems(layers)
    if everything.settings.head_parallel == "off":
        settle_caches([layer.module for layer in layers])
    for layer_class, verdict in verdicts.items():
        if verdict.state is not State.REFUSED:
            install.ensure_patched(layer_class)
    replaced = _switch_on(everything, lasting=lasting)
    cover(layers, everything)
    if replaced is not None:
        install.let_go(replaced)
    notes = ["patch() of everything is on: a layer created later is covered from its first use."]
    notes += [verdict.detail for verdict in verdicts.values() if verdict.detail]
    return PatchReport(tuple(describe(layer, everything=True) for layer in layers), tuple(notes))


def patch_imported(
    module: str, *, backend: str, strict: bool, keep: bool, cuda_graph: bool = False, deferred_state: bool = False
) -> None:
    """As `patch()`, for the classes of one module that was just imported: `qwen-fastdecode run` calls it.

    With `keep`, `status()` goes on listing layers that are no longer there (one plan a layer is kept for it).
    """
    with lock:
        settings = Settings(backend, cuda_graph=cuda_graph, deferred_state=deferred_state)
        check_settings(settings)
        everything = Everything(settings, strict, kept_plans() or ([] if keep else None))
        _check_default_device(everything)
        for upstream in upstream_classes(import_missing=False):
            if upstream.layer_class.__module__ == module:
                error = review(upstream).error
                if error is None:
                    install.ensure_patched(upstream.layer_class)
                elif strict:
                    raise type(error)(f"{error}. {LENIENT}") from error
                else:
                    warnings.warn(f"{upstream.label} stays with upstream: {error}", stacklevel=2)
        if not _on:  # one for all modules
            _switch_on(everything, lasting=True)


def end(everything: Any) -> None:
    """Switches off one that was switched on; nothing where it was not."""
    if everything in _on:
        _on.remove(everything)


def end_all() -> None:
    """Switches all of them off."""
    _on.clear()


def exclude(model: nn.Module) -> None:
    """Has those that are on leave this model alone; the last one is enough."""
    for module in model.modules() if _on else ():
        upstream = upstream_of(type(module))
        if upstream is not None:
            install.hold(_on[-1], module, upstream.layer_class, EXCLUDED)


def release_classes() -> None:
    """After plans were taken away, or an `Everything` ended: classes that serve nobody go back to upstream."""
    dispatch.adopt = _adopt if _on else None
    install.release(keep_classes=is_on())


def _switch_on(everything: Everything, *, lasting: bool) -> Everything | None:
    """Returns the lasting one whose place it takes."""
    everything.lasting = lasting
    replaced = next((other for other in _on if lasting and other.lasting), None)
    if replaced is None:
        _on.append(everything)
    else:
        _on[_on.index(replaced)] = everything
    dispatch.adopt = _adopt
    return replaced


def _check_default_device(everything: Everything) -> None:
    """Raises what the backend raises where models are going to run."""
    select_backend(everything.settings.backend, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def _name(module: GatedDeltaNet) -> str:
    return f"{type(module).__qualname__}[{module.layer_idx}]"


def _adopt(module: GatedDeltaNet) -> Plan | None:
    """The plan of a layer that is used for the first time while `patch()` of everything is on."""
    with lock:
        upstream = upstream_of(type(module))
        if not _on or upstream is None:
            return None
        everything = _on[-1]
        layer = inspect_layer(_name(module), module, review(upstream), everything.settings)
        with agreement(ranks([layer]), shared([layer], everything.settings)):
            if everything.strict:
                refuse_problems([layer])
        if isinstance(layer.plan, Plan):
            install.hold(everything, module, upstream.layer_class, layer.plan)
            if everything.kept is not None:
                everything.kept.append(layer.plan)
            return layer.plan
        install.hold(everything, module, upstream.layer_class, EXCLUDED)
        warnings.warn(f"{layer.name} stays with upstream: {layer.plan}", stacklevel=4)
        return None
