"""A stand-in for a CUDA graph on the CPU: it records operators with the tensors that they were called on, and replays
them on these very tensors. What a CUDA graph could not do fails here too:

    reading a value on the host           raises while recording
    executing while recording             undone: what was written is put back, new tensors are filled with NaN
    a tensor that was replaced            a replay goes on with the old one
    a Python value that changed           a replay goes on with the old one
    a collective                          is sent when it is replayed, and waits for no other rank while it is recorded
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
COLLECTIVES = ("c10d", "_c10d_functional")
READS = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.is_nonzero.default,
    aten.equal.default,
    aten._unique2.default,
}
PUT = aten.index_put_.default
LIFT = aten.lift_fresh.default  # a tensor made of Python numbers


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
        self._number: Tensor | None = None

    def _copies_a_number(self, func: Any, args: Any) -> bool:
        """Whether one of Python's numbers became a tensor on the device, which copies from the host. `x[mask] = 0` does
        not: it fills."""
        number, self._number = self._number, None
        if func is LIFT and args[0].dim() == 0:
            self._number = args[0]
            return False
        fills = number is not None and func is PUT and args[2].data_ptr() == number.data_ptr()
        return func is LIFT or not (number is None or fills)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(issubclass(kind, DTensor | AsyncCollectiveTensor) for kind in types):
            return NotImplemented  # it comes again with what they make of it
        if func in READS or self._copies_a_number(func, args):
            raise HostRead(f"{func} is not permitted while a graph is recorded")
        for tensor in written(func, args, kwargs):
            at = tensor.untyped_storage().data_ptr()
            if at not in self.before and at not in self._made_at:
                whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
                self.before[at] = whole, whole.clone()
        out = unsent(func, args) if func.namespace in COLLECTIVES else func(*args, **kwargs)
        known = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in known:
                self.made.append(leaf)
                self._made_at.add(leaf.untyped_storage().data_ptr())
        self.steps.append((func, args, kwargs, out))
        return out


def unsent(func: Any, args: Any) -> Any:
    """What a collective gives while nothing is sent: tensors of the right size."""
    name = func._schema.name.partition("::")[2]
    if name == "wait_tensor":
        return args[0]
    if func.namespace == "_c10d_functional":
        own, ranks = args[0], args[1] if name == "all_gather_into_tensor" else 1
        return own.new_empty(ranks * own.shape[0], *own.shape[1:])
    assert name in ("allreduce_", "allgather_", "_allgather_base_"), name
    return args[0], FakeWork().boxed()


def sent(func: Any, args: Any, kwargs: Any) -> Any:
    """What an operator gives, which is there when this returns."""
    out = func(*args, **kwargs)
    if func.namespace == "_c10d_functional":
        return torch.ops._c10d_functional.wait_tensor(out)
    if func.namespace == "c10d":
        dist.Work.unbox(out[1]).wait()
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
            again = sent(func, args, kwargs)
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
