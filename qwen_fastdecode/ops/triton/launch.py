"""Launches the Triton kernels of `triton_kernel`: one launch a decode step, with as little Python as possible."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..step import DecodeShapes
from . import tiles
from .kernel import decode_token, decode_tokens
from .tiles import Tile

INTERPRETED = not isinstance(decode_token, triton.JITFunction)  # TRITON_INTERPRET=1: runs on the CPU, for tests
PROGRAMS_PER_SM = 32  # a few waves; past them, a program takes several items
INTERPRETED_PROGRAMS = 8  # few, so that the interpreter takes several items too
OLDEST = (8, 0)  # compute capability with bfloat16, which Triton supports
MAX_PREPARED = 4096  # launches kept; a server sees some hundreds (batch sizes x alignments)


class Layout(NamedTuple):
    """What a kernel is compiled for: sizes, the strides that a model fixes, the head range, the tile."""

    HK: int
    R: int
    DK: int
    DV: int
    W: int
    first_head: int  # value heads [first_head, first_head + head_count)
    head_count: int
    key_heads: int  # how many key heads these value heads read
    skipped: int  # key heads that q, k, v, z, b and a do not hold because they are before the range
    strided: bool  # there are more items (sequences x key heads) than programs: each takes several
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
    scale: float  # DK ** -0.5
    eps: float
    silu: bool
    beta_scale: float
    BLOCK_K: int
    BLOCK_V: int
    TILES: int  # tiles of BLOCK_V columns in a value head
    prefetch: bool  # load the next tile of the state while the current one is finished


def unavailable_reason(device: torch.device) -> str | None:
    """Why this backend cannot run on a device; None if it can."""
    if INTERPRETED:
        return None if device.type == "cpu" else "Triton runs in its interpreter (TRITON_INTERPRET=1), on the CPU only"
    if device.type != "cuda":
        return f"Triton needs a CUDA or ROCm device, not {device.type!r}"
    if not torch.cuda.is_available():
        return "PyTorch finds no GPU that it can use"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < OLDEST:
        return f"Triton needs compute capability {OLDEST[0]}.{OLDEST[1]}"
    return None


def decode_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    z: Tensor,
    b: Tensor,
    a: Tensor,
    conv_state: Tensor,
    recurrent_state: Tensor,
    conv_weight: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    *,
    eps: float,
    gate: str,
    beta_scale: float = 1.0,
    cu_seqlens: Tensor | None,
    heads: tuple[int, int],
    tile: Tile | None = None,
) -> Tensor:
    """Same arguments and result as `gated_delta_decode`; computes in float32. `tile` overrides the tile table.

    The first call for a kind of arguments compiles, so make it before capturing a CUDA graph. Raises ValueError for
    float64 arguments, a recurrent state whose heads [DK, DV] are not contiguous, a strided A_log, dt_bias or
    cu_seqlens, and a tile narrower than a value head where a sequence may have several tokens.
    """
    tensors = (q, k, v, z, b, a, conv_state, recurrent_state, conv_weight, A_log, dt_bias, norm_weight)
    pointers = [*map(Tensor.data_ptr, tensors)]
    at_q, at_k, at_v, at_z, _, _, at_conv, at_state, at_weight, _, _, at_norm = pointers
    # What the kernel is compiled for. The other four are read a scalar at a time, whatever their alignment.
    unaligned = (at_q | at_k | at_v | at_z | at_conv | at_state | at_weight | at_norm) & 15
    key = (
        v.get_device(),
        heads,
        eps,
        gate,
        beta_scale,
        tile,
        v.shape,
        q.shape[2],
        conv_state.shape,
        *map(Tensor.stride, tensors),
        *map(_dtype, tensors),
        tuple(p & 15 for p in pointers) if unaligned else None,
        None if cu_seqlens is None else (cu_seqlens.dtype, cu_seqlens.stride()),
    )
    prepared = _prepared.get(key)
    if prepared is None:
        prepared = _remember(key, _prepare(tensors, eps, gate, beta_scale, cu_seqlens, heads, tile))
    out = v.new_empty(v.shape[0], heads[1] * v.shape[3])
    prepared(tensors, pointers, cu_seqlens, out)
    return out


_dtype = attrgetter("dtype")
_Prepared = Callable[[tuple[Tensor, ...], list[int], "Tensor | None", Tensor], None]
_prepared: dict[tuple[Any, ...], _Prepared] = {}


def _remember(key: tuple[Any, ...], prepared: _Prepared) -> _Prepared:
    if len(_prepared) >= MAX_PREPARED:
        _prepared.clear()
    _prepared[key] = prepared
    return prepared


class Launch(NamedTuple):
    """What a kind of arguments is launched with, beside the arguments themselves."""

    kernel: Any
    numbers: tuple[int, ...]  # the kernel's runtime integers
    layout: Layout
    options: dict[str, Any]  # Triton's own
    grid: tuple[int, int, int]


def describe(
    tensors: tuple[Tensor, ...],
    eps: float,
    gate: str,
    cu_seqlens: Tensor | None,
    heads: tuple[int, int],
    tile: Tile | None,
    max_programs: int,
    beta_scale: float = 1.0,
) -> Launch:
    """The launch for these arguments (in the op's order), whatever device they are on."""
    _check(tensors, cu_seqlens)
    s = DecodeShapes.of(tensors[0], tensors[2], tensors[6])
    one_token = cu_seqlens is None and s.N == s.B
    low, key_heads = s.key_heads(*heads)
    skipped = low if tensors[0].shape[1] < s.HK else 0
    items = s.B * key_heads
    if tile is None:
        tile = table_tile(tensors[0].device, items, s.DV) if one_token else tiles.whole_head(s.DV)
    layout = _layout(s, tensors, eps, gate, beta_scale, heads, key_heads, skipped, tile, strided=items > max_programs)
    if not one_token and layout.TILES > 1:
        raise ValueError(f"tile: got block_v {tile.block_v}, expected all {s.DV} columns where T may exceed 1")
    kernel = decode_token if one_token else decode_tokens
    return Launch(kernel, _numbers(s, tensors, items), layout, _options(tile), (min(items, max_programs), 1, 1))


def _prepare(
    tensors: tuple[Tensor, ...],
    eps: float,
    gate: str,
    beta_scale: float,
    cu_seqlens: Tensor | None,
    heads: tuple[int, int],
    tile: Tile | None,
) -> _Prepared:
    """Compiles the kernel for one kind of arguments; returns what launches it."""
    device = tensors[0].device
    kernel, numbers, layout, options, grid = describe(
        tensors, eps, gate, cu_seqlens, heads, tile, _max_programs(device), beta_scale
    )
    if INTERPRETED:
        return lambda tensors, _, cu_seqlens, out: kernel[grid](*tensors, cu_seqlens, out, *numbers, layout, **options)
    with torch.cuda.device(device):
        out = tensors[2].new_empty(0)
        compiled = kernel.warmup(*tensors, cu_seqlens, out, *numbers, layout, grid=grid, **options)
        run = compiled[grid]

    def launch(_: tuple[Tensor, ...], pointers: list[int], cu_seqlens: Tensor | None, out: Tensor) -> None:
        # Addresses rather than tensors: Triton's launcher would ask each tensor for its own again.
        if torch.cuda.current_device() == device.index:
            run(*pointers, cu_seqlens, out.data_ptr(), *numbers, layout)
        else:
            with torch.cuda.device(device):
                run(*pointers, cu_seqlens, out.data_ptr(), *numbers, layout)

    return launch


def _check(tensors: tuple[Tensor, ...], cu_seqlens: Tensor | None) -> None:
    """What this backend asks beyond the op's own rules."""
    recurrent_state, A_log, dt_bias = tensors[7], tensors[9], tensors[10]
    if any(x.dtype == torch.float64 for x in tensors):
        raise ValueError("the Triton backend computes in float32: got a float64 argument; use the torch backend")
    if recurrent_state.stride()[2:] != (recurrent_state.shape[3], 1):
        raise ValueError(f"recurrent_state: got strides {recurrent_state.stride()}, expected contiguous heads [DK, DV]")
    for name, x in {"A_log": A_log, "dt_bias": dt_bias, "cu_seqlens": cu_seqlens}.items():
        if x is not None and x.stride(0) != 1 and x.numel() > 1:
            raise ValueError(f"{name}: got stride {x.stride(0)}, expected 1")


def _layout(
    s: DecodeShapes,
    tensors: tuple[Tensor, ...],
    eps: float,
    gate: str,
    beta_scale: float,
    heads: tuple[int, int],
    key_heads: int,
    skipped: int,
    tile: Tile,
    strided: bool,
) -> Layout:
    q, k, v, z, b, a, conv_state, recurrent_state, conv_weight, *_ = tensors
    return Layout(
        HK=s.HK,
        R=s.R,
        DK=s.DK,
        DV=s.DV,
        W=s.W,
        first_head=heads[0],
        head_count=heads[1],
        key_heads=key_heads,
        skipped=skipped,
        strided=strided,
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
        tap_stride=conv_state.stride(2),
        weight_channel=conv_weight.stride(0),
        weight_tap=conv_weight.stride(1),
        state_head=recurrent_state.stride(1),
        packed_taps=_packed(conv_state),
        packed_weight=_packed(conv_weight),
        scale=s.DK**-0.5,
        eps=eps,
        silu=gate == "silu",
        beta_scale=beta_scale,
        BLOCK_K=tiles.power_of_two(s.DK),
        BLOCK_V=tile.block_v,
        TILES=tiles.power_of_two(s.DV) // tile.block_v,
        prefetch=tile.num_stages > 1,
    )


def _packed(taps: Tensor) -> bool:
    """Whether each channel's taps ([..., channels, W]) are one aligned 64-bit word."""
    *outer, channel, tap = taps.stride()
    words = taps.element_size() == 2 and taps.shape[-1] == 4 and (channel, tap) == (4, 1)
    return words and taps.data_ptr() % 8 == 0 and all(stride % 4 == 0 for stride in outer)


def _numbers(s: DecodeShapes, tensors: tuple[Tensor, ...], items: int) -> tuple[int, ...]:
    """The kernel's runtime integers: sizes of the work, strides between tokens and between sequences."""
    conv_state, recurrent_state = tensors[6], tensors[7]
    strides = [x.stride(0) for x in tensors[:6]]
    return (items, s.N // max(s.B, 1), *strides, conv_state.stride(0), conv_state.stride(1), recurrent_state.stride(0))


def _options(tile: Tile) -> dict[str, Any]:
    """Triton's compile options. Stages are the kernel's own affair: Triton has no loop to pipeline here."""
    options = {"num_warps": tile.num_warps, "num_stages": 1, "enable_fp_fusion": True}
    if tile.max_registers and torch.version.hip is None:  # a CUDA option
        options["maxnreg"] = tile.max_registers
    return options


def _max_programs(device: torch.device) -> int:
    if INTERPRETED:
        return INTERPRETED_PROGRAMS
    return PROGRAMS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count


def table_tile(device: torch.device, work: int, DV: int) -> Tile:
    """The tile table's choice for one token a sequence; `work` = sequences x key heads."""
    if INTERPRETED:
        return tiles.fit(Tile(64, 4), DV)
    properties = torch.cuda.get_device_properties(device)
    hip = torch.version.hip is not None
    arch = properties.gcnArchName.split(":")[0] if hip else f"sm_{properties.major}{properties.minor}"
    return tiles.lookup(arch, properties.name, work, DV)
