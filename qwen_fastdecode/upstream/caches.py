"""The only place that knows Transformers' caches: where a layer's two states are, and whether they hold a past."""

from __future__ import annotations

import copy
from functools import cache as kept
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from transformers import cache_utils

from ..ops.step import States
from ..reasons import Reason
from .protocols import CacheLayer, Config, ModelCache

_Cache: Any = cache_utils.Cache
_Layer: Any = getattr(cache_utils, "LinearAttentionLayer", None)  # 5.5 on
ARE_WATCHED = _Layer is not None  # whether a layer's states are attributes, so that who reads them can be noticed
# Up to 5.4 each family has a cache of its own, with one list of conv states and one of recurrent states.
_OF_LISTS = ("Qwen3NextDynamicCache", "Qwen3_5DynamicCache", "Qwen3_5MoeDynamicCache")
SETTLES = "_qwen_fastdecode_settles"  # marks a class in which reading the states settles them first (`unsettled`)
_STATES = ("conv_states", "recurrent_states", "has_previous_state")  # attributes of a cache layer


def _functions(owner: Any, names: tuple[str, ...]) -> dict[str, Any]:
    """Those of `names` that are methods of the class; some releases have no such method, some a property."""
    found = {name: getattr(owner, name, None) for name in names}
    return {name: function for name, function in found.items() if callable(function)}


# What upstream stores and reads states with. A fast step goes past it, so it must be what it was. From 5.21 on it asks
# for the states, and before whether there are any.
_ASKED = ("get_conv_state", "get_recurrent_state") if hasattr(_Cache, "get_conv_state") else ("has_previous_state",)
_OF_CACHE = _functions(_Cache, ("update_conv_state", "update_recurrent_state", "is_recording_past", *_ASKED))
_OF_LAYER = _functions(_Layer, ("update_conv_state", "update_recurrent_state"))


def read_states(cache: ModelCache, layer_idx: int) -> States | Reason:
    """The states of layer `layer_idx`, read anew on every call (beam search replaces both tensors), or why not.

    A tensor that is there is not yet a state: `reset()` keeps the tensors and clears `has_previous_state`. What a
    layer owes is not settled by reading it here.
    """
    if _Layer is None:
        return _read_lists(cache, layer_idx)
    if not isinstance(cache, _Cache) or not _keeps_states_plainly(cache, layer_idx):
        return Reason.UNKNOWN_CACHE
    layer: CacheLayer = cache.layers[layer_idx]
    states = stored_states(layer)
    if states is None:
        return Reason.NO_PREVIOUS_STATE
    if getattr(layer, "record_past", False):  # 5.14 on
        return Reason.RECORDING_PAST
    return states


def cache_layer(cache: ModelCache | None, layer_idx: int) -> CacheLayer | None:
    """The layer's own part of the cache; None where there is none (no such layer, a cache of lists, no cache)."""
    layers = getattr(cache, "layers", ())
    return layers[layer_idx] if layer_idx < len(layers) else None


def stored_states(layer: CacheLayer) -> States | None:
    """The tensors of one cache layer as they are, None where they hold no past."""
    held = vars(layer)
    conv, recurrent, has_past = held["conv_states"], held["recurrent_states"], held["has_previous_state"]
    if isinstance(has_past, dict):  # 5.14 on: several states a layer; gated DeltaNet uses the first
        conv, recurrent, has_past = conv[0], recurrent[0], has_past[0]
    return None if not has_past or conv is None or recurrent is None else States(conv, recurrent)


def convert_recurrent_state(cache: ModelCache, layer_idx: int, dtype: torch.dtype) -> Tensor:
    """Puts the recurrent state of layer `layer_idx` into `dtype`; what `read_states` gave before is no longer its.

    Upstream's own passes go on with it: they compute in float32 and copy the result into the tensor that is there (up
    to 5.4 they put a float32 one in its place, which the next step converts again).
    """
    layer: ModelCache | CacheLayer = cache if _Layer is None else cache.layers[layer_idx]
    held = vars(layer)["recurrent_states"]
    if isinstance(held, Tensor):  # 5.5 to 5.13
        state = vars(layer)["recurrent_states"] = held.to(dtype)
    else:  # a list of all layers' states; from 5.14 on a dict of the layer's
        key = layer_idx if _Layer is None else 0
        state = held[key] = held[key].to(dtype)
    torch._dynamo.mark_static_address(state)  # as upstream does: a captured graph then updates it in place
    return state


def new_cache(config: Config, modeling: ModuleType) -> ModelCache:
    """An empty cache for a model of `config`, of the class that its family's modeling module makes."""
    own = [made for name, made in vars(modeling).items() if name in _OF_LISTS]
    return own[0](config) if own else modeling.DynamicCache(config=config)


def replaced_functions() -> list[str]:
    """Which of upstream's functions that store and read states are no longer those that Transformers came with."""
    owners = ((_Cache, _OF_CACHE), (_Layer, _OF_LAYER))
    return [
        f"{owner.__name__}.{name}"
        for owner, functions in owners
        for name, function in functions.items()
        if getattr(owner, name, None) is not function
    ]


def cache_functions() -> dict[str, Any]:
    """Upstream's functions that store and read states, and that make what they store into, by name."""
    if _Layer is None:
        return {}
    owners = ((_Cache, _OF_CACHE), (_Layer, _OF_LAYER | _functions(_Layer, ("lazy_initialization", "__init__"))))
    return {f"{owner.__name__}.{name}": getattr(owner, name) for owner, functions in owners for name in functions}


def with_own_layer(cache: ModelCache, layer_idx: int) -> ModelCache:
    """The cache with a copy of one layer's states: updating it leaves the original as it is."""
    own = copy.copy(cache)
    for name in ("layers",) if _Layer is not None else ("conv_states", "recurrent_states"):
        entries = list(getattr(cache, name))
        entries[layer_idx] = copy.deepcopy(entries[layer_idx])
        setattr(own, name, entries)
    return own


def _read_lists(cache: ModelCache, layer_idx: int) -> States | Reason:
    """Up to 5.4. Upstream asks the *last* linear layer for a past, and puts a new recurrent tensor into the list.

    It updates the conv state in place, so nobody can have kept either from before: both may be updated in place.
    """
    kind: Any = type(cache)
    if kind.__name__ not in _OF_LISTS or not kind.__module__.startswith("transformers.models."):
        return Reason.UNKNOWN_CACHE
    conv, recurrent = cache.conv_states[layer_idx], cache.recurrent_states[layer_idx]
    if not cache.has_previous_state or conv is None or recurrent is None:
        return Reason.NO_PREVIOUS_STATE
    return States(conv, recurrent)


def _keeps_states_plainly(cache: ModelCache, layer_idx: int) -> bool:
    """Whether nobody has changed how this layer's states are stored and read: then the tensors are the states.

    Methods are looked up as a call would: on the object, on its class, and on the classes above it.
    """
    if layer_idx >= len(cache.layers):
        return False
    layer: CacheLayer = cache.layers[layer_idx]
    if not isinstance(layer, _Layer) or not _has_plain_attributes(type(layer)):
        return False
    for owner, functions in ((layer, _OF_LAYER), (cache, _OF_CACHE)):
        for name, function in functions.items():
            if getattr(type(owner), name) is not function or name in owner.__dict__:
                return False
    return True


@torch.compiler.assume_constant_result
def _has_plain_attributes(kind: type) -> bool:
    return _is_plain(kind)


@kept
def _is_plain(kind: type) -> bool:
    """Whether the states are ordinary attributes of this class of cache layers. (Ours for one that owes are not.)"""
    classes = [base for base in kind.__mro__ if base is not object and SETTLES not in vars(base)]
    return not any(name in vars(base) for base in classes for name in (*_STATES, "__getattribute__"))
