"""What comes between the steps of a call, on every rank or on one: things that captured steps have to notice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from qwen_fastdecode.graph import caches, capture


class At(StoppingCriteria):
    """Does something once, when the text has a length; it never stops."""

    def __init__(self, length: int, does: Callable[[], None]):
        self.length, self.does = length, does

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        if input_ids.shape[1] == self.length:
            self.does()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@contextmanager
def steps_of(positions: int) -> Iterator[None]:
    """Static layers that are as short as that, and grow often."""
    kept, caches.STEP = caches.STEP, positions
    try:
        yield
    finally:
        caches.STEP = kept


@contextmanager
def failing(model: Any, own: bool) -> Iterator[None]:
    """On this rank, if `own`, recording runs out of memory in the middle of a step."""

    def out_of_memory(module: Any, args: Any) -> None:
        raise torch.OutOfMemoryError("as if")

    class Failing(capture.CudaRecorder):
        def record(self, step: Callable[[], Any]) -> Any:
            hook = model.model.layers[-1].register_forward_pre_hook(out_of_memory)
            try:
                return super().record(step)
            finally:
                hook.remove()

    kept = capture.recorder
    if own:
        capture.recorder = Failing
    try:
        yield
    finally:
        capture.recorder = kept


def moved(model: Any) -> None:
    """A weight of this rank lies elsewhere."""
    weight = model.model.layers[0].linear_attn.out_proj.weight
    if hasattr(weight, "_local_tensor"):
        weight._local_tensor = weight._local_tensor.clone()
    else:  # before DTensors
        weight.data = weight.data.clone()
