"""Counts what ranks send one another: a dispatch mode sees every collective, DTensor's functional ones included."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache

NAMESPACES = ("c10d", "_c10d_functional")
KINDS = ("all_gather", "all_reduce", "reduce_scatter", "all_to_all", "broadcast")
PROMPT = 6


class Collectives(TorchDispatchMode):
    """Collectives by name, and the bytes that this rank receives of the others: all of a gather's result but its own.

    An all-reduce counts its tensor twice, as a ring moves it (reduce-scatter, then all-gather).
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes = 0

    @property
    def count(self) -> int:
        """All of them."""
        return self.calls.total()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from torch.distributed.tensor import DTensor

        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes again with what DTensor makes of it
        result = func(*args, **(kwargs or {}))
        name = func.__name__.replace("allgather", "all_gather").replace("allreduce", "all_reduce")
        kind = next((kind for kind in KINDS if kind in name), None)
        if func.namespace in NAMESPACES and kind is not None:
            largest = max(x.numel() * x.element_size() for x in tree_leaves((args, result)) if isinstance(x, Tensor))
            self.calls[kind] += 1
            P = dist.get_world_size()
            self.bytes += largest * (P - 1) // P * (2 if kind == "all_reduce" else 1)
        return result


@torch.no_grad()
def of_a_layer(model: Any, batch: int, new_tokens: int = 1) -> Collectives:
    """Those of one call of the model's first gated DeltaNet layer, on a cache that has decoded one token before."""
    layer = next(module for module in model.modules() if type(module).__name__.endswith("GatedDeltaNet"))
    torch.manual_seed(0)
    size, device, dtype = model.config.get_text_config().hidden_size, layer.A_log.device, model.dtype
    cache = DynamicCache(config=model.config)
    for tokens in (PROMPT, 1):
        layer(torch.randn(batch, tokens, size, device=device, dtype=dtype), cache_params=cache)
    x = torch.randn(batch, new_tokens, size, device=device, dtype=dtype)
    with Collectives() as seen:
        layer(x, cache_params=cache)
    return seen
