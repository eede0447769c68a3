"""The only place that knows Transformers' caches: where a layer's two states are, and whether they hold a past."""

from __future__ import annotations

import copy
import gc
import itertools
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import cache_utils

from ..errors import PatchError
from ..reasons import Reason

_Cache: Any = cache_utils.Cache
_Layer: Any = getattr(cache_utils, "LinearAttentionLayer", None)  # 5.5 on
# Up to 5.4 each family has a cache of its own, with one list of conv states and one of recurrent states.
_OF_LISTS = ("Qwen3NextDynamicCache", "Qwen3_5DynamicCache", "Qwen3_5MoeDynamicCache")
_PARTIAL = "_qwen_fastdecode_partial"  # the attribute of a marked cache layer
_serials = itertools.count()


class DecodeStates(NamedTuple):
    """The states of one layer, to be updated in place: conv [B, C, W], recurrent [B, HV, DK, DV]."""

    conv: Tensor
    recurrent: Tensor


def read_states(cache: Any, layer_idx: int) -> DecodeStates | Reason:
    """The states of layer `layer_idx`, read anew on every call (beam search replaces both tensors), or why not.

    A tensor that is there is not yet a state: `reset()` keeps the tensors and clears `has_previous_state`.
    """
    if _Layer is None:
        return _read_lists(cache, layer_idx)
    if not isinstance(cache, _Cache) or not _updates_in_place(cache, layer_idx):
        return Reason.UNKNOWN_CACHE
    layer: Any = cache.layers[layer_idx]
    states = stored_states(layer)
    if states is None:
        return Reason.NO_PREVIOUS_STATE
    if getattr(layer, "record_past", False):  # 5.14 on
        return Reason.RECORDING_PAST
    return states


def stored_states(layer: Any) -> DecodeStates | None:
    """The states of one cache layer, None where they hold no past."""
    conv, recurrent, has_past = layer.conv_states, layer.recurrent_states, layer.has_previous_state
    if isinstance(has_past, dict):  # 5.14 on: several states a layer; gated DeltaNet uses the first
        conv, recurrent, has_past = conv[0], recurrent[0], has_past[0]
    return None if not has_past or conv is None or recurrent is None else DecodeStates(conv, recurrent)


def convert_recurrent_state(cache: Any, layer_idx: int, dtype: torch.dtype) -> Tensor:
    """Puts the recurrent state of layer `layer_idx` into `dtype`; what `read_states` gave before is no longer its.

    Upstream's own passes go on with it: they compute in float32 and copy the result into the tensor that is there (up
    to 5.4 they put a float32 one in its place, which the next step converts again).
    """
    layer: Any = cache if _Layer is None else cache.layers[layer_idx]
    held = layer.recurrent_states
    if isinstance(held, Tensor):  # 5.5 to 5.13
        state = layer.recurrent_states = held.to(dtype)
    else:  # a list of all layers' states; from 5.14 on a dict of the layer's
        key = layer_idx if _Layer is None else 0
        state = held[key] = held[key].to(dtype)
    torch._dynamo.mark_static_address(state)  # as upstream does: a captured graph then updates it in place
    return state


def new_cache(config: Any, modeling: ModuleType) -> Any:
    """An empty cache for a model of `config`, of the class that its family's modeling module makes."""
    own = [made for name, made in vars(modeling).items() if name in _OF_LISTS]
    return own[0](config) if own else modeling.DynamicCache(config=config)


def update_functions() -> dict[str, Any]:
    """What upstream stores states with, by name: a fast step writes into the tensors in its place."""
    if _Layer is None:
        return {}
    return {
        f"{owner.__name__}.{name}": vars(owner)[name]
        for owner in (_Cache, _Layer)
        for name in ("update_conv_state", "update_recurrent_state")
    }


def with_own_layer(cache: Any, layer_idx: int) -> Any:
    """The cache with a copy of one layer's states: updating it leaves the original as it is."""
    own = copy.copy(cache)
    for name in ("layers",) if _Layer is not None else ("conv_states", "recurrent_states"):
        entries = list(getattr(cache, name))
        entries[layer_idx] = copy.deepcopy(entries[layer_idx])
        setattr(own, name, entries)
    return own


def _read_lists(cache: Any, layer_idx: int) -> DecodeStates | Reason:
    """Up to 5.4. Upstream asks the *last* linear layer for a past, and puts a new recurrent tensor into the list.

    It updates the conv state in place, so nobody can have kept either from before: both may be updated in place.
    """
    kind: Any = type(cache)
    if kind.__name__ not in _OF_LISTS or not kind.__module__.startswith("transformers.models."):
        return Reason.UNKNOWN_CACHE
    conv, recurrent = cache.conv_states[layer_idx], cache.recurrent_states[layer_idx]
    if not cache.has_previous_state or conv is None or recurrent is None:
        return Reason.NO_PREVIOUS_STATE
    return DecodeStates(conv, recurrent)


def _updates_in_place(cache: Any, layer_idx: int) -> bool:
    """Whether nobody has changed how this layer's states are stored: then writing into the tensors is an update."""
    if layer_idx >= len(cache.layers):
        return False
    layer_class: Any = type(cache.layers[layer_idx])
    return (
        type(cache).update_conv_state is _Cache.update_conv_state
        and type(cache).update_recurrent_state is _Cache.update_recurrent_state
        and issubclass(layer_class, _Layer)
        and layer_class.update_conv_state is _Layer.update_conv_state
        and layer_class.update_recurrent_state is _Layer.update_recurrent_state
    )


class Partial:
    """The mark of a cache layer whose states are right for some heads only: `split` knows which, and gets the others.

    It lies on the cache layer, not on its tensors: beam search replaces those and keeps the layer. A deep copy of a
    cache copies stale tensors and so is marked too. Serials are the same on every rank: all do the same things.
    """

    def __init__(self, split: Any):
        self.split = split
        self.serial = next(_serials)

    @staticmethod
    def of(layer: Any) -> Partial | None:
        """The mark of a cache layer."""
        return vars(layer).get(_PARTIAL)

    @staticmethod
    def put(layer: Any, split: Any) -> None:
        """Marks a cache layer unless it is."""
        if _PARTIAL not in vars(layer):
            setattr(layer, _PARTIAL, Partial(split))

    @staticmethod
    def remove(layer: Any) -> None:
        """The layer is whole, or holds nothing."""
        vars(layer).pop(_PARTIAL, None)

    def __deepcopy__(self, _: Any) -> Partial:
        return Partial(self.split)

    def __reduce__(self) -> Any:
        raise PatchError(
            "this cache was decoded with its heads split over tensor-parallel ranks, and this rank holds only some of "
            "them: qwen_fastdecode.unpatch(model) on every rank makes it whole"
        )


def marked_layers() -> Iterator[tuple[Any, Partial]]:
    """Every living cache layer with a mark."""
    for thing in gc.get_objects():
        if _Layer is not None and issubclass(type(thing), _Layer):
            mark = Partial.of(thing)
            if mark is not None:
                yield thing, mark
