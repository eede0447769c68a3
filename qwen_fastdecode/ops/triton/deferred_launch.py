"""Launches the kernels of `deferred`: the step on states that are written every N-th time, and what settles them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...errors import UnsupportedStep
from ..ring import Ring, check_deferred, check_ring
from ..step import Recipe, Step
from . import tiles
from .deferred import decode_deferred, settle_states
from .launch import _check, _layout, _max_programs, _numbers
from .tiles import Tile


class DeferredTile(NamedTuple):
    """How a program works on states: whole heads where it reads them, parts of their rows where it folds."""

    num_warps: int
    parts: int
    max_registers: int = 0  # as in `Tile`
    prefetch: bool = False  # ask for a head's state while the one before is finished


class Deferral(NamedTuple):
    """What is best for states of one dtype."""

    tile: DeferredTile
    N: int  # entries of a ring
    least_work: int  # sequences x key heads; with fewer, two passes are faster


# Measured on an H100 (benchmarks/results/h100-2026-11-26-kernel). Other GPUs have not been measured.
FLOAT32 = Deferral(DeferredTile(4, 4, 168), N=6, least_work=512)
OTHER = Deferral(DeferredTile(2, 8, prefetch=True), N=8, least_work=2048)


class SettleLayout(NamedTuple):
    """What `settle_states` is compiled for: those fields of `launch.Layout` that it reads."""

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

    Updates the taps and the ring in place, and an N-th of the states. Raises UnsupportedStep for what `check_deferred`
    and the two-pass kernel refuse, ValueError for a ring that does not belong to the states.
    """
    s = check_deferred(step, recipe, ring)
    _check(step)
    recurrent, v = step.states.recurrent, step.tokens.v
    if any(x.dtype != torch.float32 for x in ring[:3]):
        raise UnsupportedStep("ring: expected float32, in which the Triton backend computes")
    tile = tile or deferral(recurrent.dtype).tile
    items = s.B * s.HK
    programs = min(items, _max_programs(v.device))
    whole = Tile(tiles.power_of_two(s.DV), tile.num_warps)
    layout = _layout(s, step, recipe, whole, strided=items > programs, pairs=True)
    out = v.new_empty(s.N, s.HV * s.DV)
    items, _, *strides = _numbers(s, step, items)
    block_n = 1 << (ring.N - 1).bit_length()
    compiled_for = layout, ring.N, block_n, tile.parts, tile.prefetch
    tensors = *step.tokens, *step.states, *step.weights, *ring, out
    with torch.cuda.device(v.device if v.is_cuda else -1):
        decode_deferred[(programs,)](*tensors, items, *strides, *compiled_for, **_options(tile))
    return out


def settle_triton(recurrent_state: Tensor, ring: Ring, tile: DeferredTile | None = None) -> None:
    """Folds what is pending into the states and sets the cursor to zero."""
    check_ring(ring, recurrent_state)
    (B, HV, DK, DV), HK = recurrent_state.shape, ring.k.shape[1]
    tile = tile or deferral(recurrent_state.dtype).tile
    items = B * HK
    programs = min(items, _max_programs(recurrent_state.device))
    layout = SettleLayout(
        HK=HK,
        R=HV // HK,
        DK=DK,
        DV=DV,
        strided=items > programs,
        state_head=recurrent_state.stride(1),
        BLOCK_K=tiles.power_of_two(DK),
        BLOCK_V=tiles.power_of_two(DV),
    )
    with torch.cuda.device(recurrent_state.device if recurrent_state.is_cuda else -1):
        settle_states[(programs,)](
            recurrent_state, *ring, items, recurrent_state.stride(0), layout, ring.N, tile.parts, **_options(tile)
        )


def deferral(state: torch.dtype) -> Deferral:
    """What is best for states of a dtype."""
    return FLOAT32 if state == torch.float32 else OTHER


def _options(tile: DeferredTile) -> dict[str, Any]:
    """Triton's compile options."""
    found = {"num_warps": tile.num_warps, "num_stages": 1, "enable_fp_fusion": True}
    if tile.max_registers and torch.version.hip is None:  # a CUDA option
        found["maxnreg"] = tile.max_registers
    return found
