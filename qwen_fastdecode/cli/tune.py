"""`qwen-fastdecode tune`: measures the kernel's tiles on this GPU and keeps the fastest for each amount of work."""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import BackendUnavailable, BadInput
from ..ops.backends import triton_unavailable
from ..ops.step import Recipe, Step
from ..ops.torch_cpu import decode_torch
from ..ops.triton import tiles
from ..ops.triton.tiles import Row, Tile
from .compare.inputs import require

BATCHES = (1, 2, 4, 8, 32, 64, 256)
COLD = 4  # times the L2 cache: what the layers' states take together at least, so that none is found there
MEMORY_SHARE = 0.6  # of the free memory, at most
MAX_LAYERS = 64
CLOSE_ENOUGH = 1e-2  # from the PyTorch backend, relative RMS: a wrong tile is far off, a rounding is not
UNLIMITED = 10**12


class Heads(NamedTuple):
    """Sizes of a layer: HK key heads, R value heads each, D of a key and of a value head."""

    HK: int
    R: int
    D: int
    state: str = "float32"  # the dtype of its recurrent states


class Measured(NamedTuple):
    """The fastest tile for a batch, beside the one that the table had."""

    batch: int
    tile: Tile
    us: float
    shipped: Tile
    shipped_us: float


def tune(
    device: torch.device,
    heads: Heads,
    batches: Sequence[int],
    on_tile: Callable[[str], None] = lambda _: None,
) -> list[Measured]:
    """Times every candidate at every batch (bfloat16 activations); `on_tile` hears of each.

    Raises RuntimeError where a tile's result is not the PyTorch backend's.
    """
    found = []
    for batch in batches:
        layers = _random_layers(batch, heads, device)
        shipped = _table_tile(device, batch, heads)
        times: dict[Tile, float] = {}
        for tile in candidates(device, batch, heads):
            on_tile(f"batch {batch}: {tiles.in_words(tile)}")
            us = _time(layers, tile, device)
            if us is not None:
                times[tile] = us
        tile = min(times, key=times.__getitem__)
        found.append(Measured(batch, tile, times[tile], shipped, times.get(shipped, math.nan)))
    return found


def candidates(device: torch.device, batch: int, heads: Heads) -> list[Tile]:
    """What is measured for a batch: the tiles worth it, and the table's own."""
    from ..ops.triton.clusters import clusters_reason

    clusters = clusters_reason(device) is None
    found = tiles.candidates(heads.D, heads.R, clusters, heads.state)
    return list(dict.fromkeys([_table_tile(device, batch, heads), *found]))


def _table_tile(device: torch.device, batch: int, heads: Heads) -> Tile:
    from ..ops.triton.launch import table_tile

    return table_tile(device, batch * heads.HK, heads.D, getattr(torch, heads.state), heads.R)


def save(device_name: str, heads: Heads, found: list[Measured]) -> None:
    """Puts the winners for one kind of GPU and dtype of states into the user's table, beside those of others.

    Each serves up to halfway to the next batch.
    """
    works = [m.batch * heads.HK for m in found]
    limits = [*(round((work * following) ** 0.5) for work, following in pairwise(works)), UNLIMITED]
    tables = {state: dict(tiles.tuned(state)) for state in tiles.STATES}
    tables[heads.state][device_name] = [Row(limit, m.tile) for limit, m in zip(limits, found, strict=True)]
    table = [
        {"device": name, "state": state, "max_work": row.max_work, **row.tile._asdict()}
        for state, rows in tables.items()
        for name, kept in rows.items()
        for row in kept
    ]
    path = tiles.cache_file()
    if path is None:
        raise BadInput("there is no home to keep the tiles in: set XDG_CACHE_HOME to a folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".json", delete=False, encoding="utf-8") as file:
        file.write(json.dumps({"tile": table}, indent=1) + "\n")
    Path(file.name).replace(path)  # at once: a program that starts meanwhile reads the old table or the new one
    tiles.tuned.cache_clear()


def _random_layers(batch: int, heads: Heads, device: torch.device) -> list[tuple[Tensor, ...]]:
    """The arguments of one step of several layers, in the op's order: as many as it takes to find no state cached."""
    HK, R, D, state = heads
    state_bytes = batch * HK * R * D * D * getattr(torch, state).itemsize
    count = 2
    if device.type == "cuda":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        free, _ = torch.cuda.mem_get_info(device)
        count = max(2, min(MAX_LAYERS, 1 + COLD * cache // state_bytes, int(MEMORY_SHARE * free) // state_bytes))
    return [random_layer(batch, heads, device) for _ in range(count)]


def random_layer(batch: int, heads: Heads, device: torch.device) -> tuple[Tensor, ...]:
    """The arguments of a step in the op's order: bfloat16 but for the recurrent state."""
    HK, R, D, state = heads
    C = (2 + R) * HK * D

    def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, device=device).mul_(0.3).to(dtype)

    q, k, v = random(batch, C).unflatten(1, (-1, D)).split([HK, HK, HK * R], dim=1)
    z, b, a = random(batch, HK, R, D), random(batch, HK, R), random(batch, HK, R)
    states = random(batch, C, 4), random(batch, HK * R, D, D, dtype=getattr(torch, state))
    weights = random(C, 4), random(HK * R), random(HK * R), random(D)
    return q, k, v.unflatten(1, (HK, R)), z, b, a, *states, *weights


def _time(layers: list[tuple[Tensor, ...]], tile: Tile, device: torch.device) -> float | None:
    """Median microseconds a layer, by CUDA graph replay; None where the tile does not compile for this GPU."""
    from triton.errors import TritonError

    from ..ops.triton.launch import decode_triton

    HV = layers[0][7].shape[1]
    recipe = Recipe((0, HV))

    def step(inputs: tuple[Tensor, ...]) -> Tensor:
        return decode_triton(Step.from_tensors(inputs), recipe, tile)

    one = layers[0]
    copies = [(*one[:6], one[6].clone(), one[7].clone(), *one[8:]) for _ in range(2)]
    expected = decode_torch(Step.from_tensors(copies[0]), recipe).float()
    try:
        out = step(copies[1]).float()
    except TritonError:
        return None
    if not (out - expected).norm() <= CLOSE_ENOUGH * expected.norm():  # also where either is NaN
        raise RuntimeError(f"{tile} computes something else than the PyTorch backend on {device}")
    return _median_us(lambda: [step(inputs) for inputs in layers], device) / len(layers)


def _median_us(run: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":  # in Triton's interpreter
        start = time.perf_counter()
        run()
        return 1e6 * (time.perf_counter() - start)
    from triton.testing import do_bench_cudagraph

    with torch.cuda.device(device):
        return 1e3 * do_bench_cudagraph(run, return_mode="median")


def run(args: argparse.Namespace) -> int:
    """Raises BadInput or PatchError where the user has to change something."""
    require("rich")
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    device, heads = read_device(args.device), read_heads(args)
    columns = (TextColumn("{task.description:<43}"), BarColumn(16), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        total = sum(len(candidates(device, batch, heads)) for batch in BATCHES)
        task, done = progress.add_task("", total=total), iter(range(total))

        def on_tile(text: str) -> None:
            progress.update(task, description=text, completed=next(done))

        with torch.inference_mode():
            found = tune(device, heads, BATCHES, on_tile)
    name = device_name(device)
    save(name, heads, found)
    print(
        f"{name}, {heads.HK} key heads, {heads.HK * heads.R} value heads of {heads.D}, "
        f"{heads.state} states; microseconds a layer"
    )
    for m in found:
        print(f"batch {m.batch:4}: {m.us:8.1f} with {tiles.in_words(m.tile)}")
        if m.tile != m.shipped:
            print(f"            {m.shipped_us:8.1f} with {tiles.in_words(m.shipped)} before")
    print(f"Kept in {tiles.cache_file()}")
    return 0


def device_name(device: torch.device) -> str:
    """The name of a kind of GPU, the key of the user's table."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def read_device(text: str) -> torch.device:
    """The device of that name. Raises BadInput for no name of a device, BackendUnavailable where Triton cannot run."""
    try:
        device = torch.device(text)
    except RuntimeError as error:
        raise BadInput(f"--device: {text!r} is no device") from error
    reason = triton_unavailable(device)
    if reason is not None:
        raise BackendUnavailable(f"nothing to tune on {device}: {reason}")
    return torch.device("cuda", torch.cuda.current_device()) if text == "cuda" else device


def read_heads(args: argparse.Namespace) -> Heads:
    """The sizes asked for. Raises BadInput where no layer has them."""
    HK, HV, D = args.key_heads, args.value_heads, args.head_dim
    if HK < 1 or HV < HK or HV % HK or D < 1:
        raise BadInput(f"--value-heads {HV} is not a multiple of --key-heads {HK}, or a size is not positive")
    return Heads(HK, HV // HK, D, args.state_dtype)
