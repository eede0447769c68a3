"""What a step's tensors look like to the kernels: sizes and strides, compiled in or handed over, and addresses."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import UnsupportedStep
from ..step import Recipe, Sources, Step, StepShapes, Tokens
from . import gpu, tiles
from .tiles import Tile

INT32 = 2**31


class Layout(NamedTuple):
    """What a kernel is compiled for: sizes, the strides that a model fixes, the head range, the tile."""

    HK: int
    R: int
    DK: int
    DV: int
    W: int
    first_key_head: int  # key heads [first_key_head, first_key_head + key_heads), and R value heads of each
    key_heads: int
    skipped: int  # key heads that q, k, v, z, b and a do not hold because they are before the range
    strided: bool  # there are more items (sequences x key heads) than programs: each takes several
    wide: bool  # offsets within a token or a sequence do not fit 32 bits
    q_head: int  # strides of a key head and of a value head within it
    k_head: int
    v_head: int
    v_value: int
    z_head: int
    z_value: int
    b_head: int
    b_value: int
    a_head: int
    a_value: int
    tap_stride: int  # of conv_state
    weight_channel: int  # strides of conv_weight
    weight_tap: int
    state_head: int  # stride of recurrent_state
    packed_taps: bool  # a channel's four 16-bit taps are one aligned 64-bit word
    packed_weight: bool
    pairs: bool  # the state's tiles are pairs of bfloat16 in 32-bit words
    nvidia: bool  # its own instructions may be used
    scale: float  # DK ** -0.5
    eps: float
    silu: bool
    beta_scale: float
    BLOCK_K: int
    BLOCK_V: int
    TILES: int  # tiles of BLOCK_V columns in a value head
    prefetch: bool  # load the next tile of the state while the current one is finished
    phase: str = "all"  # what a launch does; in the interpreter parts of a head do "squares" first, then the "rest"


def check_arguments(step: Step) -> None:
    """What this backend asks beyond the op's own rules."""
    recurrent, weights = step.states.recurrent, step.weights
    if any(x.dtype == torch.float64 for x in (*step.sources, *step.states, *weights)):
        raise UnsupportedStep("the Triton backend computes in float32: got a float64 argument; use the torch backend")
    if any(x.is_neg() for x in (*step.sources, *step.states, *weights)):
        raise UnsupportedStep("the Triton backend reads memory as it is: got a lazily negated tensor (torch.is_neg)")
    if recurrent.stride()[2:] != (recurrent.shape[3], 1):
        raise UnsupportedStep(f"recurrent_state: got strides {recurrent.stride()}, expected contiguous heads [DK, DV]")
    for name, x in {"A_log": weights.A_log, "dt_bias": weights.dt_bias, "cu_seqlens": step.cu_seqlens}.items():
        if x is not None and x.stride(0) != 1 and x.numel() > 1:
            raise UnsupportedStep(f"{name}: got stride {x.stride(0)}, expected 1")


def layout_of(s: StepShapes, step: Step, recipe: Recipe, tile: Tile, strided: bool, pairs: bool) -> Layout:
    q, k, v, z, b, a = step.tokens
    states, weights = step.states, step.weights
    low, key_heads = s.key_heads(recipe)
    return Layout(
        HK=s.HK,
        R=s.R,
        DK=s.DK,
        DV=s.DV,
        W=s.W,
        first_key_head=low,
        key_heads=key_heads,
        skipped=low if q.shape[1] < s.HK else 0,
        strided=strided,
        wide=any(map(_is_wide, (*step.tokens, *states, weights.conv[None]))),
        q_head=q.stride(1),
        k_head=k.stride(1),
        v_head=v.stride(1),
        v_value=v.stride(2),
        z_head=z.stride(1),
        z_value=z.stride(2),
        b_head=b.stride(1),
        b_value=b.stride(2),
        a_head=a.stride(1),
        a_value=a.stride(2),
        tap_stride=states.conv.stride(2),
        weight_channel=weights.conv.stride(0),
        weight_tap=weights.conv.stride(-1),
        state_head=states.recurrent.stride(1),
        packed_taps=_packed(states.conv),
        packed_weight=_packed(weights.conv.squeeze(1) if weights.conv.dim() == 3 else weights.conv),
        pairs=pairs and _paired(states.recurrent),
        nvidia=not gpu.INTERPRETED and torch.version.hip is None,
        scale=s.DK**-0.5,
        eps=recipe.eps,
        silu=recipe.gate == "silu",
        beta_scale=recipe.beta_scale,
        BLOCK_K=tiles.power_of_two(s.DK),
        BLOCK_V=tile.block_v,
        TILES=tiles.parts(tile, s.DV),
        prefetch=tile.num_stages > 1,
    )


def _is_wide(x: Tensor) -> bool:
    """Whether an offset within one token or sequence (x[i]) reaches 2^31 elements. Offsets between them are 64 bits."""
    return sum((size - 1) * abs(stride) for size, stride in zip(x.shape[1:], x.stride()[1:], strict=True)) >= INT32


def _packed(taps: Tensor) -> bool:
    """Whether each channel's taps ([..., channels, W]) are one aligned 64-bit word."""
    *outer, channel, tap = taps.stride()
    words = taps.element_size() == 2 and taps.shape[-1] == 4 and (channel, tap) == (4, 1)
    return words and taps.data_ptr() % 8 == 0 and all(stride % 4 == 0 for stride in outer)


def _paired(states: Tensor) -> bool:
    """Whether the recurrent states are bfloat16 numbers in aligned pairs."""
    pairs = states.dtype == torch.bfloat16 and states.data_ptr() % 4 == 0
    return pairs and all(stride % 2 == 0 for stride in states.stride()[:3])


def numbers_of(s: StepShapes, step: Step, items: int) -> tuple[int, ...]:
    """The kernel's runtime integers: sizes of the work, strides between tokens and between sequences."""
    conv, recurrent = step.states
    strides = [x.stride(0) for x in step.tokens]
    return (items, s.N // max(s.B, 1), *strides, conv.stride(0), conv.stride(1), recurrent.stride(0))


def places_of(step: Step) -> list[tuple[int, int]]:
    """Where each of the tokens' tensors begins: in which source, and how many bytes after its first element.

    Found on stand-ins without data: a projection may return slices of one tensor, so that addresses prove nothing.
    """
    stand_ins: Sources = tuple(
        torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") for x in step.sources
    )
    index = {x.untyped_storage()._cdata: i for i, x in enumerate(stand_ins)}
    tokens: Tokens = step.read(stand_ins)
    return [(index[x.untyped_storage()._cdata], x.storage_offset() * x.element_size()) for x in tokens]
