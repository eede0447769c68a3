"""What one model with `cuda_graph=True` remembers between calls of `generate`: no graph, but settings and counts."""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from ..layer import everything
from ..names import EXCLUDED, PLAN
from ..upstream.protocols import CausalLM, ModelCache
from ..upstream.seams import upstream_of
from . import eligible
from .capture import Pool
from .norms import Norms
from .reasons import Eager

STATE = "_qwen_fastdecode_graph"  # the attribute of a model that has one
CACHE_NAMES = ("cache", "past_key_values")  # what `generate` calls it: from 5.24 on, and before
GIVE_UP_AFTER = 2  # captures that failed

_thread = threading.local()


def innermost() -> Any:
    """The call of `generate` that this thread is in, of whatever model."""
    return getattr(_thread, "call", None)


class Offer(NamedTuple):
    """The cache that `generate` has just made for a call, or why the call is to stay eager."""

    reason: Eager | None
    name: str
    cache: weakref.ref[ModelCache] | None
    limit: int  # positions that the call may come to use

    @staticmethod
    def of(before: dict[str, Any], given: dict[str, Any]) -> Offer:
        """From the arguments of upstream's function that prepares a cache: what was there before, and after."""
        config, after = given["generation_config"], given["model_kwargs"]
        name = next((name for name in CACHE_NAMES if after.get(name) is not None), CACHE_NAMES[-1])
        cache, was_given = after.get(name), before.get(name) is not None
        reason = eligible.config_reason(config, given["generation_mode"], cache is not None, was_given)
        return Offer(reason, name, None if cache is None else weakref.ref(cache), given["max_cache_length"])


class State:
    """On a model instance. A copied or unpickled model has none."""

    def __init__(self) -> None:
        self.failures = 0
        self.reset_counters()
        self._offers: dict[int, Offer] = {}
        self._calls: dict[int, list[Any]] = {}
        self._pools: dict[torch.device, Pool] = {}
        self._counting = threading.Lock()

    def offer(self, offer: Offer) -> None:
        """For the call of `_sample` that follows on this thread."""
        if offer.reason is Eager.MODE:  # none does
            self.count(offer.reason)
        self._offers[threading.get_ident()] = offer

    def take_offer(self) -> Offer | None:
        """The offer that was made on this thread; it is good for one call."""
        return self._offers.pop(threading.get_ident(), None)

    @property
    def current(self) -> Any:
        """The innermost call of `generate` that this thread is in."""
        calls = self._calls.get(threading.get_ident())
        return calls[-1] if calls else None

    @contextmanager
    def calling(self, call: Any) -> Iterator[Any]:
        """While `generate` samples."""
        calls = self._calls.setdefault(threading.get_ident(), [])
        calls.append(call)
        outer, _thread.call = innermost(), call
        try:
            yield call
        finally:
            _thread.call = outer
            calls.pop()
            if not calls:
                self._calls.pop(threading.get_ident(), None)
            call.close()

    def pool(self, device: torch.device) -> Pool:
        """What captures on a device share."""
        with self._counting:
            return self._pools.setdefault(device, Pool(device))

    def reset_counters(self) -> None:
        """What has been done so far is not counted any more."""
        self.captures = self.compared = self.replays = self.tokens = self.grouped_calls = 0
        self.worst = 0.0  # relative distance of a first replay from the eager step
        self.norms: Norms | None = None  # of the last capture
        self.reasons: Counter[Eager] = Counter()
        self.details: dict[Eager, str] = {}

    def free(self) -> None:
        """The model is gone, or its patch is: graphs in use keep their memory for as long as they need it."""
        self._pools.clear()

    def count(self, reason: Eager, detail: str = "") -> None:
        """A call, or the rest of one, runs eagerly."""
        with self._counting:
            self.reasons[reason] += 1
            if detail:
                self.details[reason] = detail

    def add(self, **counts: int) -> None:
        """Adds to counters by name."""
        with self._counting:
            for name, count in counts.items():
                setattr(self, name, getattr(self, name) + count)

    def settle(self) -> None:
        """Brings the layers' counters up to what calls in progress have replayed."""
        for calls in list(self._calls.values()):
            for call in list(calls):
                call.settle()

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


_kept: list[State] = []  # as the plans of layers that are gone
_states: weakref.WeakKeyDictionary[CausalLM, State] = weakref.WeakKeyDictionary()


def wanted(model: CausalLM) -> bool:
    """Whether the layers of a model were patched with `cuda_graph=True`; of one that has not run while a `patch()` of
    everything is on, whether they are going to be."""
    settings = everything.current_settings()
    for module in model.modules():
        plan = vars(module).get(PLAN)
        if plan:
            return bool(plan.settings.cuda_graph)
        if settings is not None and plan is not EXCLUDED and upstream_of(type(module)) is not None:
            return settings.cuda_graph
    return False


def state_of(model: CausalLM) -> State | None:
    """The model's state, made where there is none yet; None for upstream's own way."""
    if not wanted(model):
        return None
    state: State | None = vars(model).get(STATE)
    if state is None:
        state = vars(model)[STATE] = _states[model] = State()
        weakref.finalize(model, state.free)
        if everything.kept_plans() is not None:
            _kept.append(state)
    return state


def gone() -> list[State]:
    """Of models that are no longer there, where what they did is to be listed."""
    living = {id(state) for state in _states.values()}
    return [state for state in _kept if id(state) not in living] if everything.kept_plans() is not None else []


def states() -> dict[CausalLM, State]:
    """Of every living model that has one."""
    return dict(_states)


def forget(model: CausalLM) -> None:
    """Takes the state off a model."""
    state = _states.pop(model, None)
    if state is not None:
        state.free()
    vars(model).pop(STATE, None)
