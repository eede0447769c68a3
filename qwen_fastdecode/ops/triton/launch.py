"""Launches the Triton kernels of `kernel` and `value_head`: one a decode step, with as little Python as possible."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...errors import UnsupportedStep
from ..prepared import Prepared
from ..step import Recipe, Step, StepShapes, check_step
from . import gpu, tiles
from .clusters import clusters_reason, in_clusters
from .kernel import decode_token, decode_tokens
from .layout import Layout, check_arguments, layout_of, numbers_of, places_of
from .tiles import Tile
from .value_head import decode_value_head


def decode_triton(step: Step, recipe: Recipe, tile: Tile | None = None) -> Tensor:
    """Computes in float32; returns [N, count * DV] in the dtype of v. `tile` overrides the tile table.

    The first step of a kind compiles, so make it before capturing a CUDA graph. Raises UnsupportedStep for what
    `check_step` refuses, and for float64 arguments, a recurrent state whose heads [DK, DV] are not contiguous, strided
    A_log, dt_bias or cu_seqlens, a tile narrower than a value head where a sequence may have several tokens, and a
    clustered one that does not suit the heads or the GPU.
    """
    from_sources = [*map(Tensor.data_ptr, step.sources)]
    state_pointers = [*map(Tensor.data_ptr, (*step.states, *step.weights))]
    at_conv, at_state, at_weight, _, _, at_norm = state_pointers
    # What the kernel is compiled for. A_log and dt_bias are read a scalar at a time, whatever their alignment.
    unaligned = at_conv | at_state | at_weight | at_norm
    for pointer in from_sources:
        unaligned |= pointer
    alignment = tuple(p & 15 for p in (*from_sources, *state_pointers)) if unaligned & 15 else None
    launch = _prepared.find(step, recipe, alignment, tile)
    return launch(step, from_sources, state_pointers)


_Launch = Callable[[Step, list[int], list[int]], Tensor]


class Launch(NamedTuple):
    """What a kind of steps is launched with, beside the tensors themselves."""

    kernel: Any
    numbers: tuple[int, ...]  # the kernel's runtime integers
    layout: Layout
    options: dict[str, Any]  # Triton's own
    grid: tuple[int, int, int]  # in clusters
    cluster: int  # programs of a cluster

    @property
    def squares(self) -> int | None:
        """How many numbers the parts of value heads exchange; None where no head is worked on by several programs."""
        parted = self.kernel is decode_value_head and self.layout.TILES > 1
        return self.grid[0] * self.cluster if parted else None

    def scratch(self, squares: Tensor | None) -> tuple[Tensor | None, ...]:
        """What comes after the kernel's output. squares: a tensor of as many numbers; None for None."""
        return (squares,) if self.kernel is decode_value_head else ()

    @property
    def last(self) -> tuple[Any, ...]:
        """What comes after that."""
        return (*self.numbers, self.layout)


def describe(step: Step, recipe: Recipe, tile: Tile | None, max_programs: int) -> Launch:
    """The launch for this kind of steps, whatever device its tensors are on."""
    s = check_step(step, recipe)
    check_arguments(step)
    tokens = step.tokens
    one_token = step.cu_seqlens is None and s.N == s.B
    _, key_heads = s.key_heads(recipe)
    items = s.B * key_heads
    if tile is None:
        state = step.states.recurrent.dtype
        tile = table_tile(tokens.q.device, items, s.DV, state, s.R) if one_token else tiles.whole_head(s.DV)
    tile = tiles.fit(tile, s.DV)
    check_tile(tile, s, one_token)
    layout = layout_of(s, step, recipe, tile, strided=items > max_programs, pairs=one_token)
    numbers, options = numbers_of(s, step, items), gpu.compile_options(tile.num_warps, tile.max_registers)
    if tile.clustered:
        return Launch(decode_value_head, numbers, layout, options, (items, 1, 1), cluster=s.R * layout.TILES)
    kernel = decode_token if one_token else decode_tokens
    return Launch(kernel, numbers, layout, options, (min(items, max_programs), 1, 1), cluster=1)


def check_tile(tile: Tile, s: StepShapes, one_token: bool) -> None:
    """Raises UnsupportedStep for a tile that steps of this kind cannot have."""
    if tile.block_v < s.DV and not one_token:
        raise UnsupportedStep(f"tile: got block_v {tile.block_v}, expected all {s.DV} columns where T may exceed 1")
    if tile.clustered and not (one_token and tiles.suits(tile, s.DV, s.R)):
        raise UnsupportedStep(
            f"tile: got {tile}, expected one that is not clustered where T may exceed 1, or the {s.R} value heads of a "
            f"key head take more than the {tiles.CLUSTER} programs of a cluster: {tiles.parts(tile, s.DV)} each"
        )


def _prepare(step: Step, recipe: Recipe, tile: Tile | None) -> _Launch:
    """Checks and compiles for one kind of steps; returns what launches it."""
    tokens, states, weights = step.tokens, step.states, step.weights
    device, dtype = tokens.v.device, tokens.v.dtype
    shape = tokens.v.shape[0], recipe.heads[1] * tokens.v.shape[3]
    found = describe(step, recipe, tile, gpu.max_programs_on(device))
    kernel, grid = found.kernel, found.grid
    if gpu.INTERPRETED:
        return partial(_interpret, found, shape)
    reason = clusters_reason(device) if kernel is decode_value_head else None  # of one program, too: it has the barrier
    if reason is not None:
        raise UnsupportedStep(f"tile: got a clustered one, but {reason}")
    count, no_scratch, last = found.squares, found.scratch(None), found.last
    # For what each step allocates. It must not be kept: it may lie in the memory of a CUDA graph that is recorded now.
    stand_in = None if count is None else tokens.v.new_empty(0, dtype=torch.float32)
    arguments = (*tokens, *states, *weights, step.cu_seqlens, tokens.v.new_empty(0), *found.scratch(stand_in), *last)
    with torch.cuda.device(device):
        run = in_clusters(kernel.warmup(*arguments, grid=grid, **found.options), found.cluster)[grid]
    places = places_of(step)

    def launch(step: Step, sources: list[int], others: list[int]) -> Tensor:
        # Addresses rather than tensors: Triton's launcher would ask each tensor for its own again.
        out = torch.empty(shape, dtype=dtype, device=device)
        scratch: tuple[int | None, ...] = no_scratch
        if count is not None:
            squares = torch.empty(count, dtype=torch.float32, device=device)  # this step's alone, as `out` is
            scratch = (squares.data_ptr(),)
        pointers = [sources[i] + offset for i, offset in places]
        arguments = (*pointers, *others, step.cu_seqlens, out.data_ptr(), *scratch, *last)
        if torch.cuda.current_device() == device.index:
            run(*arguments)
        else:
            with torch.cuda.device(device):
                run(*arguments)
        return out

    return launch


def _interpret(found: Launch, shape: Any, step: Step, *_: Any) -> Tensor:
    """On the CPU: clusters are the launcher's, so here all their programs are on the grid, one after the other."""
    out = step.tokens.v.new_empty(shape)
    arguments = (*step.tokens, *step.states, *step.weights, step.cu_seqlens, out)
    # NaN: one that is not written shows.
    squares = None if found.squares is None else torch.full((found.squares,), torch.nan)
    for phase in ("all",) if squares is None else ("squares", "rest"):
        last = found._replace(layout=found.layout._replace(phase=phase)).last
        found.kernel[found.grid[0] * found.cluster, 1, 1](*arguments, *found.scratch(squares), *last, **found.options)
    return out


_prepared = Prepared(_prepare)


def table_tile(
    device: torch.device, work: int, DV: int, state: torch.dtype = torch.float32, value_heads: int = 1
) -> Tile:
    """The tile table's choice for one token a sequence and states of a dtype; `work` = sequences x key heads.

    value_heads: of a key head.
    """
    if gpu.INTERPRETED:
        return tiles.fit(Tile(64, 4), DV)
    name, dtype = torch.cuda.get_device_name(device), str(state).removeprefix("torch.")
    clusters = clusters_reason(device) is None
    return tiles.lookup(gpu.architecture(device), name, work, DV, dtype, value_heads, clusters)
