"""A stand-in for a CUDA graph on the CPU: it records operators with the tensors that they were called on, and replays
them on these very tensors. What a CUDA graph could not do fails here too:

    reading a value on the host           raises while recording
    executing while recording             undone: what was written is put back, new tensors are filled with NaN
    a tensor that was replaced            a replay goes on with the old one
    a Python value that changed           a replay goes on with the old one
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
READS = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.is_nonzero.default,
    aten.equal.default,
    aten._unique2.default,
    aten.lift_fresh.default,  # a tensor made of Python numbers: a copy from the host
}


class HostRead(RuntimeError):
    """As CUDA's 'operation not permitted when stream is capturing'."""


class Recording(TorchDispatchMode):
    """Every operator that runs, with what it read and wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[Any, Any, Any, Any]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # by storage: the tensor, and what it held
        self.made: list[Tensor] = []
        self._made_at: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in READS:
            raise HostRead(f"{func} is not permitted while a graph is recorded")
        for tensor in written(func, args, kwargs):
            at = tensor.untyped_storage().data_ptr()
            if at not in self.before and at not in self._made_at:
                whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
                self.before[at] = whole, whole.clone()
        out = func(*args, **kwargs)
        known = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in known:
                self.made.append(leaf)
                self._made_at.add(leaf.untyped_storage().data_ptr())
        self.steps.append((func, args, kwargs, out))
        return out


def written(func: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
    """The arguments that an operator writes into."""
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            yield from (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


class RecordedGraph:
    """Has the methods of the package's recorder of CUDA graphs."""

    living = 0

    def __init__(self, pool: Any):
        self._steps: list[Any] | None = None
        type(self).living += 1

    def record(self, step: Callable[[], Any]) -> Any:
        recording = Recording()
        try:
            with recording:
                out = step()
        finally:
            with torch.inference_mode():  # the package's step makes inference tensors
                for whole, before in recording.before.values():
                    whole.copy_(before)
                for tensor in recording.made:
                    tensor.fill_(float("nan") if tensor.is_floating_point() else 0)
        self._steps = recording.steps
        return out

    @torch.inference_mode()
    def replay(self) -> None:
        assert self._steps is not None
        for func, args, kwargs, out in self._steps:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                    old.copy_(new)

    def close(self) -> None:
        self._steps = None
        type(self).living -= 1


class Pool:
    """Without streams and memory of its own."""

    def __init__(self, device: torch.device):
        self.device = device

    @contextmanager
    def in_order(self) -> Iterator[None]:
        yield
