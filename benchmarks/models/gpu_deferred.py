"""`deferred_state=True` beside the plain patch, end to end: tokens a second, the slowest token, and the same tokens.

The 4B shape with random weights, eager and captured (`cuda_graph=True`), alternating in one run. What is timed is whole
periods of the ring; that every step was deferred is asserted.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from typing import Any

import torch

import qwen_fastdecode
from benchmarks.checks.gpu_report import Notebook
from benchmarks.models.gpu_graph import prompts
from benchmarks.models.gpu_models import build, dense
from benchmarks.op.gpu_layers import release_memory
from qwen_fastdecode.cli.compare.generation import generate

BATCHES = (256, 128, 64, 32)
WARM, PERIODS, N = 8, 7, 8  # the first tokens capture; then whole periods, of a multiple of both N of the table
EQUAL_TOKENS = 128
PROMPT = 16

Row = dict[str, Any]
SIDES: dict[str, dict[str, Any]] = {
    "patched": {},
    "deferred": {"deferred_state": True},
    "captured": {"cuda_graph": True},
    "captured, deferred": {"cuda_graph": True, "deferred_state": True},
}
NARROW = {f"{side}, bfloat16 states": {**options, "state_dtype": torch.bfloat16} for side, options in SIDES.items()}


def same_tokens(device: torch.device, tiny: bool) -> Row:
    """float32: sequences whose tokens are those of upstream, side by side."""
    model = build(dense(4, tiny), device, torch.float32)
    batch = 2 if tiny else 32
    inputs, steps = prompts(model, batch, PROMPT), 16 if tiny else EQUAL_TOKENS
    expected = generate(model, inputs, steps).tokens
    equal = {}
    for side, options in SIDES.items():
        with qwen_fastdecode.patched(model, **options):
            tokens = generate(model, inputs, steps).tokens
            _check(model, options, batch, steps, tiny)
        equal[side] = int((tokens == expected).all(dim=1).sum())
    return {"model": "float32, 4 layers", "batch": batch, "tokens": steps, "sequences equal to upstream": equal}


def speeds(model: Any, batch: int, sides: dict[str, dict[str, Any]], rounds: int, tiny: bool) -> Row:
    """ms a token on each side: the mean and the slowest of the round with the least mean; and tokens a second."""
    inputs, steps = prompts(model, batch, PROMPT), WARM + PERIODS * N + 1
    found: dict[str, list[list[float]]] = {side: [] for side in sides}
    for turn in range(rounds + 1):  # the first warms up
        for side, options in sides.items():
            with qwen_fastdecode.patched(model, **options):
                run = generate(model, inputs, steps)
                _check(model, options, batch, steps, tiny)
            if turn:
                found[side].append(run.step_ms[WARM:])
    best = {side: min(runs, key=statistics.mean) for side, runs in found.items()}
    return {
        "batch": batch,
        "tokens a second": {side: 1e3 * batch / statistics.mean(ms) for side, ms in best.items()},
        "ms a token": {side: statistics.mean(ms) for side, ms in best.items()},
        "median ms": {side: statistics.median(ms) for side, ms in best.items()},
        "slowest ms": {side: max(ms) for side, ms in best.items()},
    }


def _check(model: Any, options: dict[str, Any], batch: int, steps: int, tiny: bool) -> None:
    """Raises AssertionError where a step was not what it is reported as."""
    status = qwen_fastdecode.status(model)
    expected = (steps - 1) * status.covered
    assert status.fast_steps == expected, f"{status.fast_steps} fast steps of {expected}: {status}"
    if options.get("cuda_graph") and not tiny:
        assert status.graphs is not None, "no graph"
        assert status.graphs.replays, f"nothing was replayed: {status.graphs}"
    if options.get("deferred_state"):
        print("  ", [line for line in str(status).splitlines() if "deferred" in line], flush=True)
    if options.get("deferred_state") and not tiny and "state_dtype" not in options:
        assert status.deferred_steps == expected, f"{status.deferred_steps} deferred steps of {expected}: {status}"
    qwen_fastdecode.reset_counters(model)


def gains(row: Row) -> Row:
    """What a ring gains: tokens a second beside those of the same side without it."""
    rate = row["tokens a second"]
    return {side: rate[side] / rate[plain] for side in rate if (plain := _without(side)) in rate and plain != side}


def _without(side: str) -> str:
    return side.replace("captured, deferred", "captured").replace("deferred", "patched")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="benchmarks/results/latest", help="folder for the JSON")
    parser.add_argument("--dry-run", action="store_true", help="tiny models on the CPU")
    tiny = parser.parse_args().dry_run
    out = parser.parse_args().out
    device = torch.device("cpu" if tiny else "cuda")
    notes = Notebook(out, "deferred-models")

    with torch.no_grad():
        notes.note(same_tokens(device, tiny))
        release_memory(device)
        model = build(dense(4 if tiny else 32, tiny), device, torch.bfloat16)
        for batch in (2,) if tiny else BATCHES:
            row = speeds(model, batch, SIDES, 1 if tiny else 2, tiny)
            notes.note({**row, "gain": gains(row)})
            release_memory(device)
        for batch in (2,) if tiny else BATCHES[:2]:
            row = speeds(model, batch, NARROW, 1 if tiny else 2, tiny)
            notes.note({**row, "gain": gains(row)})
            release_memory(device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
