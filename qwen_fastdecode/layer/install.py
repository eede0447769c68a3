"""Installing the dispatcher and undoing it, and hooks on imports: the only importer of wrapt. Does not import torch.

A class gets the dispatcher once, however many of its instances are patched. Hooks that kept a bound copy of the
original forward (accelerate does) are rebound on each instance, and put back.
"""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Callable
from types import MethodType, ModuleType
from typing import TYPE_CHECKING, Any

import wrapt

from ..names import PLAN

if TYPE_CHECKING:
    from torch import nn

    from ..upstream.protocols import Forward
    from .plan import Plan


class ClassPatch:
    """The dispatcher on one class, what was there before, and the instances that it serves."""

    def __init__(self, layer_class: type):
        self.layer_class = layer_class
        self.original = original_forward(layer_class)
        self.inherited = "forward" not in vars(layer_class)
        self.dispatcher = _dispatcher(self.original)
        self.layers: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # those with a plan, or excluded

    def apply(self) -> None:
        wrapt.apply_patch(self.layer_class, "forward", self.dispatcher)

    def revert(self) -> None:
        if vars(self.layer_class).get("forward") is not self.dispatcher:
            warnings.warn(
                f"{self.layer_class.__qualname__}.forward was patched again after qwen_fastdecode and stays as it is; "
                "qwen_fastdecode's part of it now only calls upstream",
                stacklevel=4,
            )
        elif self.inherited:
            delattr(self.layer_class, "forward")  # setattr would leave the class owning what it inherited
        else:
            wrapt.apply_patch(self.layer_class, "forward", self.original)

    def rebind(self, layer: nn.Module, old: Forward, new: Forward) -> None:
        """Replaces methods of `layer` bound to `old`, which hooks keep on the instance."""
        for name, value in list(vars(layer).items()):
            if isinstance(value, MethodType) and value.__func__ is old and value.__self__ is layer:
                setattr(layer, name, MethodType(new, layer))


_patched: dict[type, ClassPatch] = {}
# Who wants what of each instance, in the order in which they came: the last one's plan is what the instance has.
_holds: weakref.WeakKeyDictionary[nn.Module, dict[Any, Plan | bool]] = weakref.WeakKeyDictionary()


def original_forward(layer_class: type) -> Forward:
    """Upstream's function: what the class would run if we had not patched it.

    Where somebody put our dispatcher back after we had taken it off, that is still what it stands over.
    """
    current = wrapt.resolve_path(layer_class, "forward")[2]
    patch = _patched.get(layer_class)
    return patch.original if patch is not None else _original_of(current) or current


def ensure_patched(layer_class: type) -> ClassPatch:
    """Puts the dispatcher on the class unless it is there."""
    patch = _patched.get(layer_class)
    if patch is None:
        patch = ClassPatch(layer_class)
        patch.apply()
        _patched[layer_class] = patch
    return patch


def hold(holder: Any, layer: nn.Module, layer_class: type, plan: Plan | bool) -> None:
    """`holder` wants this plan (or EXCLUDED) for the instance, until it lets go of it or somebody comes later."""
    holds = _holds.setdefault(layer, {})
    holds.pop(holder, None)
    holds[holder] = plan
    _set_plan(layer, layer_class, plan)


def let_go(holder: Any) -> None:
    """`holder` wants nothing any more: each of its instances gets what the last of the others wants."""
    for layer, layer_class in touched_layers():
        holds = _holds.get(layer, {})
        if holder not in holds:
            continue
        was = list(holds.values())[-1]
        del holds[holder]
        if holds:
            now = list(holds.values())[-1]
            if now is not was:
                _set_plan(layer, layer_class, now)
        else:
            clear(layer, layer_class)


def clear(layer: nn.Module, layer_class: type) -> None:
    """Nobody wants anything of the instance: no attribute and no reference to the dispatcher stays on it."""
    patch = _patched.get(layer_class)
    _holds.pop(layer, None)
    vars(layer).pop(PLAN, None)
    if patch is not None:
        patch.layers.discard(layer)
        patch.rebind(layer, patch.dispatcher, patch.original)


def _set_plan(layer: nn.Module, layer_class: type, plan: Plan | bool) -> None:
    """Gives an instance its plan and takes over what hooks kept of the original forward."""
    patch = ensure_patched(layer_class)
    setattr(layer, PLAN, plan)
    patch.layers.add(layer)
    patch.rebind(layer, patch.original, patch.dispatcher)


def release(*, keep_classes: bool) -> None:
    """Takes the dispatcher off every class that serves no instance any more, unless `patch()` of everything is on."""
    for layer_class, patch in list(_patched.items()):
        if not keep_classes and not patch.layers:
            patch.revert()
            del _patched[layer_class]


def touched_layers() -> list[tuple[nn.Module, type]]:
    """Every living instance of which somebody wants something, with the class that it was patched as."""
    return [(layer, layer_class) for layer_class, patch in _patched.items() for layer in patch.layers]


def bypass(layer: nn.Module, layer_class: type) -> str | None:
    """Why a call of `layer` would not reach the dispatcher if its class had it; None when it would."""
    original = original_forward(layer_class)
    ours = original, _dispatcher(original)
    resolved = wrapt.resolve_path(type(layer), "forward")[2]
    if resolved not in ours:
        return f"{type(layer).__qualname__} overrides forward"
    bound = vars(layer).get("forward")
    if bound is not None and "_hf_hook" in vars(layer):  # accelerate: forward calls _old_forward
        bound = vars(layer).get("_old_forward")
    if bound is not None and getattr(bound, "__func__", None) not in ours:
        return f"its forward was replaced on the instance by {_describe(bound)}"
    return None


def _dispatcher(original: Forward) -> Forward:
    from .dispatch import make_dispatcher  # brings torch: `on_import` serves programs that may never need it

    return make_dispatcher(original)


def _original_of(forward: Forward) -> Forward | None:
    from .dispatch import original_of

    return original_of(forward)


def _describe(function: Any) -> str:
    function = getattr(function, "__func__", function)
    return f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', type(function).__qualname__)}"


def reset_compiled() -> None:
    """Drops compiled graphs that were made before a layer was patched: Dynamo does not guard a submodule's forward, so
    they would go on without the patch. (Those made of a patched layer guard its plan: undoing needs nothing.)"""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.reset()


def on_import(name: str, act: Callable[[ModuleType], None]) -> None:
    """Calls `act` with the module of that name once it is imported; what it raises fails the import, every time."""

    def hook(module: ModuleType) -> None:
        try:
            act(module)
        except BaseException:
            sys.modules.pop(name, None)  # the failed import does it anyway, but then it is too late for the next hook
            wrapt.register_post_import_hook(hook, name)
            raise

    wrapt.register_post_import_hook(hook, name)
