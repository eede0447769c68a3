"""A decode step on a tensor-parallel rank's own heads.

Upstream's style (`upstream.sharding`) has every rank run every head on a full copy of the states. Here a rank runs
whole key heads of its own. Where its rows of a projection are those heads (`Family.rows_are_heads`), the gather after
it is left out; one gather of the heads' outputs before out_proj takes its place. The other heads' states go stale on
this rank: the cache layer owes them (`SplitDebt`), and fetches them before anything but such a step reads it.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Collection, Iterator
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import PatchError, RanksDisagree
from ..ops.step import Recipe, Sources, States, Step, Tokens
from ..upstream.caches import stored_states
from ..upstream.families import Family, HeadSizes, Parts, reader
from ..upstream.protocols import CacheLayer, Projection
from ..upstream.sharding import Ranks, projection_call
from ..upstream.unsettled import debt_of, owe, owing_layers, settle, settled_by
from .full import FullStep
from .ranks import exchange

# "auto" where no gather can be left out, so that splitting costs one more: batch x value heads from which it is taken
# to pay. On paper, not measured: at 128 x 128 float32 a head's state is read and written in 0.04 us at 3 TB/s; half of
# 2,048 of them is 40 us, and a small gather between GPUs of one host costs 20 to 40 us in eager mode.
CROSSOVER = 2048
_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13
_serials = itertools.count()


class SplitStep:
    """One layer's heads over the ranks: this rank's are value heads `recipe.heads`, of whole key heads."""

    splits_heads, defers = True, False

    def __init__(self, layer: nn.Module, full: FullStep, family: Family, sizes: HeadSizes, ranks: Ranks, mode: str):
        self.layer = weakref.ref(layer)
        self.full = full
        self.backends = full.backends
        self.family = family
        self.sizes = sizes
        self.ranks = ranks
        self.mode = mode
        heads = (ranks.rank * sizes.num_v_heads_per_tp, sizes.num_v_heads_per_tp)
        self.recipe: Recipe = full.recipe._replace(heads=heads)
        self.read = _reader_of_rank(family, sizes, ranks.rank)
        self.calls = {name: projection_call(getattr(layer, name)) for name in family.rows_are_heads}
        self.ungathered = frozenset(name for name, call in self.calls.items() if call.gathers_only())

    def note_on(self, backend: str) -> str:
        """What a report says of the layer."""
        (first, count), P = self.recipe.heads, self.ranks.size
        where = f"heads {first} to {first + count - 1} of {self.sizes.num_v_heads}, rank {self.ranks.rank} of {P}"
        return where if self.mode == "auto" else f"{where} ({self.mode})"

    def choose(self, states: States, cache_layer: CacheLayer | None) -> SplitStep | FullStep:
        """Whether so many sequences are split. Every rank must answer alike: from shapes alone."""
        if torch.compiler.is_compiling():
            return self.full
        batch = states.recurrent.shape[0]
        pays = self.mode == "on" or bool(self.ungathered) or batch * self.sizes.num_v_heads >= CROSSOVER
        return self if pays else self.full

    def run(self, parts: Parts, hidden_states: Tensor, cache_layer: CacheLayer | None, states: States) -> Tensor:
        """As `FullStep.run`, of this rank's heads: only their states are updated, and their outputs are gathered."""
        assert cache_layer is not None  # releases that shard projections have no caches of lists
        debt = debt_of(cache_layer)
        if not (isinstance(debt, SplitDebt) and debt.split is self):
            settle(cache_layer)
            owe(cache_layer, SplitDebt(self, (next(_serials),)))
        sources = self._own_rows(parts).project(hidden_states)
        step = Step(sources, self.read, states, parts.weights)
        out = self.backends.on(hidden_states.device).decode(step, self.recipe)
        return parts.project_out(self.gather(out))

    def _own_rows(self, parts: Parts) -> Parts:
        """The parts, of whose projections some give this rank's rows, ungathered."""
        named = zip(self.family.projections, parts.projections, strict=True)
        return parts._replace(projections=tuple([self._own_rows_of(name, projection) for name, projection in named]))

    def _own_rows_of(self, name: str, projection: Any) -> Projection:
        if name in self.ungathered and projection_call(projection) == self.calls[name]:
            return lambda x: F.linear(x, _local(projection.weight), _local(projection.bias))
        return projection

    def gather(self, out: Tensor) -> Tensor:
        """Head outputs of this rank, [B, count * DV], to those of all ranks, [B, HV * DV]."""
        return _all_gather(out, self.ranks).transpose(0, 1).reshape(out.shape[0], -1)

    def complete(self, states: States) -> None:
        """Fetches the heads of the other ranks, in place: one gather of the taps and one of the recurrent state."""
        with torch.inference_mode():
            for parts in self._parts(states):
                own = torch.cat([part[:, self.ranks.rank] for part in parts], dim=1)
                gathered = _all_gather(own, self.ranks).transpose(0, 1)  # [B, P, channels or heads of a rank, ...]
                for part, whole in zip(parts, gathered.split([x.shape[2] for x in parts], dim=2), strict=True):
                    part.copy_(whole)

    def spoil(self, states: States) -> None:
        """Sets the heads of the other ranks to NaN: better than to go on with stale ones unawares."""
        with torch.inference_mode():
            for part in itertools.chain.from_iterable(self._parts(states)):
                for rank in range(self.ranks.size):
                    if rank != self.ranks.rank:
                        part[:, rank].fill_(torch.nan)

    def _parts(self, states: States) -> tuple[list[Tensor], list[Tensor]]:
        """Views of the states by ranks: q, k and v channels [B, P, C / P, W]; heads [B, P, HV / P, DK, DV]."""
        key, value = (self.ranks.size * n for n in (self.sizes.key_dim_per_tp, self.sizes.value_dim_per_tp))
        by_rank = self.ranks.size, -1
        channels = [x.unflatten(1, by_rank) for x in states.conv.split((key, key, value), dim=1)]
        return channels, [states.recurrent.unflatten(1, by_rank)]


@cache
def _reader_of_rank(family: Family, sizes: HeadSizes, rank: int) -> Callable[[Sources], Tokens]:
    """A rank's key heads in what the projections returned: all of it, or the rank's part of a gathered output."""
    read, count = reader(family, sizes), sizes.num_k_heads_per_tp

    def own_heads(sources: Sources) -> Tokens:
        return Tokens(*(x if x.shape[1] == count else x.narrow(1, rank * count, count) for x in read(sources)))

    return own_heads


class SplitDebt:
    """A cache layer is right for this rank's heads only.

    serial: the same on every rank, which all do the same things. A copy's begins with that of its original, so that a
    copy which one rank alone makes does not count up what the others have.
    """

    def __init__(self, split: SplitStep, serial: tuple[int, ...]):
        self.split = split
        self.serial = serial
        self.lasts = False
        self._copies = itertools.count()

    def settle(self, states: States, *, by_reader: bool) -> None:
        """Fetches the other ranks' heads. A reader may be one rank alone: it asks for the others, and gives up."""
        if by_reader:
            answers = exchange(self.split.ranks, "reading a cache decoded with split heads", self.serial)
            if any(tuple(answer) != self.serial for answer in answers):
                raise RanksDisagree(
                    "reading a cache decoded with split heads: the ranks read different layers of it. Every rank must "
                    "read, copy and reorder the same ones in the same order"
                )
        self.split.complete(states)

    def hold(self) -> None:
        self.lasts = True

    def release(self) -> None:
        self.lasts = False

    def drop(self) -> None:
        """There is nothing to give up."""

    def tensors(self) -> tuple[Tensor, ...]:
        return ()

    def of_copy(self) -> SplitDebt:
        """A copy is made without the others, and is as stale."""
        return SplitDebt(self.split, (*self.serial, next(self._copies)))

    def check_pickle(self) -> None:
        raise PatchError(
            "this cache was decoded with its heads split over tensor-parallel ranks, and this rank holds only some of "
            "them: qwen_fastdecode.unpatch(model) on every rank makes it whole"
        )


def split_heads(
    layer: nn.Module, full: FullStep, family: Family, sizes: HeadSizes, ranks: Ranks, mode: str
) -> SplitStep | FullStep:
    """The layer's strategy over `ranks` (sizes: of all heads, with `tp_size`); its note says why not, if not."""
    if mode == "off":
        full.note = "all heads on every rank: head_parallel='off'"
    elif sizes.num_k_heads % ranks.size:
        full.note = f"all heads on every rank: {sizes.num_k_heads} key heads do not divide by {ranks.size} ranks"
    else:
        return SplitStep(layer, full, family, sizes, ranks, mode)
    return full


def settle_on_ranks(ranks: Ranks, layers: Collection[nn.Module]) -> None:
    """Makes true every living cache that these ranks decoded with split heads of `layers`. All of them must call it.

    A cache may be garbage that only some ranks have collected, or a copy that only some have made: what every rank has
    is settled, in the order of the serials, and of the rest the other ranks' heads are set to NaN.
    """
    owing = {debt.serial: (layer, debt) for layer, debt in _owed_by(layers) if debt.split.ranks.group is ranks.group}
    answers = exchange(ranks, "unpatch()", sorted(owing))
    everywhere = set.intersection(*({tuple(serial) for serial in answer} for answer in answers))
    for serial in sorted(owing):
        layer, debt = owing[serial]
        if serial in everywhere:
            settle(layer)
        else:
            _spoil(layer, debt)


def spoil_caches(layers: Collection[nn.Module]) -> None:
    """Where the ranks cannot be waited for (an exception is on its way): see `SplitStep.spoil`."""
    for layer, debt in list(_owed_by(layers)):
        _spoil(layer, debt)


def _owed_by(layers: Collection[nn.Module]) -> Iterator[tuple[CacheLayer, SplitDebt]]:
    """Cache layers that owe what a split step of one of `layers` left, each with its debt."""
    ids = {id(layer) for layer in layers}
    for layer, debt in owing_layers():
        if isinstance(debt, SplitDebt) and id(debt.split.layer()) in ids:
            yield layer, debt


def _spoil(layer: CacheLayer, debt: SplitDebt) -> None:
    states = stored_states(layer)
    if states is not None:
        debt.split.spoil(states)
    settled_by(layer)


def _all_gather(own: Tensor, ranks: Ranks) -> Tensor:
    """[...] of each rank to [P, ...]."""
    gathered = own.new_empty(ranks.size * own.shape[0], *own.shape[1:])
    _gather_into(gathered, own.contiguous(), group=ranks.group)
    return gathered.view(ranks.size, *own.shape)


def _local(weight: Tensor) -> Tensor:
    return weight.to_local() if hasattr(weight, "to_local") else weight
