"""States that are written every N-th step beside two passes over them: errors against float64, then microseconds.

Every figure is of a step whose cursor really advances: a graph of several layers is replayed over whole periods, each
replay is timed alone, and the mean and the slowest phase of a period are what is reported. A batch is checked first.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.checks.gpu_report import Notebook
from benchmarks.op.gpu_clock import Replay, copy_bandwidth, once_us, synchronise
from benchmarks.op.gpu_layers import release_memory
from benchmarks.op.gpu_step import Shape, Step, pick, picked, random_step
from qwen_fastdecode.ops import step as op
from qwen_fastdecode.ops.reference import decode_reference
from qwen_fastdecode.ops.ring import Ring, new_ring, pending
from qwen_fastdecode.ops.triton.deferred_launch import decode_deferred_triton, settle_triton, together, tuned
from qwen_fastdecode.ops.triton.launch import decode_triton

BATCHES = (8, 16, 32, 64, 128, 256)
DTYPES = (torch.float32, torch.bfloat16)
STATES_BYTES = 300 << 20  # of all layers of a graph, at least: six times the cache
LONG = 1024  # steps over which errors add up
MOST = 1.2  # of the error of two passes
PERIODS = 8

Row = dict[str, Any]


def new_tokens(step: Step, generator: torch.Generator) -> None:
    for x in step.tensors[:6]:
        x.normal_(generator=generator)


def as_op(step: Step) -> tuple[op.Step, op.Recipe]:
    options = {name: value for name, value in step.options.items() if name != "cu_seqlens"}
    return op.Step.from_tensors(step.tensors), op.Recipe(**options)


def errors_over(shape: Shape, N: int, steps: int, device: torch.device) -> Row:
    """Relative RMS errors of all outputs, and of the state in the end: deferred, and by two passes, on the same tokens.

    Against float64, on the first, the last and some other sequences.
    """
    ours = random_step(shape, device)
    if steps >= LONG:
        ours.tensors[10].fill_(-6.0)  # dt_bias: long memories, so that errors add up
    theirs = ours.twin()
    sequences = picked(ours)
    law = pick(ours, sequences).with_states(ours.conv_state[sequences], ours.recurrent_state[sequences].double())
    ring = new_ring(ours.recurrent_state, shape.HK, N, together=together(shape.state_dtype, device))
    for part in ring[:3]:
        part.fill_(torch.nan)  # nothing but what the cursor counts may be read
    generator = torch.Generator(device).manual_seed(1)
    outs: dict[str, list[Tensor]] = {"law": [], "deferred": [], "two passes": []}
    for _ in range(steps):
        new_tokens(ours, generator)
        own = pick(ours, sequences).with_states(law.conv_state, law.recurrent_state)
        outs["law"].append(own.run(decode_reference))
        outs["deferred"].append(ours.run(partial(_deferred, ring=ring))[sequences])
        outs["two passes"].append(theirs.run(decode_triton)[sequences])
    settle_triton(ours.recurrent_state, ring)
    assert torch.equal(ours.conv_state, theirs.conv_state), "the convolution taps are not the shifted ones"
    sides = {"deferred": ours, "two passes": theirs}
    out = {name: apart(torch.stack(outs[name]), torch.stack(outs["law"])) for name in sides}
    state = {name: apart(step.recurrent_state[sequences], law.recurrent_state) for name, step in sides.items()}
    right = all(found["deferred"] <= MOST * found["two passes"] for found in (out, state))
    assert ours.damaged_guards() == 0, "wrote outside the tensors it was given"
    return {"batch": shape.B, "N": N, "steps": steps, "out": out, "state": state, "right": right, **_names(shape)}


def apart(found: Tensor, law: Tensor) -> float:
    """|found - law| / |law| in float64; NaN is infinitely far."""
    difference = (found.double() - law.double()).norm() / law.double().norm()
    return float(difference.nan_to_num(nan=torch.inf))


def _deferred(step: op.Step, recipe: op.Recipe, ring: Ring) -> Tensor:
    return decode_deferred_triton(step, recipe, ring)


def _names(shape: Shape) -> Row:
    return {"state dtype": str(shape.state_dtype)[6:], "dtype": str(shape.dtype)[6:]}


def errors(device: torch.device, tiny: bool) -> Iterator[Row]:
    """Real shapes, every N of the table and others, both dtypes; the long ones on float32 activations."""
    small = {"HK": 2, "DK": 16, "DV": 16} if tiny else {}
    for dtype in DTYPES:
        N = tuned(dtype).N
        for batch, entries in ((3, N),) if tiny else ((33, N), (256, N), (64, 4), (64, 16)):
            shape = Shape(B=batch, state_dtype=dtype, layout="grouped", **small)
            yield errors_over(shape, entries, 2 * entries + 3, device)
        shape = Shape(B=4, dtype=torch.float32, state_dtype=dtype, **small)
        yield errors_over(shape, N, 24 if tiny else LONG, device)


def speed(batch: int, dtype: torch.dtype, bandwidth: float, device: torch.device, tiny: bool) -> Row:
    """us a layer: two passes, and deferred by phases of the period."""
    shape = Shape(B=batch, state_dtype=dtype, guard=0, **({"HK": 2, "DK": 16, "DV": 16} if tiny else {}))
    bytes_ = batch * shape.HV * shape.DK * shape.DV * dtype.itemsize
    layers = 2 if tiny else max(8, -(-STATES_BYTES // bytes_))
    steps = [random_step(shape, device, seed) for seed in range(layers)]
    N, floor = tuned(dtype).N, 1e6 * 2 * bytes_ / bandwidth
    last = together(dtype, device)
    rings = [new_ring(step.recurrent_state, shape.HK, N, together=last, layer=i) for i, step in enumerate(steps)]
    two = phases([partial(decode_triton, *as_op(step)) for step in steps], 1, device)
    calls = [partial(decode_deferred_triton, *as_op(step), ring) for step, ring in zip(steps, rings, strict=True)]
    deferred = phases(calls, N, device)
    assert all(bool(pending(ring)[0].all()) for ring in rings), "the cursor did not advance"
    mean, worst = statistics.mean(deferred), max(deferred)
    row = {"batch": batch, "state dtype": str(dtype)[6:], "N": N, "layers": layers, "floor us": floor}
    row |= {"two passes us": two[0], "deferred us": mean, "slowest phase us": worst}
    row |= {"two passes, of floor": two[0] / floor, "deferred, of floor": mean / floor}
    return {**row, "two passes / deferred": two[0] / mean, "slowest / mean": worst / mean}


def phases(calls: list[Callable[[], Tensor]], N: int, device: torch.device) -> list[float]:
    """us a layer of each phase of a period, the median over periods; the first period is not counted."""
    replay = Replay(calls, device)
    times = []
    for _ in range(N * (PERIODS + 1) if N > 1 else 3 * PERIODS):
        times.append(once_us(replay, device) / len(calls))
    return [statistics.median(times[N + phase :: N]) for phase in range(N)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="benchmarks/results/latest", help="folder for the JSON")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU, in Triton's interpreter")
    arguments = parser.parse_args()
    tiny = arguments.dry_run
    device = torch.device("cpu" if tiny else "cuda")
    notes = Notebook(arguments.out, "deferred-op")

    with torch.no_grad():
        for row in errors(device, tiny):
            notes.note(row)
        wrong = [row for row in notes.rows if not row["right"]]
        bandwidth = copy_bandwidth(device)
        notes.note({"copy TB/s": bandwidth / 1e12})
        for dtype in DTYPES:
            for batch in (2,) if tiny else BATCHES:
                notes.note(speed(batch, dtype, bandwidth, device, tiny))
                synchronise(device)
                release_memory(device)
    print(f"WRONG: {wrong}" if wrong else f"errors: at most {MOST} of those of two passes, everywhere")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
