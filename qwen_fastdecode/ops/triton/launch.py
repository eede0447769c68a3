"""Launches the Triton kernels of `kernel` and `value_head`: one a decode step, with as little Python as possible."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ...errors import UnsupportedStep
from ..prepared import Prepared
from ..step import Recipe, Sources, Step, StepShapes, Tokens, check_step
from . import tiles
from .clusters import clusters_reason, in_clusters
from .kernel import decode_token, decode_tokens
from .tiles import Tile
from .value_head import decode_value_head

INTERPRETED = not isinstance(decode_token, triton.JITFunction)  # TRITON_INTERPRET=1: runs on the CPU, for tests
PROGRAMS_PER_SM = 32  # a few waves; past them, a program takes several items
INTERPRETED_PROGRAMS = 8  # few, so that the interpreter takes several items too
OLDEST = (8, 0)  # compute capability with bfloat16, which Triton supports
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

    def after_out(self, squares: Tensor | int | None) -> tuple[Any, ...]:
        """The kernel's last arguments. squares: a tensor of as many numbers, or its address; None for None."""
        scratch = (squares,) if self.kernel is decode_value_head else ()
        return (*scratch, *self.numbers, self.layout)


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
    numbers, options = numbers_of(s, step, items), _options(tile)
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
    found = describe(step, recipe, tile, max_programs_on(device))
    kernel, grid = found.kernel, found.grid
    if INTERPRETED:
        return partial(_interpret, found, shape)
    reason = clusters_reason(device) if kernel is decode_value_head else None  # of one program, too: it has the barrier
    if reason is not None:
        raise UnsupportedStep(f"tile: got a clustered one, but {reason}")
    count, rest = found.squares, found.after_out(None)
    # For what each step allocates. It must not be kept: it may lie in the memory of a CUDA graph that is recorded now.
    stand_in = None if count is None else tokens.v.new_empty(0, dtype=torch.float32)
    arguments = (*tokens, *states, *weights, step.cu_seqlens, tokens.v.new_empty(0), *found.after_out(stand_in))
    with torch.cuda.device(device):
        run = in_clusters(kernel.warmup(*arguments, grid=grid, **found.options), found.cluster)[grid]
    places = places_of(step)

    def launch(step: Step, sources: list[int], others: list[int]) -> Tensor:
        # Addresses rather than tensors: Triton's launcher would ask each tensor for its own again.
        out = torch.empty(shape, dtype=dtype, device=device)
        after_out = rest
        if count is not None:
            squares = torch.empty(count, dtype=torch.float32, device=device)  # this step's alone, as `out` is
            after_out = found.after_out(squares.data_ptr())
        pointers = [sources[i] + offset for i, offset in places]
        arguments = (*pointers, *others, step.cu_seqlens, out.data_ptr(), *after_out)
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
        phased = found._replace(layout=found.layout._replace(phase=phase))
        found.kernel[found.grid[0] * found.cluster, 1, 1](*arguments, *phased.after_out(squares), **found.options)
    return out


_prepared = Prepared(_prepare)


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
        nvidia=not INTERPRETED and torch.version.hip is None,
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


def _options(tile: Tile) -> dict[str, Any]:
    """Triton's compile options. Stages are the kernel's own affair: Triton has no loop to pipeline here."""
    options = {"num_warps": tile.num_warps, "num_stages": 1, "enable_fp_fusion": True}
    if tile.max_registers and torch.version.hip is None:  # a CUDA option
        options["maxnreg"] = tile.max_registers
    return options


def max_programs_on(device: torch.device) -> int:
    if INTERPRETED:
        return INTERPRETED_PROGRAMS
    return PROGRAMS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count


def table_tile(
    device: torch.device, work: int, DV: int, state: torch.dtype = torch.float32, value_heads: int = 1
) -> Tile:
    """The tile table's choice for one token a sequence and states of a dtype; `work` = sequences x key heads.

    value_heads: of a key head.
    """
    if INTERPRETED:
        return tiles.fit(Tile(64, 4), DV)
    properties = torch.cuda.get_device_properties(device)
    hip = torch.version.hip is not None
    arch = properties.gcnArchName.split(":")[0] if hip else f"sm_{properties.major}{properties.minor}"
    dtype, clusters = str(state).removeprefix("torch."), clusters_reason(device) is None
    return tiles.lookup(arch, properties.name, work, DV, dtype, value_heads, clusters)
