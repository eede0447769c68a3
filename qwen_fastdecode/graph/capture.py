"""A decode step as a CUDA graph: recorded once, replayed from static inputs into outputs that are copied.

Recording executes nothing on the device. It happens on a stream of its own, in a mode that leaves other threads alone,
and without emptying anybody's memory cache. Graphs of one model share one pool of memory: what one of a server's batch
sizes took serves the next.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Recorder(Protocol):
    """What a call needs of a graph. Tests put one in its place that records operators on the CPU."""

    def record(self, step: Callable[[], Any]) -> Any:
        """What `step` returns; its work is recorded and not executed."""

    def replay(self) -> None:
        """Executes what was recorded, on the addresses that it was recorded with."""

    def close(self) -> None:
        """Gives the memory back."""


class Pool:
    """What the graphs of one model on one device share: memory, a stream to capture on, and one turn at a time.

    Graphs that share memory overwrite one another's outputs, so a replay and the copy of its outputs are one turn. The
    memory stays with the pool, for the next graph; PyTorch takes it back when the pool is gone and memory is short.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.turn = threading.RLock()
        self._anchor: torch.cuda.CUDAGraph | None = None  # keeps the memory: a pool goes with its last graph
        self._capturing: torch.cuda.Stream | None = None
        self._last: torch.cuda.Stream | None = None

    @contextmanager
    def on_capturing_stream(self) -> Iterator[None]:
        """After what the caller has asked of the device, and before what he asks of it next."""
        with torch.cuda.device(self.device):
            stream = self._own_stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                yield
            torch.cuda.current_stream().wait_stream(stream)

    def memory(self) -> Any:
        """The identity of the pool's memory; call it on the capturing stream."""
        if self._anchor is None:
            anchor, zero = torch.cuda.CUDAGraph(), torch.zeros((), device=self.device)
            anchor.capture_begin(capture_error_mode=OWN_THREAD)
            zero.add_(0)
            anchor.capture_end()
            self._anchor = anchor
        return self._anchor.pool()

    def forget_memory(self, *, keep: bool) -> None:
        """The next graph gets other memory. keep: PyTorch still has pointers to what there was."""
        if self._anchor is not None and keep:
            _refused.append(self._anchor)
        self._anchor = None

    def _own_stream(self) -> torch.cuda.Stream:
        """One of torch's, never the one that the caller works on."""
        current = torch.cuda.current_stream()
        while self._capturing is None or self._capturing == current:
            self._capturing = torch.cuda.Stream(priority=-1)
        return self._capturing

    @contextmanager
    def in_order(self) -> Iterator[None]:
        """A turn; work that the last one left on another stream comes first."""
        with self.turn:
            current = torch.cuda.current_stream(self.device)
            if self._last is not None and self._last != current:
                current.wait_stream(self._last)
            self._last = current
            yield


class HostRead(RuntimeError):
    """The step waits for the device, which a graph cannot."""


_aten: Any = torch.ops.aten
_READS = {
    _aten._local_scalar_dense.default,
    _aten.is_nonzero.default,
    _aten.equal.default,
    _aten.nonzero.default,
    _aten.masked_select.default,
    _aten._unique2.default,
    _aten.unique_dim.default,
    _aten.unique_consecutive.default,
    _aten.bincount.default,
}
_INDEXING = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default}
_COPIES = {_aten._to_copy.default, _aten.copy_.default}


class NoHostReads(TorchDispatchMode):
    """Raises before an operator waits for the device: once CUDA has refused it, the capture cannot be ended properly,
    and PyTorch's allocators would go on for ever as if it were under way."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _READS or _counts_a_mask(func, args, kwargs) or _is_open(func, args, kwargs):
            raise HostRead(f"{func} reads values on the host")
        if func in _COPIES and _crosses(args, kwargs):
            raise HostRead(f"{func} copies between host and device")
        return func(*args, **kwargs)


def _counts_a_mask(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether a mask has to be counted: for the shape of what it picks, or for where values go. One number that is put
    where a single mask says is filled in, without counting (`x[mask] = 0`, as a sharded embedding has it)."""
    masks = [index for index in args[1] if _is_mask(index)] if func in _INDEXING else []
    if not masks or func is _aten.index.Tensor:
        return bool(masks)
    into, number, accumulates = args[0], args[2], args[3] if len(args) > 3 else kwargs.get("accumulate", False)
    alone = sum(index is not None for index in args[1]) == 1 and masks[0].device == into.device
    return accumulates or not alone or number.numel() != 1 or number.device.type != "cpu"


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


def _is_open(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether the length of the result is the sum of a tensor."""
    return func is _aten.repeat_interleave.Tensor and kwargs.get("output_size") is None


def _crosses(args: Any, kwargs: Any) -> bool:
    to = kwargs.get("device") or next((other.device for other in args[1:] if isinstance(other, Tensor)), None)
    return to is not None and torch.device(to).type != args[0].device.type


class CudaRecorder:
    """A `torch.cuda.CUDAGraph` in a pool."""

    def __init__(self, pool: Pool):
        self._graph: torch.cuda.CUDAGraph | None = torch.cuda.CUDAGraph()
        self._pool = pool

    def record(self, step: Callable[[], Any]) -> Any:
        graph, pool = self._graph, self._pool
        assert graph is not None
        with pool.turn, _one_capture, pool.on_capturing_stream():
            memory = pool.memory()
            graph.capture_begin(pool=memory, capture_error_mode=OWN_THREAD)
            try:
                with NoHostReads():
                    out = step()
            except BaseException:
                self._abandon(graph, memory)
                raise
            graph.capture_end()
        return out

    def replay(self) -> None:
        assert self._graph is not None
        self._graph.replay()

    def close(self) -> None:
        if self._graph is not None:
            self._graph.reset()
            self._graph = None

    def _abandon(self, graph: torch.cuda.CUDAGraph, memory: Any) -> None:
        """Ends a capture in which something failed. If CUDA itself refused it, PyTorch before 2.12 stops half way: its
        allocator and its random generator take it to be under way. The allocator is told; the generator learns it from
        the capture that the new memory of the pool begins with."""
        try:
            graph.capture_end()
        except RuntimeError:
            _refused.append(graph)
            self._graph = None
            with suppress(RuntimeError):  # PyTorch had ended it after all
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), memory)
            self._pool.forget_memory(keep=True)
            self._pool.memory()
        else:
            self._pool.forget_memory(keep=False)  # it may have been all that there is


OWN_THREAD = "thread_local"  # other threads may do with the device what a capture forbids
_one_capture = threading.RLock()
# Graphs whose capture CUDA refused, and their memory: PyTorch keeps pointers to them. `GIVE_UP_AFTER` a model at most.
_refused: list[torch.cuda.CUDAGraph] = []


def recorder(pool: Pool) -> Recorder:
    """A new recorder; tests replace this function."""
    return CudaRecorder(pool)


def wait(device: torch.device) -> None:
    """Until the device has done what was asked of it on this thread's stream."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


class Graph:
    """A recorded step with its static inputs: one `replay` with new inputs gives new outputs."""

    def __init__(self, pool: Pool, step: Callable[..., Any], inputs: dict[str, Any]):
        self._pool = pool
        self._inputs, self._constants = _split(inputs)
        self._buffers = {path: _buffer(tensor) for path, tensor in self._inputs.items()}
        self._recorder = recorder(pool)
        try:
            self._outputs = self._recorder.record(lambda: step(**_join(inputs, self._buffers)))
        except BaseException:
            self.close()
            raise
        self._inputs = {path: _kind(tensor) for path, tensor in self._inputs.items()}

    def takes(self, inputs: dict[str, Any]) -> bool:
        """Whether these inputs are of the kind that was recorded: only values in tensors may differ."""
        tensors, constants = _split(inputs)
        kinds = {path: _kind(tensor) for path, tensor in tensors.items()}
        return kinds == self._inputs and constants == self._constants

    def replay(self, inputs: dict[str, Any]) -> Any:
        """The outputs for these inputs, in memory of their own."""
        tensors, _ = _split(inputs)
        with self._pool.in_order():
            for path, buffer in self._buffers.items():
                buffer.copy_(tensors[path])
            self._recorder.replay()
            return copied(self._outputs)

    def close(self) -> None:
        """The memory is given back; nothing can be replayed any more."""
        self._outputs = None
        self._recorder.close()


class _Same:
    """A constant among the inputs: numbers and texts by value, everything else (a cache) by identity."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Same):
            return False
        plain = isinstance(self.value, bool | int | float | str)
        same = plain and type(self.value) is type(other.value) and self.value == other.value
        return same or self.value is other.value

    __hash__ = None  # type: ignore[assignment]


def _split(inputs: dict[str, Any]) -> tuple[dict[Any, Tensor], dict[Any, _Same]]:
    """The tensors and the rest, by their place: inputs are named, and masks are a dictionary of named ones."""
    tensors: dict[Any, Tensor] = {}
    constants: dict[Any, _Same] = {}
    for name, value in inputs.items():
        for path, leaf in (
            {(name, key): leaf for key, leaf in value.items()}.items() if _nested(value) else [(name, value)]
        ):
            if isinstance(leaf, Tensor):
                tensors[path] = leaf
            else:
                constants[path] = _Same(leaf)
    return tensors, constants


def _join(inputs: dict[str, Any], buffers: dict[Any, Tensor]) -> dict[str, Any]:
    """The inputs with buffers in the place of tensors."""
    return {
        name: {key: buffers.get((name, key), leaf) for key, leaf in value.items()}
        if _nested(value)
        else buffers.get(name, value)
        for name, value in inputs.items()
    }


def _nested(value: Any) -> bool:
    return type(value) is dict


def _kind(tensor: Tensor) -> Any:
    return tensor.shape, tensor.dtype, tensor.device


def _buffer(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def copied(outputs: Any) -> Any:
    """The outputs with every tensor copied: a graph overwrites its own, and the caller may keep these.

    Caches and whatever else the outputs hold are passed on.
    """
    if isinstance(outputs, Tensor):
        return outputs.clone()
    if isinstance(outputs, dict):  # a ModelOutput is one
        return type(outputs)(**{name: copied(value) for name, value in outputs.items()})
    if type(outputs) in (tuple, list):
        return type(outputs)(copied(value) for value in outputs)
    return outputs


def tensors_in(outputs: Any) -> Iterator[Tensor]:
    """Every tensor of the outputs."""
    if isinstance(outputs, Tensor):
        yield outputs
    elif isinstance(outputs, dict):
        for value in outputs.values():
            yield from tensors_in(value)
    elif type(outputs) in (tuple, list):
        for value in outputs:
            yield from tensors_in(value)
