"""Tokens per second of `generate`, each side beside the others, on a random-weight model of real shape.

generate-MODEL.json: {"machine": {...}, "results": [row, ...]}, a row a model, batch and side, written when it is there:

    model, batch, side    as `gpu_models` and `sides` name them
    prompt                tokens before the first new one
    ms_a_token            of one token of every sequence: the best round's median. rounds_ms has every round's: until
                          the two best are near each other, as other programs slow the host down
    tokens_per_s          of all sequences together
    first_s, hundredth_s  from before the side is entered (patching included) until the token is there, in the first
                          call of this side with this batch: what it compiles is compiled in it, from empty caches
    first_call_ms         of the tokens of that first call, from the second on
    device_ms             what the device works for a token; what is left of ms_a_token is the host's. null on a CPU
    kernels               whose kernels the gated DeltaNet layers ran, by the profiler. null on a CPU
    logits                relative RMS from Transformers alone, over the same forced tokens

or `error` in the place of the figures. Sides that do not compile take turns, as the host drifts. Rows that --out
holds already are kept and not measured again; no side is measured that `gpu_tokens` did not find right.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from benchmarks.checks.gpu_report import KeptRows
from benchmarks.models.gpu_models import MODELS, build
from benchmarks.models.sides import (
    FLA,
    OURS,
    PYTORCH,
    SIDES,
    Choices,
    Side,
    chosen,
    distance,
    forced_tokens,
    prompts,
    recorded_choices,
    replayed_choices,
)
from benchmarks.op.gpu_layers import release_memory
from qwen_fastdecode.cli.compare.generation import Batch, Clock, forced_logits, generate

LAYERS = {"dense": 32, "experts": 8}
BATCHES = (1, 32, 8, 128)  # the most important first
PROMPT, HUNDRED, NEW_TOKENS, FORCED = 16, 100, 48, 12
NEAR, MOST_ROUNDS = 1.05, 5
SETTLED = 6  # steps of a call, after which nothing is tuned or captured any more
PROFILE_FROM, PROFILED = 10, 4  # tokens
# bfloat16: the roundings of all layers add up to some percent; with experts, to other experts being chosen. Logits of
# unlike texts are 1.4 apart.
LOGITS_LIMIT = {"dense": 0.15, "experts": 0.4}
KERNELS = {OURS: ("decode_token", "decode_value_head"), FLA: ("fused_recurrent",)}  # in the names of kernels

Row = dict[str, Any]
FAILURES = (AssertionError, RuntimeError, TorchDynamoException)


class Expected(NamedTuple):
    """What Transformers alone computes of forced tokens: logits, and what its routers gave on the way."""

    logits: Tensor
    choices: Choices

    @classmethod
    def of(cls, model: Any, inputs: Batch) -> Expected:
        choices = Choices()
        with SIDES["eager"].entered(model), recorded_choices(model, choices):
            return cls(forced_logits(model, inputs, forced_tokens(model, len(inputs["input_ids"]), FORCED)), choices)

    def distance_to(self, model: Any, inputs: Batch, side: Side) -> float:
        """Of the side that the model is on; flash-linear-attention's with the routers held, as `gpu_tokens` has it."""
        with replayed_choices(model, self.choices) if side.fla else nullcontext():
            found = forced_logits(model, inputs, forced_tokens(model, len(inputs["input_ids"]), FORCED))
        return distance(found, self.logits)


class ProfiledSteps(Clock):
    """Profiles some decode steps of a call; the device has nothing left to do where they begin and where they end."""

    def __init__(self) -> None:
        super().__init__()
        self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])

    def put(self, value: Tensor) -> None:
        super().put(value)
        if len(self.arrivals) == PROFILE_FROM:
            torch.cuda.synchronize()
            self.profile.start()
        if len(self.arrivals) == PROFILE_FROM + PROFILED:
            torch.cuda.synchronize()
            self.profile.stop()


def in_turns(model: Any, inputs: Batch, sides: dict[str, Side], limit: float) -> Iterator[tuple[str, Row]]:
    """Sides that do not compile: the first call of each, then rounds of those that are not settled."""
    expected = Expected.of(model, inputs)
    left = {name: _first_call(model, inputs, side, expected, limit) for name, side in sides.items()}
    while left:
        for name, row in [*left.items()]:
            left[name] = row if "error" in row else _another_round(model, inputs, sides[name], row)
            if done(left[name]):
                yield name, _with_speed(left.pop(name), inputs)


def compiled(model: Any, inputs: Batch, sides: dict[str, Side], limit: float) -> Iterator[tuple[str, Row]]:
    """Sides that compile, each for itself: leaving one loses what it compiled."""
    expected = Expected.of(model, inputs)
    for name, side in sides.items():
        yield name, _with_speed(_first_call(model, inputs, side, expected, limit), inputs)


def done(row: Row) -> bool:
    """Whether nothing is left to measure."""
    return "error" in row or settled(row["rounds_ms"])


def settled(rounds_ms: list[float]) -> bool:
    """Whether the speed of a side is known: its two best rounds are near each other, or there have been enough."""
    best = sorted(rounds_ms)[:2]
    return len(rounds_ms) >= MOST_ROUNDS or (len(best) == 2 and best[1] <= NEAR * best[0])


def _first_call(model: Any, inputs: Batch, side: Side, expected: Expected, limit: float) -> Row:
    """The first call, as a program begins; what the side computes, by which kernels; if it compiles, its rounds too."""
    clock = Clock()
    _wait(model)
    start = time.perf_counter()
    try:
        with side.entered(model):
            generate(model, inputs, HUNDRED, clock)
            row = {"first_s": clock.arrivals[1] - start, "hundredth_s": clock.arrivals[HUNDRED] - start}
            row |= {"first_call_ms": [round(ms, 2) for ms in clock.step_ms], "rounds_ms": []}
            row |= _device_work(model, inputs)
            while side.compiled and not settled(row["rounds_ms"]):
                row["rounds_ms"].append(_round(model, inputs))
            row["logits"] = expected.distance_to(model, inputs, side)
        assert row["logits"] < limit, f"logits differ by {row['logits']:.2e}"
        assert row["kernels"] in (None, side.kernels), f"ran kernels of {row['kernels']}, not of {side.kernels}"
        return row
    except FAILURES as error:
        return _failure(model, error)


def _another_round(model: Any, inputs: Batch, side: Side, row: Row) -> Row:
    try:
        with side.entered(model):
            return {**row, "rounds_ms": [*row["rounds_ms"], _round(model, inputs)]}
    except FAILURES as error:
        return _failure(model, error)


def _failure(model: Any, error: BaseException) -> Row:
    said = f"{type(error).__name__}: {error}"[:300]
    release_memory(model.device)
    return {"error": said}


def _round(model: Any, inputs: Batch) -> float:
    """ms a token."""
    return statistics.median(generate(model, inputs, NEW_TOKENS).step_ms[SETTLED:])


def _with_speed(row: Row, inputs: Batch) -> Row:
    if "error" in row:
        return row
    best = min(row["rounds_ms"])
    return {"ms_a_token": best, "tokens_per_s": 1e3 * len(inputs["input_ids"]) / best, **row}


def _device_work(model: Any, inputs: Batch) -> Row:
    """ms a token that the device works, and whose kernels it ran."""
    if model.device.type != "cuda":
        return {"device_ms": None, "kernels": None}
    clock = ProfiledSteps()
    generate(model, inputs, PROFILE_FROM + PROFILED + 2, clock)
    events = [event for event in clock.profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    ran = [whose for whose, parts in KERNELS.items() if any(part in event.name for event in events for part in parts)]
    ms = sum(event.time_range.elapsed_us() for event in events) / 1e3 / PROFILED
    return {"device_ms": ms, "kernels": " and ".join(ran) or PYTORCH}


def _wait(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def right_sides(folder: str, model: str, asked: dict[str, Side]) -> dict[str, Side]:
    """Those that `gpu_tokens` found right. Raises FileNotFoundError where it was not run."""
    rows = json.loads((Path(folder) / f"tokens-{model}.json").read_text())["results"]
    wrong = {row["side"] for row in rows if not row.get("right")}
    proved = {row["side"] for row in rows} - wrong
    for name in {*asked} - proved:
        print(f"no speed for {name}: {'its float32 tokens are wrong' if name in wrong else 'not proved'}", flush=True)
    return {name: side for name, side in asked.items() if name in proved}


def measure(model: Any, name: str, of: str, sides: dict[str, Side], batches: Any, results: KeptRows) -> None:
    """Every side at every batch that `results` lacks: first those that do not compile."""
    for way, compiles in ((in_turns, False), (compiled, True)):
        for batch in batches:
            todo = {side: how for side, how in sides.items() if how.compiled == compiles}
            todo = {side: how for side, how in todo.items() if results.lacks(name, batch, side)}
            if todo:
                for side, row in way(model, prompts(model, batch, PROMPT), todo, LOGITS_LIMIT[of]):
                    results.add({"model": name, "batch": batch, "side": side, "prompt": PROMPT, **row})
                    _say(results.rows[-1])
                release_memory(model.device)


def _say(row: Row) -> None:
    shown = {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}
    print({key: value for key, value in shown.items() if key != "first_call_ms"}, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--out", default="benchmarks/results/latest", help="folder for the JSON")
    parser.add_argument("--dry-run", action="store_true", help="a tiny model on the CPU")
    parser.add_argument("--sides", default="", help="some of them, separated by commas (default: all)")
    arguments = parser.parse_args()
    tiny, of = arguments.dry_run, arguments.model
    shape = MODELS[of](4 if tiny else LAYERS[of], tiny)
    results = KeptRows(arguments.out, f"generate-{of}", done)
    with torch.no_grad():
        model = build(shape, torch.device("cpu" if tiny else "cuda"), torch.bfloat16)
        sides = right_sides(arguments.out, of, chosen(arguments.sides, model))
        with SIDES["eager"].entered(model):
            generate(model, prompts(model, 1, PROMPT), 4)  # what every program pays: the device, cuBLAS, the allocator
        measure(model, shape.name, of, sides, (1, 2) if tiny else BATCHES, results)
    return 1 if any("error" in row for row in results.rows) else 0


if __name__ == "__main__":
    sys.exit(main())
