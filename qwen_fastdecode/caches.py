"""The only place that knows Transformers' caches: where a layer's two states are, and whether they hold a past."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor
from transformers.cache_utils import Cache, LinearAttentionLayer

from .errors import PatchError
from .reasons import Reason

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
    if not isinstance(cache, Cache) or not _updates_in_place(cache, layer_idx):
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


def _updates_in_place(cache: Cache, layer_idx: int) -> bool:
    """Whether nobody has changed how this layer's states are stored: then writing into the tensors is an update."""
    if layer_idx >= len(cache.layers):
        return False
    layer_class: Any = type(cache.layers[layer_idx])
    return (
        type(cache).update_conv_state is Cache.update_conv_state
        and type(cache).update_recurrent_state is Cache.update_recurrent_state
        and issubclass(layer_class, LinearAttentionLayer)
        and layer_class.update_conv_state is LinearAttentionLayer.update_conv_state
        and layer_class.update_recurrent_state is LinearAttentionLayer.update_recurrent_state
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
        if issubclass(type(thing), LinearAttentionLayer):
            mark = Partial.of(thing)
            if mark is not None:
                yield thing, mark
