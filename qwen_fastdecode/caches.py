"""The only place that knows Transformers' caches: where a layer's two states are, and whether they hold a past."""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, LinearAttentionLayer

from .reasons import Reason


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
    conv, recurrent, has_past = layer.conv_states, layer.recurrent_states, layer.has_previous_state
    if isinstance(has_past, dict):  # 5.14 on: several states a layer; gated DeltaNet uses the first
        conv, recurrent, has_past = conv[0], recurrent[0], has_past[0]
    if not has_past or conv is None or recurrent is None:
        return Reason.NO_PREVIOUS_STATE
    if getattr(layer, "record_past", False):  # 5.14 on
        return Reason.RECORDING_PAST
    return DecodeStates(conv, recurrent)


def convert_recurrent_state(cache: Any, layer_idx: int, dtype: torch.dtype) -> Tensor:
    """Puts the recurrent state of layer `layer_idx` into `dtype`; what `read_states` gave before is no longer its.

    Upstream's own passes go on with it: they compute in float32 and copy the result into the tensor that is there.
    """
    layer: Any = cache.layers[layer_idx]
    held = layer.recurrent_states
    state = (held[0] if isinstance(held, dict) else held).to(dtype)
    torch._dynamo.mark_static_address(state)  # as upstream does: a captured graph then updates it in place
    if isinstance(held, dict):
        held[0] = state
    else:
        layer.recurrent_states = state
    return state


def new_cache(config: Any, modeling: ModuleType) -> Any:
    """An empty cache for a model of `config`, of the class that its family's modeling module makes."""
    own = [made for name, made in vars(modeling).items() if name.endswith("DynamicCache") and name != "DynamicCache"]
    return own[0](config) if own else modeling.DynamicCache(config=config)  # up to 5.4 each family has one of its own


def update_functions() -> dict[str, Any]:
    """What upstream stores states with, by name: a fast step writes into the tensors in its place."""
    return {
        f"{owner.__name__}.{name}": vars(owner)[name]
        for owner in (Cache, LinearAttentionLayer)
        for name in ("update_conv_state", "update_recurrent_state")
    }


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
