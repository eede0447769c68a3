"""Tensor parallelism: the only place that knows upstream's parallel styles and the process group.

Upstream shards in_proj_* and out_proj by output features and gathers every output ("colwise_gather_output"), so that
each rank runs every head on a full copy of the states. Here a rank runs whole key heads of its own. Where its rows of a
projection are those heads (`Family.rows_are_heads`), the gather after it is left out; one gather of the heads' outputs
before out_proj takes its place. The other heads' states go stale on this rank: their cache layer is marked
(`caches.Partial`), and made whole before anything but such a step reads it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..upstream.caches import DecodeStates, Partial, marked_layers, stored_states
from ..upstream.families import DecodeViews, Family, HeadSizes
from .ranks import Ranks, exchange

HEAD_PARALLEL = ("auto", "on", "off")
STYLE = "colwise_gather_output"
# "auto" where no gather can be left out, so that splitting costs one more: batch x value heads from which it is taken
# to pay. On paper, not measured: at 128 x 128 float32 a head's state is read and written in 0.04 us at 3 TB/s; half of
# 2,048 of them is 40 us, and a small gather between GPUs of one host costs 20 to 40 us in eager mode.
CROSSOVER = 2048
_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13


def ranks_of(layer: nn.Module, projections: Iterable[str]) -> Ranks | None:
    """The ranks over which a layer's projections are sharded; None where they are whole."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    meshes = (_mesh(getattr(layer, name, None)) for name in projections)
    mesh = next((mesh for mesh in meshes if mesh is not None), None)
    if mesh is None or mesh.ndim != 1 or mesh.size() == 1:
        return None
    return Ranks(mesh.get_group(), mesh.get_local_rank(), mesh.size())


def _mesh(projection: Any) -> Any:
    """The device mesh over which a projection's rows are sharded."""
    from torch.distributed.tensor import DTensor, Shard

    weight = getattr(projection, "weight", None)
    if isinstance(weight, DTensor):  # Transformers 5.16 on
        return weight.device_mesh if weight.placements == (Shard(0),) else None
    return getattr(projection, "_hf_device_mesh", None) if getattr(projection, "_hf_tp_plan", None) == STYLE else None


class HeadSplit:
    """One layer's heads over the ranks: this rank's are value heads `heads` = (first, count), whole key heads."""

    def __init__(self, layer: nn.Module, family: Family, sizes: HeadSizes, ranks: Ranks, mode: str):
        self.family = family
        self.sizes = sizes
        self.ranks = ranks
        self.mode = mode
        self.heads = (ranks.rank * sizes.num_v_heads_per_tp, sizes.num_v_heads_per_tp)
        self.key_heads = (ranks.rank * sizes.num_k_heads_per_tp, sizes.num_k_heads_per_tp)
        self.calls = {name: _call(getattr(layer, name)) for name in family.rows_are_heads}
        self.ungathered = frozenset(name for name, call in self.calls.items() if call.gathers_only())

    def serves(self, batch: int) -> bool:
        """Whether a decode step of so many sequences is split. Every rank must answer alike: from shapes alone."""
        if torch.compiler.is_compiling():
            return False
        return self.mode == "on" or bool(self.ungathered) or batch * self.sizes.num_v_heads >= CROSSOVER

    def project(self, layer: Any, hidden_states: Tensor) -> DecodeViews:
        """As `Family.project`, of this rank's key heads alone."""
        views = self.family.project(_OwnRows(layer, self), hidden_states, self.sizes)
        first, count = self.key_heads
        return DecodeViews(*(x if x.shape[1] == count else x.narrow(1, first, count) for x in views))

    def gather(self, out: Tensor) -> Tensor:
        """Head outputs of this rank, [B, count * DV], to those of all ranks, [B, HV * DV]."""
        return _all_gather(out, self.ranks).transpose(0, 1).reshape(out.shape[0], -1)

    def complete(self, states: DecodeStates) -> None:
        """Fetches the heads of the other ranks, in place: one gather of the taps and one of the recurrent state."""
        with torch.inference_mode():
            for parts in self._parts(states):
                own = torch.cat([part[:, self.ranks.rank] for part in parts], dim=1)
                gathered = _all_gather(own, self.ranks).transpose(0, 1)  # [B, P, channels or heads of a rank, ...]
                for part, whole in zip(parts, gathered.split([x.shape[2] for x in parts], dim=2), strict=True):
                    part.copy_(whole)

    def spoil(self, states: DecodeStates) -> None:
        """Sets the heads of the other ranks to NaN: better than to go on with stale ones unawares."""
        with torch.inference_mode():
            for part in itertools.chain.from_iterable(self._parts(states)):
                for rank in range(self.ranks.size):
                    if rank != self.ranks.rank:
                        part[:, rank].fill_(torch.nan)

    def _parts(self, states: DecodeStates) -> tuple[list[Tensor], list[Tensor]]:
        """Views of the states by ranks: q, k and v channels [B, P, C / P, W]; heads [B, P, HV / P, DK, DV]."""
        key, value = (self.ranks.size * n for n in (self.sizes.key_dim_per_tp, self.sizes.value_dim_per_tp))
        by_rank = self.ranks.size, -1
        channels = [x.unflatten(1, by_rank) for x in states.conv.split((key, key, value), dim=1)]
        return channels, [states.recurrent.unflatten(1, by_rank)]

    def __str__(self) -> str:
        (first, count), P = self.heads, self.ranks.size
        where = f"heads {first} to {first + count - 1} of {self.sizes.num_v_heads}, rank {self.ranks.rank} of {P}"
        return where if self.mode == "auto" else f"{where} ({self.mode})"


def split_heads(layer: nn.Module, family: Family, sizes: HeadSizes, ranks: Ranks, mode: str) -> HeadSplit | str:
    """The layer's split over `ranks` (sizes: those of all heads), or why every rank must run every head."""
    if mode == "off":
        return "all heads on every rank: head_parallel='off'"
    if sizes.num_k_heads % ranks.size:
        return f"all heads on every rank: {sizes.num_k_heads} key heads do not divide by {ranks.size} ranks"
    return HeadSplit(layer, family, sizes, ranks, mode)


def complete(cache: Any, layer_idx: int) -> None:
    """Makes a cache layer whole if steps were split on it: before anything but such a step reads it."""
    layers = getattr(cache, "layers", ())
    if layer_idx < len(layers) and Partial.of(layers[layer_idx]) is not None:
        _complete_layer(layers[layer_idx])


@torch.compiler.disable
def _complete_layer(layer: Any) -> None:
    mark, states = Partial.of(layer), stored_states(layer)
    if mark is not None and states is not None:  # None: `reset()` left nothing that is read
        mark.split.complete(states)
    Partial.remove(layer)


def complete_caches(ranks: Ranks) -> None:
    """Makes whole every living cache that these ranks decoded with split heads. All of them must call it.

    A cache may be garbage that only some ranks have collected: those that every rank has are made whole, in the order
    of their marks.
    """
    layers = {mark.serial: layer for layer, mark in marked_layers() if mark.split.ranks.group is ranks.group}
    alive = set.intersection(*(set(other) for other in exchange(ranks, "unpatch()", sorted(layers))))
    for serial in sorted(alive):
        _complete_layer(layers[serial])


def spoil_caches() -> None:
    """Where the ranks cannot be waited for (an exception is on its way): see `HeadSplit.spoil`."""
    for layer, mark in marked_layers():
        states = stored_states(layer)
        if states is not None:
            mark.split.spoil(states)
        Partial.remove(layer)


def _all_gather(own: Tensor, ranks: Ranks) -> Tensor:
    """[...] of each rank to [P, ...]."""
    gathered = own.new_empty(ranks.size * own.shape[0], *own.shape[1:])
    _gather_into(gathered, own.contiguous(), group=ranks.group)
    return gathered.view(ranks.size, *own.shape)


class _Call(NamedTuple):
    """All that decides what calling a projection does. A change (an adapter, a hook) makes it another one."""

    kind: type
    plan: str | None  # Transformers up to 5.15 name the style on the module
    forward: Any  # replaced on the instance
    hooks: tuple[Any, ...]
    pre_hooks: tuple[Any, ...]

    def gathers_only(self) -> bool:
        """Whether it is a linear map of this rank's rows and upstream's gather, and nothing else that we know of."""
        if self.kind is not nn.Linear:
            return False
        if self.forward is None:  # up to 5.15: one hook before the module (for gradients) and one after it
            hooks = (*self.hooks, *self.pre_hooks)
            names = {f"{hook.__module__}.{getattr(hook, '__qualname__', '')}" for hook in hooks}
            known = "transformers.integrations.tensor_parallel.distribute_module.<locals>.<lambda>"
            return self.plan == STYLE and len(hooks) == 2 and names == {known}
        return not self.hooks and not self.pre_hooks and _is_gathering_forward(self.forward)


def _call(projection: Any) -> _Call:
    has = vars(projection).get
    hooks, pre_hooks = tuple(projection._forward_hooks.values()), tuple(projection._forward_pre_hooks.values())
    return _Call(type(projection), has("_hf_tp_plan"), has("forward"), hooks, pre_hooks)


def _is_gathering_forward(forward: Any) -> bool:
    """From 5.16 on a style puts a closure over the module's forward; only that over nn.Linear's own is known."""
    from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES

    name = f"{getattr(forward, '__module__', '')}.{getattr(forward, '__qualname__', '')}"
    if name != "transformers.distributed.tensor_parallel.TensorParallelLayer.install_forward.<locals>.tp_forward":
        return False
    cells = dict(zip(forward.__code__.co_freevars, (cell.cell_contents for cell in forward.__closure__), strict=True))
    original = getattr(cells.get("original_forward"), "__func__", None)
    return cells.get("self") is ALL_PARALLEL_STYLES[STYLE] and original is nn.Linear.forward


class _OwnRows:
    """Stands in for a layer where a family projects: some projections give this rank's rows, ungathered."""

    __slots__ = ("layer", "split")

    def __init__(self, layer: Any, split: HeadSplit):
        self.layer = layer
        self.split = split

    def __getattr__(self, name: str) -> Any:
        projection = getattr(self.layer, name)
        if name in self.split.ungathered and _call(projection) == self.split.calls[name]:
            return lambda x: F.linear(x, _local(projection.weight), _local(projection.bias))
        return projection


def _local(weight: Any) -> Any:
    return weight.to_local() if hasattr(weight, "to_local") else weight
