"""What a patched layer's Python costs a decode step, on any machine: the launch of the kernel is a stand-in.

    python -m benchmarks.op.host [--rounds N] [--json FILE]

A layer of real head counts at batch 1 whose projections return tensors that are there already. From its time is taken
that of the modules it calls and of the output's allocation, which any way of decoding has. CPU time of the thread, the
best of many rounds: what else the machine does counts little. The number of calls (Python's and C's) does not depend on
the machine's mood at all.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: the launcher then takes tensors on the CPU

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

import qwen_fastdecode
from benchmarks import hush  # noqa: F401
from benchmarks.op.gpu_layers import Stack, Workload
from qwen_fastdecode.ops.step import Step
from qwen_fastdecode.ops.triton import launch
from qwen_fastdecode.ops.triton.layout import places_of
from qwen_fastdecode.upstream.families import FAMILIES

LAYERS = 8  # of one model: they share what was prepared
CALLS = 4  # of every layer in a round: short, so that some rounds are undisturbed
CPU = torch.device("cpu")

logging.set_verbosity_error()


def measure(family: str, rounds: int) -> dict[str, float]:
    """Microseconds and calls of one layer's decode step at batch 1: all of it, what any way has, and the rest."""
    stack = Stack(Workload(1, 32, family=family), LAYERS, CPU)
    calls, floors = stack.calls(), [_modules_alone(stack, i) for i in range(LAYERS)]
    with torch.inference_mode(), _no_launch(), qwen_fastdecode.patched(stack, backend="triton"):
        whole, floor = _best_us(calls, rounds), _best_us(floors, rounds)
        whole_calls, floor_calls = _count(calls[0]), _count(floors[0])
        served = qwen_fastdecode.status(stack).fast_steps
    if served != LAYERS * (CALLS * (rounds + 1)) + 2:
        raise RuntimeError(f"{served} fast steps: a call was not one, or more calls than were timed")
    return {
        "layer": whole,
        "modules and output alone": floor,
        "ours": whole - floor,
        "calls of functions": whole_calls - floor_calls,
    }


def _modules_alone(stack: Stack, i: int) -> Callable[[], Tensor]:
    """Layer i's projections, an output that is never written, the output projection: within a module's call, as it."""
    layer, w = stack.layers[i], stack.workload
    projections = [getattr(layer, name) for name in FAMILIES[w.family].projections]
    out_proj, hidden_states = layer.out_proj, stack.hidden_states

    class Alone(torch.nn.Module):
        def forward(self, hidden_states: Tensor) -> Tensor:
            for projection in projections:
                projection(hidden_states)
            return out_proj(torch.empty((1, 1, w.HV * w.D), dtype=w.dtype, device=CPU))

    alone = Alone()
    return lambda: alone(hidden_states=hidden_states)


@contextmanager
def _no_launch() -> Iterator[None]:
    """All that `launch` does for a step of whole heads on a GPU, but for the call of the compiled kernel."""
    kept = launch._interpret
    prepared: dict[int, tuple[list[tuple[int, int]], tuple[Any, ...]]] = {}

    def stand_in(found: launch.Launch, shape: Any, step: Step, sources: Any, others: Any) -> Tensor:
        if id(found) not in prepared:
            prepared[id(found)] = places_of(step), (*found.scratch(None), *found.last)
        places, after_out = prepared[id(found)]
        out = torch.empty(shape, dtype=step.sources[0].dtype, device=CPU)
        pointers = [sources[i] + offset for i, offset in places]
        _nothing(*pointers, *others, step.cu_seqlens, out.data_ptr(), *after_out)
        return out

    launch._interpret = stand_in
    launch._prepared.clear()
    try:
        yield
    finally:
        launch._interpret = kept
        launch._prepared.clear()


def _nothing(*arguments: Any) -> None:
    pass


def _best_us(calls: list[Callable[[], Tensor]], rounds: int) -> float:
    """CPU microseconds of one call, in the fastest round; the calls take turns, as layers do."""
    times = []
    for _ in range(rounds + 1):
        start = time.thread_time()
        for _ in range(CALLS):
            for call in calls:
                call()
        times.append(1e6 * (time.thread_time() - start) / (CALLS * len(calls)))
    return min(times[1:])


def _count(call: Callable[[], Tensor]) -> int:
    """How many functions one call calls, in Python and in C."""
    call()
    events = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal events
        events += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        call()
    finally:
        sys.setprofile(None)
    return events


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=400, help="of which the fastest counts (default 400)")
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = {family: measure(family, arguments.rounds) for family in ("qwen3_5", "qwen3_next")}
    for family, numbers in results.items():
        print(family, *(f"  {name:28s}{value:8.1f}" for name, value in numbers.items()), sep="\n")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
