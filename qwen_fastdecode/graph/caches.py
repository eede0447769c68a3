"""A cache with fixed addresses for the decode steps: made from the prompt's, grown in steps, and made back.

The prompt runs on Transformers' own DynamicCache, as it does without a patch. Its attention layers are then copied into
static ones, which are a little longer than what they hold and not as long as the call may ever become: attention reads
the whole of a static layer at every step. Linear attention layers have fixed addresses anyway and are the same objects
in both caches.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import cache_utils

from ..upstream.protocols import AttentionLayer, CacheLayer, ModelCache, TextConfig
from ..upstream.unsettled import debt_of, owed_tensors, own_class

# Releases before the oldest that is captured (`eligible.OLDEST`) do not have all of them, and nothing is of class None.
_Dynamic: Any = getattr(cache_utils, "DynamicLayer", None)
_Static: Any = getattr(cache_utils, "StaticLayer", None)
_Linear: Any = getattr(cache_utils, "LinearAttentionLayer", None)
_SPARE = 0.5  # of the free memory
STEP = 256  # positions: a static layer's length is a multiple of it where the call's bound does not cut it short


def capacity(length: int, limit: int) -> int:
    """How long static layers are made that hold `length` positions, in a call that ends at `limit`.

    Half as long again: then a call of any length captures a few times only, and attention reads little in vain.
    """
    room = -(-(length + max(STEP, length // 2)) // STEP) * STEP
    return min(room, limit) if length < limit else room


def reviewed(cache: ModelCache) -> bool:
    """Whether the cache consists of layers whose code was read, with a past: no other holds a Python number that
    a replay would not advance (sliding windows do)."""
    return (
        type(cache) is cache_utils.DynamicCache
        and not getattr(cache, "offloading", False)
        and any(type(layer) is _Dynamic for layer in cache.layers)
        and all(_reviewed(layer) for layer in cache.layers)
    )


def _reviewed(layer: Any) -> bool:
    if type(layer) is _Dynamic:
        return layer.is_initialized and layer.keys.shape[:-1] == layer.values.shape[:-1]
    if own_class(layer) is not _Linear or getattr(layer, "record_past", False):
        return False
    return all(state is not None for state in _states(layer))


def fits(cache: ModelCache, limit: int) -> bool:
    """Whether there is memory for the static layers beside what the cache holds, which goes layer by layer."""
    held = [tensor for layer in cache.layers if type(layer) is _Dynamic for tensor in (layer.keys, layer.values)]
    longer = capacity(held[0].shape[-2], limit) / max(1, held[0].shape[-2])
    return total_bytes(held) * longer < _SPARE * free_bytes(held[0].device)


class GrowingCache:
    """A StaticCache in the place of the DynamicCache that it was made from."""

    def __init__(self, dynamic: ModelCache, config: TextConfig, limit: int):
        self._dynamic = dynamic
        self._limit = limit
        self.length = next(layer.keys.shape[-2] for layer in dynamic.layers if type(layer) is _Dynamic)
        self.capacity = capacity(self.length, limit)
        self.static: ModelCache = cache_utils.StaticCache(config=config, max_cache_len=self.capacity)
        self.static.layers = [self._converted(layer) for layer in dynamic.layers]

    def _converted(self, layer: Any) -> Any:
        """Layer by layer, each old one let go: the cache is never there twice."""
        if type(layer) is not _Dynamic:
            return layer
        static = _Static(max_cache_len=self.capacity)
        static.lazy_initialization(layer.keys, layer.values)
        static.keys[:, :, : self.length] = layer.keys
        static.values[:, :, : self.length] = layer.values
        static.cumulative_length.fill_(self.length)
        layer.keys = layer.values = None
        return static

    def fills_up(self) -> bool:
        """Whether the step that was just made took the last place."""
        return self.length + 1 >= self.capacity

    def may_grow(self) -> bool:
        """Whether there is memory for it."""
        held = [tensor for layer in self._attention() for tensor in (layer.keys, layer.values)]
        longer = capacity(self.length + 1, self._limit) / self.capacity
        return total_bytes(held) * (longer - 1) + 2 * longer * total_bytes(held[:1]) < _SPARE * free_bytes(
            held[0].device
        )

    def advance(self) -> bool:
        """A step has been made. True where that filled the static layers, which are now longer and elsewhere."""
        self.length += 1
        if self.length < self.capacity:
            return False
        old, self.capacity = self.capacity, capacity(self.length, self._limit)
        for layer in self._attention():
            for name in ("keys", "values"):
                held = getattr(layer, name)
                longer = held.new_zeros((*held.shape[:2], self.capacity, held.shape[3]))
                longer[:, :, :old] = held
                setattr(layer, name, longer)
            layer.max_cache_len = self.capacity
        return True

    def back(self) -> ModelCache:
        """The DynamicCache that this one was made from, holding what this one holds."""
        for static, dynamic in zip(self.static.layers, self._dynamic.layers, strict=True):
            if type(static) is _Static:
                dynamic.keys = static.keys[:, :, : self.length].clone()
                dynamic.values = static.values[:, :, : self.length].clone()
                static.keys = static.values = None
        return self._dynamic

    def rewind(self) -> None:
        """Undoes that a step advanced the lengths on the device; what it wrote is overwritten by the next."""
        for layer in self._attention():
            layer.cumulative_length.fill_(self.length)

    def addresses(self) -> list[int]:
        """Where everything is that a step reads or writes: beam search and its kin replace tensors."""
        return [*map(Tensor.data_ptr, self._tensors())]

    def states(self) -> list[Tensor]:
        """What a step overwrites: the states of each linear attention layer, and what it owes to them."""
        return [state for layer in self._linear() for state in (*_states(layer), *owed_tensors(layer))]

    def hold_debts(self) -> None:
        """A graph has recorded the step: its replays leave undone what the step does, and tell nobody."""
        for debt in filter(None, map(debt_of, self._linear())):
            debt.hold()

    def release_debts(self) -> None:
        """That graph is gone."""
        for debt in filter(None, map(debt_of, self._linear())):
            debt.release()

    def python_values(self) -> list[dict[str, bool | int | float | str]]:
        """The numbers and flags that layers keep outside of tensors."""
        return [
            {name: value for name, value in vars(layer).items() if isinstance(value, bool | int | float | str)}
            for layer in self.static.layers
        ]

    def _attention(self) -> Iterator[AttentionLayer]:
        return (layer for layer in self.static.layers if type(layer) is _Static)

    def _linear(self) -> Iterator[CacheLayer]:
        return (layer for layer in self.static.layers if type(layer) is not _Static)

    def _tensors(self) -> Iterator[Tensor]:
        for layer in self._attention():
            yield from (layer.keys, layer.values, layer.cumulative_length)
        yield from self.states()


def _states(layer: CacheLayer) -> list[Tensor]:
    """The conv and the recurrent state as they are (from 5.14 on in dictionaries: several a layer)."""
    held = vars(layer)["conv_states"], vars(layer)["recurrent_states"]
    return [state for states in held for state in (states.values() if isinstance(states, dict) else [states])]


def total_bytes(tensors: list[Tensor]) -> int:
    """Memory that a copy of them takes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def free_bytes(device: torch.device) -> int:
    """What can still be allocated on a device."""
    if device.type != "cuda":
        return 1 << 40
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
