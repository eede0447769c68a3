"""Launches the kernels of `deferred`: the step on states that are written every N-th time, and what settles them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...errors import UnsupportedStep
from ..prepared import Prepared
from ..ring import Kind, Ring, check_deferred, check_kind, check_ring, kind_of
from ..step import Recipe, Step, StepShapes
from . import gpu, tiles
from .clusters import clusters_reason, in_clusters
from .deferred import decode_deferred, settle_states
from .layout import check_arguments, layout_of, numbers_of, places_of
from .tiles import Tile


class DeferredTile(NamedTuple):
    """How a program works on states: whole heads where it reads them, parts of their rows where it folds."""

    num_warps: int
    parts: int
    max_registers: int = 0  # as in `Tile`
    prefetch: bool = False  # ask for a head's state while the one before is finished, and for all the ring's keys
    clustered: bool = False  # as in `Tile`


class Tuned(NamedTuple):
    """What is best for states of one dtype."""

    tile: DeferredTile
    N: int  # entries of a ring
    least_work: int  # sequences x key heads; with fewer, two passes are faster
    together: int  # of the last programs of a launch, how many a multiprocessor fold at the same step
    few: DeferredTile | None = None  # where all value heads are worked on at once, on a GPU with clusters


# Measured on an H100 (benchmarks/results/h100-2026-11-26-deferred-8, `few`: h100-2026-11-27-few). Other GPUs
# have not been measured.
FLOAT32 = Tuned(
    DeferredTile(4, 4, 168),
    N=8,
    least_work=128,
    together=3,
    few=DeferredTile(4, 4, prefetch=True, clustered=True),
)
OTHER = Tuned(DeferredTile(2, 8, prefetch=True), N=8, least_work=256, together=8)
FEW = 2  # value heads a multiprocessor: so many programs of `few` fit at once (of Qwen3.5-4B's heads, 8 sequences)
INTERPRETED_TOGETHER = 3  # few, so that in tests others fold at their own steps


class SettleLayout(NamedTuple):
    """What `settle_states` is compiled for: those fields of `layout.Layout` that it reads."""

    HK: int
    R: int
    DK: int
    DV: int
    strided: bool
    state_head: int
    BLOCK_K: int
    BLOCK_V: int


def decode_deferred_triton(step: Step, recipe: Recipe, ring: Ring, tile: DeferredTile | None = None) -> Tensor:
    """One token a sequence, all value heads; computes in float32 and returns [N, HV * DV] in the dtype of v.

    Updates the taps and the ring in place, and an N-th of the states. The first step of a kind compiles. Raises
    UnsupportedStep for what `check_deferred` and the two-pass kernel refuse, ValueError for a ring that does not belong
    to the states.
    """
    sources = [*map(Tensor.data_ptr, step.sources)]
    others = [*map(Tensor.data_ptr, (*step.states, *step.weights, *ring))]
    unaligned = 0
    for pointer in others[-len(ring) :]:
        unaligned |= pointer
    if unaligned & 15:
        raise ValueError("ring: expected parts that begin at multiples of 16 bytes, as PyTorch allocates them")
    for pointer in (*sources, *others):
        unaligned |= pointer
    alignment = tuple(pointer & 15 for pointer in (*sources, *others)) if unaligned & 15 else None
    launch = _prepared.find(step, recipe, alignment, kind_of(ring), tile)
    return launch(step, ring, sources, others)


_Launch = Callable[[Step, Ring, list[int], list[int]], Tensor]


class DeferredLaunch(NamedTuple):
    """What a kind of steps and rings is launched with, beside the tensors themselves."""

    grid: tuple[int, int, int]  # in clusters
    rest: tuple[Any, ...]  # the kernel's arguments after the tensors
    options: dict[str, Any]  # Triton's own
    cluster: int  # programs of a cluster


def describe(step: Step, recipe: Recipe, kind: Kind, tile: DeferredTile | None, max_programs: int) -> DeferredLaunch:
    """The launch for this kind of steps and rings, whatever device its tensors are on."""
    s = check_deferred(step, recipe)
    check_arguments(step)
    check_kind(kind, step.states.recurrent)
    shapes, dtypes, *_ = kind
    N = shapes[0][2]
    if dtypes != (*[torch.float32] * 3, torch.int32):
        raise UnsupportedStep("ring: expected float32, in which the Triton backend computes, and a cursor of int32")
    tile = tile or table_tile(step, s)
    if not _suits(tile, s):
        raise UnsupportedStep(
            f"tile: got {tile} for {s.R} value heads of {s.DV} columns a key head, expected one that is not clustered "
            f"where there are more than {tiles.CLUSTER} of them, or they are wider than {tiles.WIDEST_CLUSTERED}"
        )
    cluster = s.R if tile.clustered else 1
    items, most = s.B * s.HK, max(max_programs // cluster, 1)
    whole = Tile(tiles.power_of_two(s.DV), tile.num_warps)
    layout = layout_of(s, step, recipe, whole, strided=items > most, pairs=True)
    _, _, *strides = numbers_of(s, step, items)
    block_n, parts = 1 << (N - 1).bit_length(), min(tile.parts, layout.BLOCK_K)
    rest = items, *strides, layout, N, block_n, parts, s.R // cluster, tile.prefetch
    options = gpu.compile_options(tile.num_warps, tile.max_registers)
    return DeferredLaunch((min(items, most), 1, 1), rest, options, cluster)


def _prepare(step: Step, recipe: Recipe, kind: Kind, tile: DeferredTile | None) -> _Launch:
    """Checks and compiles for one kind of steps and rings; returns what launches it."""
    v, (_, dtypes, *_) = step.tokens.v, kind
    device, dtype = v.device, v.dtype
    grid, rest, options, cluster = describe(step, recipe, kind, tile, gpu.max_programs_on(device))
    shape = v.shape[0], recipe.heads[1] * v.shape[3]
    if gpu.INTERPRETED:  # clusters are the launcher's: here all their programs are on the grid
        grid = (grid[0] * cluster, 1, 1)

        def interpret(step: Step, ring: Ring, *_: Any) -> Tensor:
            out = torch.empty(shape, dtype=dtype, device=device)
            decode_deferred[grid](*step.tokens, *step.states, *step.weights, *ring, out, *rest, **options)
            return out

        return interpret
    reason = clusters_reason(device) if cluster > 1 else None
    if reason is not None:
        raise UnsupportedStep(f"tile: got a clustered one, but {reason}")
    ring = [torch.empty(16, dtype=part, device=device) for part in dtypes]
    tensors = *step.tokens, *step.states, *step.weights, *ring, v.new_empty(16)
    with torch.cuda.device(device):
        run = in_clusters(decode_deferred.warmup(*tensors, *rest, grid=grid, **options), cluster)[grid]
    places = places_of(step)

    def launch(step: Step, ring: Ring, sources: list[int], others: list[int]) -> Tensor:
        # Addresses rather than tensors, as in `launch`.
        out = torch.empty(shape, dtype=dtype, device=device)
        pointers = [sources[i] + offset for i, offset in places]
        if torch.cuda.current_device() == device.index:
            run(*pointers, *others, out.data_ptr(), *rest)
        else:
            with torch.cuda.device(device):
                run(*pointers, *others, out.data_ptr(), *rest)
        return out

    return launch


_prepared = Prepared(_prepare)


def settle_triton(recurrent_state: Tensor, ring: Ring, tile: DeferredTile | None = None) -> None:
    """Folds what is pending into the states, after which nothing waits."""
    check_ring(ring, recurrent_state)
    (B, HV, DK, DV), HK = recurrent_state.shape, ring.k.shape[1]
    tile = tile or tuned(recurrent_state.dtype).tile
    items, most = B * HK, gpu.max_programs_on(recurrent_state.device)
    layout = SettleLayout(
        HK=HK,
        R=HV // HK,
        DK=DK,
        DV=DV,
        strided=items > most,
        state_head=recurrent_state.stride(1),
        BLOCK_K=tiles.power_of_two(DK),
        BLOCK_V=tiles.power_of_two(DV),
    )
    rest = items, recurrent_state.stride(0), layout, ring.N, min(tile.parts, layout.BLOCK_K)
    options = gpu.compile_options(tile.num_warps, tile.max_registers)
    with torch.cuda.device(recurrent_state.device if recurrent_state.is_cuda else -1):
        settle_states[(min(items, most), 1, 1)](recurrent_state, *ring, *rest, **options)


def tuned(state: torch.dtype) -> Tuned:
    """What is best for states of a dtype."""
    return FLOAT32 if state == torch.float32 else OTHER


def table_tile(step: Step, s: StepShapes) -> DeferredTile:
    """What is best for a step."""
    best, device = tuned(step.states.recurrent.dtype), step.tokens.v.device
    if best.few is None or not _suits(best.few, s) or gpu.INTERPRETED or clusters_reason(device) is not None:
        return best.tile
    value_heads = s.B * s.HV
    return best.few if value_heads <= FEW * gpu.multiprocessors(device) else best.tile


def _suits(tile: DeferredTile, s: StepShapes) -> bool:
    """Whether value heads like these can have such a tile."""
    return not tile.clustered or (s.R <= tiles.CLUSTER and s.DV <= tiles.WIDEST_CLUSTERED)


def together(state: torch.dtype, device: torch.device) -> int:
    """How many of a launch's last programs fold at the same step."""
    if gpu.INTERPRETED:
        return INTERPRETED_TOGETHER
    return tuned(state).together * gpu.multiprocessors(device)
