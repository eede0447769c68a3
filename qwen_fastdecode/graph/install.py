"""The functions of Transformers' `generate` that are stood in for: put on its classes once, taken off exactly.

Each stand-in is a plain function that asks the instance: a model without `cuda_graph=True`, and a copy of one that has
it, runs upstream's own.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import wrapt
from transformers import PreTrainedModel
from transformers.generation import utils
from transformers.generation.utils import GenerationMixin

from ..upstream.protocols import CausalLM
from .call import Call
from .eligible import is_old
from .state import Offer, innermost, state_of

Function = Callable[..., Any]
DEFERS = hasattr(utils, "DeferredStopCheck")  # from 5.17 on


def _prepare_cache(original: Function) -> Function:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def stand_in(self: CausalLM, *args: Any, **kwargs: Any) -> Any:
        state = state_of(self)
        if state is None:
            return original(self, *args, **kwargs)
        given = signature.bind(self, *args, **kwargs).arguments
        model_kwargs = given["model_kwargs"]
        before = dict(model_kwargs)
        out = original(self, *args, **kwargs)
        state.offer(Offer.of(before, given))
        return out

    return stand_in


def _sample(original: Function) -> Function:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def stand_in(self: CausalLM, *args: Any, **kwargs: Any) -> Any:
        state = state_of(self)
        if state is None:
            return original(self, *args, **kwargs)
        given = signature.bind(self, *args, **kwargs).arguments
        with state.calling(Call(state, self, given)) as call:
            return call.finished(original(self, *args, **kwargs))

    return stand_in


def _criteria(original: Function) -> Function:
    @functools.wraps(original)
    def stand_in(self: CausalLM, *args: Any, **kwargs: Any) -> Any:
        call = _active(self)
        return original(self, *args, **kwargs) if call is None or call.eager else True

    return stand_in


def _compiled_call(original: Function) -> Function:
    @functools.wraps(original)
    def stand_in(self: CausalLM, *args: Any, **kwargs: Any) -> Any:
        call = _active(self)
        return original(self, *args, **kwargs) if call is None or call.eager else call.step

    return stand_in


def _prefill(original: Function) -> Function:
    @functools.wraps(original)
    def stand_in(self: CausalLM, *args: Any, **kwargs: Any) -> Any:
        out, call = original(self, *args, **kwargs), _active(self)
        return out if call is None else call.begin(out)

    return stand_in


def _optimize(original: Function) -> Function:
    @functools.wraps(original)
    def stand_in(self: CausalLM, *args: Any, **kwargs: Any) -> Any:
        call = _active(self)
        return original(self, *args, **kwargs) if call is None or not call.keeps_grouped else nullcontext()

    return stand_in


def _deferred(original: Function) -> Function:
    """Upstream's own means, which it uses on Apple's devices: the host reads one step late whether to stop."""

    @functools.wraps(original)
    def stand_in(device: Any, cache: Any, cache_is_returned: bool, is_assistant: bool) -> Any:
        call = innermost()
        deferred = call is not None and call.runs_ahead and not cache_is_returned and not is_assistant
        return deferred or original(device, cache, cache_is_returned, is_assistant)

    return stand_in


def _active(model: CausalLM) -> Call | None:
    """The call of `generate` that this thread is in."""
    state = state_of(model)
    return None if state is None else state.current


class Seam(NamedTuple):
    """One function of upstream's, and what makes the one that stands in for it."""

    owner: type
    name: str
    make: Callable[[Function], Function]
    static: bool = False


_ALL = (
    Seam(GenerationMixin, "_prepare_cache_for_generation", _prepare_cache),
    Seam(GenerationMixin, "_sample", _sample),
    Seam(GenerationMixin, "_valid_auto_compile_criteria", _criteria),
    Seam(PreTrainedModel, "get_compiled_call", _compiled_call),
    Seam(GenerationMixin, "_prefill", _prefill),
    Seam(GenerationMixin, "_optimize_model_for_decode", _optimize),
    *([Seam(utils.DeferredStopCheck, "is_supported", _deferred, static=True)] if DEFERS else []),
)
# Of a release that is too old some may be missing; the others count why its calls are eager.
SEAMS = tuple(seam for seam in _ALL if hasattr(seam.owner, seam.name) or not is_old())
_installed: dict[Seam, tuple[Function, Function]] = {}


def ensure_installed() -> None:
    """Puts the stand-ins on, once."""
    for seam in SEAMS:
        if seam not in _installed:
            original: Any = wrapt.resolve_path(seam.owner, seam.name)[2]
            stand_in: Any = staticmethod(seam.make(original.__func__)) if seam.static else seam.make(original)
            wrapt.apply_patch(seam.owner, seam.name, stand_in)
            _installed[seam] = original, stand_in


def remove() -> None:
    """Puts back the very functions that were there."""
    for seam, (original, stand_in) in list(_installed.items()):
        if vars(seam.owner).get(seam.name) is stand_in:
            wrapt.apply_patch(seam.owner, seam.name, original)
        else:
            warnings.warn(
                f"{seam.owner.__qualname__}.{seam.name} was patched again after qwen_fastdecode and stays as it is; "
                "qwen_fastdecode's part of it now only calls upstream",
                stacklevel=3,
            )
        del _installed[seam]
