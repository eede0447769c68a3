"""One decode step of a gated DeltaNet layer on one CPU thread, from its input projections to its output projection.

Both sides are upstream's own layer with its own cache, once unpatched and once patched; the projections hand out
prepared tensors, so that what is left is what the op replaces. The baseline is upstream in eager mode with the
implementation that the first line names; it is neither compiled nor flash-linear-attention, which needs a GPU.

Cold cache: every call takes the next of many layers, each with its own states and weights, as in a model. Times are
CPU time of the process, not wall time: one thread computes, and other programs' turns do not count. The benchmark
gives no time for a wrong result.

Upstream's temporaries are as large as the state. Whether the C library keeps such memory between two calls or returns
it, to be faulted in again page by page, depends on what the process allocated before and changes upstream's time
several times over. Both happen with real models, so both are measured, each in a process of its own whose allocator
(glibc's) is told what to do, beside what it does by itself here.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import transformers
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks import hush  # noqa: F401
from benchmarks.op.op_layers import (
    HK,
    HV,
    SIDES,
    CountOperators,
    D,
    Setup,
    WrongResult,
    check,
    count_operators,
    extra_memory,
)
from qwen_fastdecode.cli.compare.upstream import upstream_kernels
from qwen_fastdecode.upstream.families import FAMILIES

MIN_RATIO, MAX_MEMORY, MAX_OPERATORS = 8.0, 5.0, 45  # targets; memory in % of the recurrent state

MEMORY = {  # what glibc's allocator does with the temporaries
    "default": {},  # whatever the allocations before lead to
    "kept": {"MALLOC_MMAP_THRESHOLD_": 32 << 20, "MALLOC_TRIM_THRESHOLD_": 1 << 30},  # as after a longer prompt
    "returned": {"MALLOC_MMAP_THRESHOLD_": 128 << 10, "MALLOC_TRIM_THRESHOLD_": 128 << 10},  # as in a new process
}


class Case(NamedTuple):
    batch: int
    memory: str
    layers: int  # of which every call takes the next: their states exceed a last-level cache


CASES = tuple(Case(batch, memory, layers) for batch, layers in ((1, 36), (8, 12)) for memory in MEMORY)


@dataclass
class Measured:
    """One side of a case. Milliseconds a call, page faults a call, memory in % of the recurrent state, RMS error."""

    rounds: list[list[float]]  # the calls of each round
    faults: float = 0.0
    memory: float = 0.0
    error: float = 0.0

    @property
    def calls(self) -> list[float]:
        return [call for calls in self.rounds for call in calls]


@torch.no_grad()
def measure(case: Case, rounds: int) -> dict[str, Measured]:
    """Alternates the two sides, a round over all layers each. Whatever else allocates memory comes afterwards."""
    torch.set_num_threads(1)
    setup = Setup(case.batch, case.layers)
    measured = {side: Measured([]) for side in SIDES}
    for number in track(
        range(rounds + 1),
        description=f"batch {case.batch}, memory {case.memory}",
        transient=True,
        disable=not sys.stdout.isatty(),
    ):
        for side, result in measured.items():
            with SIDES[side](setup):
                before = _page_faults()
                calls = [_milliseconds(setup, layer) for layer in setup.layers]
            if number > 0:  # the first one warms up
                result.rounds.append(calls)
                result.faults += (_page_faults() - before) / (rounds * len(calls))
    errors = check(setup)
    for side, result in measured.items():
        result.memory, result.error = extra_memory(setup, side), errors[side]
    return measured


def in_fresh_process(case: Case, rounds: int) -> dict[str, Measured]:
    """`measure` in a process whose allocator, which reads its settings once, does as the case says."""
    settings = {name: str(size) for name, size in MEMORY[case.memory].items()}
    os.environ.update(settings)
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            return process.submit(measure, case, rounds).result()
    finally:
        for name in settings:
            del os.environ[name]


def _milliseconds(setup: Setup, layer: Any) -> float:
    begin = time.process_time()
    setup.step(layer)
    return 1e3 * (time.process_time() - begin)


def _page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def ratios(measured: dict[str, Measured]) -> list[float]:
    """How many times faster ours is, a round."""
    upstream, ours = (result.rounds for result in measured.values())
    return [median(u) / median(o) for u, o in zip(upstream, ours, strict=True)]


Results = dict[Case, dict[str, Measured]]


def step_table(results: Results) -> Table:
    """80 columns are enough."""
    table = Table("batch", "memory", "side", "ms (least to most)", "faults", "extra", "error", padding=(0, 1, 0, 0))
    for case, measured in results.items():
        for side, result in measured.items():
            least, middle, most = (f"{f(result.calls):.2f}" for f in (min, median, max))
            extra = f"{result.faults:.0f}", f"{result.memory:.1f} %", f"{result.error:.1e}"
            who = "upstream" if side == "upstream" else "ours"
            table.add_row(str(case.batch), case.memory, who, f"{middle} ({least} to {most})", *extra)
    table.caption = "a call: median; page faults; memory at its peak, of the state; RMS error from float64"
    table.caption_justify = "left"
    return table


def ratio_table(results: Results) -> Table:
    """What people came for."""
    table = Table("batch", "memory", "times as fast (least to most)", padding=(0, 1, 0, 0))
    for case, measured in results.items():
        found = ratios(measured)
        table.add_row(str(case.batch), case.memory, f"{median(found):.2f} ({min(found):.2f} to {max(found):.2f})")
    return table


def verdicts(results: Results, operators: dict[str, CountOperators]) -> list[str]:
    """One line a target."""
    lines = []
    for case, measured in results.items():
        name = f"batch {case.batch}, memory {case.memory}"
        ratio, memory = median(ratios(measured)), measured["qwen_fastdecode"].memory
        lines.append(_verdict(f"{name}: {ratio:.2f} times faster, at least {MIN_RATIO:g}", ratio >= MIN_RATIO))
        lines.append(_verdict(f"{name}: {memory:.1f} % more memory, below {MAX_MEMORY:g} %", memory < MAX_MEMORY))
    upstream, ours = (counted.operators.total() for counted in operators.values())
    text = f"operators of a layer step: {ours}, at most {MAX_OPERATORS} (upstream {upstream})"
    return [*lines, _verdict(text, ours <= MAX_OPERATORS)]


def _verdict(text: str, met: bool) -> str:
    return f"{'[green]met   ' if met else '[red]missed'}[/] {text}"


def report(setting: dict[str, str], results: Results, operators: dict[str, CountOperators]) -> dict[str, Any]:
    """Everything measured, for --json."""
    steps = [
        {
            **case._asdict(),
            "side": side,
            "milliseconds": {f.__name__: f(result.calls) for f in (median, min, max)},
            "page_faults": result.faults,
            "memory_percent": result.memory,
            "error": result.error,
        }
        for case, measured in results.items()
        for side, result in measured.items()
    ]
    return {
        "setting": setting,
        "steps": steps,
        "ratios": [{**case._asdict(), "rounds": ratios(measured)} for case, measured in results.items()],
        "operators": {side: {"operators": c.operators, "views": c.views} for side, c in operators.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="turns of each side over all layers")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    arguments = parser.parse_args()
    console = Console()
    try:
        results = {case: in_fresh_process(case, arguments.rounds) for case in CASES}
    except WrongResult as wrong:
        sys.exit(str(wrong))
    with torch.no_grad():
        operators = {side: count_operators(side) for side in SIDES}
        upstream = upstream_kernels(Setup(1, 1).layers[0], FAMILIES["qwen3_next"]).summary
    setting = {
        "upstream": upstream,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "shape": f"HK {HK}, HV {HV}, D {D}, bfloat16 activations, float32 state, one thread",
    }
    console.print(", ".join(f"{name}: {value}" for name, value in setting.items()))
    console.print(step_table(results))
    console.print(ratio_table(results))
    console.print("\n".join(verdicts(results, operators)))
    views = sorted(set().union(*(counted.views for counted in operators.values())))
    console.print("Not counted as operators, because they only describe memory anew:", ", ".join(views))
    if arguments.json:
        arguments.json.write_text(json.dumps(report(setting, results, operators), indent=1))


if __name__ == "__main__":
    main()
