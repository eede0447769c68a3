"""Which tile wins: every candidate at every batch, by CUDA graph replay over cold states."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from typing import Any

import torch
from triton.errors import TritonError

from benchmarks.checks.gpu_report import progress, write_section
from benchmarks.op.gpu_clock import Replay, copy_bandwidth, device_us
from benchmarks.op.gpu_layers import Stack, Workload, how_many_layers, release_memory
from benchmarks.op.gpu_step import check_picked
from benchmarks.op.gpu_table import shown
from qwen_fastdecode.ops.triton import gpu, tiles
from qwen_fastdecode.ops.triton import launch as triton_backend
from qwen_fastdecode.ops.triton.clusters import clusters_reason
from qwen_fastdecode.ops.triton.launch import decode_triton
from qwen_fastdecode.ops.triton.tiles import Tile


def workloads(state: str, dry_run: bool) -> list[Workload]:
    dtype = getattr(torch, state)
    if dry_run:
        return [Workload(B, 4, HK=2, D=16, state_dtype=dtype) for B in (1, 2)]
    sizes = [*((B, 32) for B in (1, 8, 32, 64, 128, 256, 512)), *((B, HV) for HV in (16, 48, 64) for B in (1, 64, 256))]
    return [Workload(B, HV, state_dtype=dtype) for B, HV in sizes]


def measure(w: Workload, device: torch.device, bandwidth: float) -> list[dict[str, Any]]:
    """A row for the table's tile and each candidate: microseconds a layer, and how many times the floor that is."""
    stack = Stack(w, how_many_layers(w, device), device)
    floor = 1e6 * 2 * w.state_bytes / bandwidth
    rows, state = [], str(w.state_dtype).removeprefix("torch.")
    for tile in (None, *tiles.candidates(w.D, w.HV // w.HK, clusters_reason(device) is None, state)):
        row = {**w.label(), "tile": shown(tile), "floor_us": floor, "layers": len(stack.layers)}
        try:
            us = _time(stack, tile, device)
        except (AssertionError, RuntimeError, TritonError) as error:  # wrong, or does not compile: no speed for it
            rows.append({**row, "error": str(error)[:300]})
            continue
        rows.append({**row, "us": us, "of_floor": us / floor})
    del stack
    release_memory(device)
    return rows


def _time(stack: Stack, tile: Tile | None, device: torch.device) -> float:
    steps = [stack.step(i) for i in range(len(stack.layers))]
    replay = Replay([partial(step.run, partial(decode_triton, tile=tile)) for step in steps], device)
    check_picked(steps[0], replay.first_output)
    return device_us(replay, device) / len(steps)


def measure_grid(w: Workload, device: torch.device, dry_run: bool) -> list[dict[str, Any]]:
    """The shipped tile at a large batch, on grids of other sizes."""
    stack = Stack(w, 2 if dry_run else 8, device)
    rows, shipped = [], gpu.PROGRAMS_PER_SM
    for programs in (4, 8, 16, 32, 64, 1 << 20):
        gpu.PROGRAMS_PER_SM = programs
        triton_backend._prepared.clear()  # launches are kept with their grid
        steps = [stack.step(i) for i in range(len(stack.layers))]
        replay = Replay([partial(step.run, decode_triton) for step in steps], device)
        rows.append({**w.label(), "programs_per_sm": programs, "us": device_us(replay, device) / len(steps)})
    gpu.PROGRAMS_PER_SM = shipped
    triton_backend._prepared.clear()
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="benchmarks/results/latest", help="folder for the JSON")
    parser.add_argument("--state", choices=tiles.STATES, help="of the recurrent states (default: every dtype in turn)")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU, in Triton's interpreter")
    arguments = parser.parse_args()
    device = torch.device("cpu" if arguments.dry_run else "cuda")
    bandwidth = copy_bandwidth(device)
    rows: list[dict[str, Any]] = []
    states = [arguments.state] if arguments.state else tiles.STATES
    todo = [w for state in states for w in workloads(state, arguments.dry_run)]
    largest = max(todo, key=lambda w: w.B)
    with torch.no_grad():
        for w in progress(todo, "tiles", len(todo)):
            rows += measure(w, device, bandwidth)
            write_section(arguments.out, "tiles", {"copy_bandwidth": bandwidth, "rows": rows})
        grid = measure_grid(largest, device, arguments.dry_run)
    write_section(arguments.out, "tiles", {"copy_bandwidth": bandwidth, "rows": rows, "grid": grid})
    print("grid, programs a multiprocessor: " + "  ".join(f"{r['programs_per_sm']}: {r['us']:.1f}us" for r in grid))
    wrong = [row for row in rows if "error" in row]
    for row in wrong:
        print(f"NO SPEED tile {row['tile']} HV {row['HV']} batch {row['batch']}: {row['error'][:150]}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
