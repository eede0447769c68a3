"""Speed of a decode step between the projections: ours, upstream with and without flash-linear-attention, the floor."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

import qwen_fastdecode
from benchmarks.checks.gpu_report import progress, write_section
from benchmarks.op.gpu_clock import Replay, copy_bandwidth, device_us, wall_us
from benchmarks.op.gpu_host import host_times
from benchmarks.op.gpu_layers import (
    BATCHES,
    Stack,
    Workload,
    how_many_layers,
    installed_kernels,
    pytorch_functions,
    release_memory,
)
from benchmarks.op.gpu_peers import check_peer, installed_peers, peer_calls
from benchmarks.op.gpu_step import check_picked
from benchmarks.op.gpu_table import INSTALLED, OURS, PYTORCH

# Upstream rounds to bf16 after every operation: 5.4e-3 over a layer (HV 32, D 128).
BASELINE_LIMIT = 2e-2


Calls = list[Callable[[], torch.Tensor]]
Errors = dict[str, float]


@dataclass(frozen=True)
class Contestant:
    """A way to run the layers of a stack, entered as a context, and the check of what `run` gives for layer 0."""

    enter: Callable[[Stack], AbstractContextManager[Any]]
    check: Callable[[Stack, Callable[[], torch.Tensor]], Errors]
    calls: Callable[[Stack], Calls] = Stack.calls


def _check_ours(stack: Stack, run: Callable[[], torch.Tensor]) -> Errors:
    return check_picked(stack.step(0), run)


def _check_upstream(stack: Stack, run: Callable[[], torch.Tensor]) -> Errors:
    return check_picked(stack.step(0), run, BASELINE_LIMIT)


CONTESTANTS = {
    OURS: Contestant(lambda stack: qwen_fastdecode.patched(stack, backend="triton"), _check_ours),
    PYTORCH: Contestant(lambda stack: pytorch_functions(stack.source), _check_upstream),
    INSTALLED: Contestant(lambda stack: nullcontext(), _check_upstream),
}


def workloads(dry_run: bool) -> list[tuple[Workload, bool]]:
    """What is timed, and whether the baselines are timed as well."""
    if dry_run:
        return [(Workload(2, 4, HK=2, D=16), True), (Workload(1, 6, HK=2, D=16, family="qwen3_next"), True)]
    found = [(Workload(B, HV), HV == 32 or B in (1, 256)) for HV in (32, 16, 48, 64) for B in BATCHES]
    bf16 = torch.bfloat16
    found += [
        (Workload(B, HV, state_dtype=bf16), HV == 32 and B in (1, 256)) for HV in (32, 16, 48, 64) for B in BATCHES
    ]
    return found + [(Workload(B, 32, family="qwen3_next"), True) for B in (1, 256)]


def measure(w: Workload, baselines: bool, device: torch.device, bandwidth: float) -> dict[str, Any]:
    """A row: microseconds a layer of each contestant, by graph replay and eagerly, or why it has no speed."""
    stack = Stack(w, how_many_layers(w, device), device)
    row: dict[str, Any] = {**w.label(), "layers": len(stack.layers), "bytes": w.bytes, "state_bytes": w.state_bytes}
    row["floor_us"] = 1e6 * 2 * w.state_bytes / bandwidth
    row["graph_us"], row["eager_us"], row["errors"], row["no_speed"] = {}, {}, {}, {}
    row["installed_kernels"] = installed_kernels(stack.source)
    for name, contestant in _contestants(stack, baselines):
        with _reported(row, name), contestant.enter(stack):
            _measure_one(name, contestant, stack, device, row)
    for name in installed_peers() if baselines else ():
        with _reported(row, name):
            _measure_peer(name, stack, device, row)
    row["in_place_us"] = _in_place_us(stack, device)  # last: nothing is computed from these states any more
    del stack
    release_memory(device)
    return row


def _in_place_us(stack: Stack, device: torch.device) -> float:
    """Microseconds a layer of one elementwise operation on the recurrent states, in place.

    The floor plus what any launch costs that reads and writes so many bytes: its start, its ramp and its tail.
    """
    states = [stack.step(i).recurrent_state for i in range(len(stack.layers))]
    return device_us(Replay([partial(state.mul_, 0.5) for state in states], device), device) / len(states)


@contextmanager
def _reported(row: dict[str, Any], name: str) -> Iterator[None]:
    """Whatever goes wrong inside costs one contestant its speed, and is said."""
    try:
        yield
    except Exception as error:
        row["no_speed"][name] = f"{type(error).__name__}: {error}"[:300]


def _contestants(stack: Stack, baselines: bool) -> Iterator[tuple[str, Contestant]]:
    yield OURS, CONTESTANTS[OURS]
    if not baselines:
        return
    yield PYTORCH, CONTESTANTS[PYTORCH]
    if installed_kernels(stack.source):
        yield INSTALLED, CONTESTANTS[INSTALLED]


def _measure_one(name: str, contestant: Contestant, stack: Stack, device: torch.device, row: dict[str, Any]) -> None:
    """Checked eagerly and replayed before it is timed; a wrong result raises AssertionError."""
    calls = contestant.calls(stack)
    contestant.check(stack, calls[0])

    def eager() -> None:
        for call in calls:
            call()

    eager_us = wall_us(eager, device)
    replay = Replay(calls, device)
    row["errors"][name] = contestant.check(stack, replay.first_output)
    row["graph_us"][name] = device_us(replay, device) / len(calls)
    row["eager_us"][name] = eager_us / len(calls)


def _measure_peer(name: str, stack: Stack, device: torch.device, row: dict[str, Any]) -> None:
    """As above; a peer has states of its own, so its check comes first and once."""
    calls = peer_calls(name, stack)
    row["errors"][name] = check_peer(stack, calls[0], BASELINE_LIMIT)
    row["graph_us"][name] = device_us(Replay(calls, device), device) / len(calls)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="benchmarks/results/latest", help="folder for the JSON")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU, in Triton's interpreter")
    parser.add_argument("--match", default="", help='only rows whose label contains this, "qwen3_5 float32 HV 32" say')
    arguments = parser.parse_args()
    device = torch.device("cpu" if arguments.dry_run else "cuda")
    bandwidth = copy_bandwidth(device)
    every = workloads(arguments.dry_run)
    todo = [
        one for one in every if arguments.match in "{family} {state} HV {HV} batch {batch}".format(**one[0].label())
    ]
    results: dict[str, Any] = {"copy_bandwidth": bandwidth, "rows": []}
    with torch.no_grad():
        results["host_us"] = host_times(device)
        for w, baselines in progress(todo, "speed", len(todo)):
            results["rows"].append(measure(w, baselines, device, bandwidth))
            write_section(arguments.out, "speed", results)  # after each row: a run that is cut short keeps what it has
    wrong = [(row, name, text) for row in results["rows"] for name, text in row["no_speed"].items()]
    for row, name, text in wrong:
        print(f"NO SPEED {name}, HV {row['HV']}, batch {row['batch']}, {row['state']} state: {text}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
