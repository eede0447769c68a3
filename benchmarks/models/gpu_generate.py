"""Tokens per second of `generate` with and without the patch, on random-weight models of real shapes."""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch._dynamo.exc import TorchDynamoException

import qwen_fastdecode
from benchmarks.checks.gpu_report import progress, write_section
from benchmarks.models.gpu_models import ModelShape, build, dense, experts
from benchmarks.op.gpu_layers import installed_kernels, pytorch_functions, release_memory
from qwen_fastdecode.cli.compare.generation import Batch, Clock, forced_logits, generate
from qwen_fastdecode.cli.compare.layerwise import LayerwiseCheck

BATCHES = (1, 32, 256)
PROMPT, NEW_TOKENS, ROUNDS, FORCED = 16, 24, 3, 5
PROFILED = 8  # decode steps; reading a profile takes as long as running many of them
COMPILED_LAYERS = 4  # compiling takes seconds a layer, and the ratio is what is asked for
# Of one layer step on the same inputs, bf16, ours rounding once and upstream after every operation: 5.6e-3 at 32 heads
# of 128, up to three times that where a layer is tiny.
STEP_LIMIT = 2e-2
# Compiled graphs cannot be watched layer by layer. The roundings of all layers add up to some percent of the logits of
# a dense model (with experts, to other experts being chosen); one layer computed wrongly changes them altogether.
LOGITS_LIMIT = 0.15
PATCHED = "patched"  # a side; the others have the names of what they run
OURS, INSTALLED = "decode_token", ("fused_recurrent", "causal_conv1d")  # in the names of the kernels

Row = dict[str, Any]
Enter = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Side:
    """One way to run a model on one batch."""

    tokens_per_second: float
    logits: torch.Tensor  # [B, decode steps, vocabulary] of the same forced tokens on every side
    work: DeviceWork


@dataclass(frozen=True)
class DeviceWork:
    """What the device did in decode steps, by the profiler: no counter sees inside a compiled graph."""

    kernels: frozenset[str]  # their names; empty on a CPU
    ms: float  # a step, all kernels and copies added up: free of what the host costs; 0 on a CPU


class ProfiledSteps(Clock):
    """Profiles some decode steps of `generate`, from the third on: the first two may compile and capture."""

    def __init__(self) -> None:
        super().__init__()
        self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])

    def put(self, value: torch.Tensor) -> None:
        """Tokens have arrived: the prompt, the prefill's, then one of every sequence a step."""
        super().put(value)
        if len(self.arrivals) == 4:
            self.profile.start()
        if len(self.arrivals) == 4 + PROFILED:
            self.profile.stop()


def measure(shape: ModelShape, batches: tuple[int, ...], compiled: bool, device: torch.device) -> Iterator[Row]:
    """Rows of one model: a batch each, unpatched with each of upstream's implementations, and patched."""
    model = build(shape, device, torch.bfloat16)
    model.generation_config.cache_implementation = "static" if compiled else None
    source = sys.modules[type(_first_layer(model)).__module__]
    sides: dict[str, Enter] = {PATCHED: partial(_patched, model, device), "PyTorch": partial(pytorch_functions, source)}
    if installed_kernels(source):
        sides["installed"] = nullcontext
    for size in batches:
        batch = _prompts(model, size, device)
        tokens = torch.randint_like(batch["input_ids"][:, :FORCED], model.config.get_text_config().vocab_size)
        step = None if compiled else _step_distance(model, batch, device)
        found = _run_sides(model, batch, tokens, sides, alternate=not compiled)
        ours = found.pop(PATCHED)
        for name, before in found.items():
            row = {"model": shape.name, "mode": "static cache, compiled" if compiled else "eager", "batch": size}
            yield {**row, "asked": name, **_compare(before, ours, step)}


def _run_sides(
    model: Any, batch: Batch, tokens: torch.Tensor, sides: dict[str, Enter], *, alternate: bool
) -> dict[str, Side | str]:
    """Every side, or why it did not run; its speed is the median step of its best round.

    Rounds alternate where they can, as the host's speed drifts. What was compiled is lost when another side begins.
    """
    seen: dict[str, tuple[torch.Tensor, DeviceWork] | str] = {}
    steps: dict[str, list[float]] = {name: [] for name in sides}
    turns = [*sides] * ROUNDS if alternate else [*sides]
    for name in turns:
        try:
            with sides[name]():
                if name not in seen:  # compiles and warms up
                    torch._dynamo.reset()
                    seen[name] = forced_logits(model, batch, tokens), _device_work(model, batch)
                for _ in range(1 if alternate else ROUNDS):
                    steps[name].append(statistics.median(generate(model, batch, NEW_TOKENS).step_ms[2:]))
        except (AssertionError, RuntimeError, TorchDynamoException) as error:
            seen[name] = f"{type(error).__name__}: {error}"[:300]
    return {
        name: what if isinstance(what, str) else Side(1e3 * len(tokens) / min(steps[name]), *what)
        for name, what in seen.items()
    }


def _device_work(model: Any, batch: Batch) -> DeviceWork:
    if model.device.type != "cuda":
        return DeviceWork(frozenset(), 0.0)
    clock = ProfiledSteps()
    generate(model, batch, NEW_TOKENS, clock)
    events = [event for event in clock.profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    ms = sum(event.time_range.elapsed_us() for event in events) / 1e3 / PROFILED
    return DeviceWork(frozenset(event.name for event in events), ms)


def _ran(side: Side, *names: str) -> bool:
    return any(name in kernel for kernel in side.work.kernels for name in names)


def _step_distance(model: Any, batch: Batch, device: torch.device) -> float:
    """The largest distance of one fast layer step from upstream's on the same inputs, over some layers and steps."""
    names = [name for name, module in model.named_modules() if type(module).__name__.endswith("GatedDeltaNet")]
    check = LayerwiseCheck(model, [names[0], names[len(names) // 2], names[-1]])
    with _patched(model, device), check.watching():
        generate(model, batch, 4)
    return check.distance.relative_rms


def _compare(before: Side | str, after: Side | str, step: float | None) -> Row:
    """Both speeds and what the unpatched side ran, unless the two sides differ too much or ran the same kernels."""
    if isinstance(before, str):
        return {"error": f"unpatched: {before}"}
    if isinstance(after, str):
        return {"error": f"patched: {after}"}
    logits = ((after.logits - before.logits).norm() / before.logits.norm()).item()
    distance, limit = (logits, LOGITS_LIMIT) if step is None else (step, STEP_LIMIT)
    if not distance <= limit:
        return {"error": f"no speed: {'logits' if step is None else 'a layer step'} differ by {distance:.2e}"}
    if after.work.kernels and (_ran(before, OURS) or not _ran(after, OURS)):
        return {"error": "no speed: the patched side did not run the fast kernel, or the unpatched side did"}
    kernels = "installed" if _ran(before, *INSTALLED) else "PyTorch"
    speeds = {"before": before.tokens_per_second, "after": after.tokens_per_second}
    device_ms = {"device_ms_before": before.work.ms, "device_ms_after": after.work.ms}
    return {**speeds, **device_ms, "kernels": kernels, "step": step, "logits": logits}


@contextmanager
def _patched(model: Any, device: torch.device) -> Iterator[None]:
    """The patch, by the backend that this device is for; raises AssertionError if it served nothing in eager mode."""
    with qwen_fastdecode.patched(model, backend="triton" if device.type == "cuda" else "torch"):
        yield
        status = qwen_fastdecode.status(model)
        eager = model.generation_config.cache_implementation is None
        assert status.fast_steps or not eager, f"no step was served fast:\n{status}"


def _prompts(model: Any, size: int, device: torch.device) -> Batch:
    ids = torch.randint(0, model.config.get_text_config().vocab_size, (size, PROMPT), device=device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _first_layer(model: Any) -> Any:
    return next(module for module in model.modules() if type(module).__name__.endswith("GatedDeltaNet"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="benchmarks/results/latest", help="folder for the JSON")
    parser.add_argument("--dry-run", action="store_true", help="tiny models on the CPU, by the torch backend")
    parser.add_argument("--match", default="", help="only the models whose name and mode contain this")
    dry_run = (arguments := parser.parse_args()).dry_run
    device = torch.device("cpu" if dry_run else "cuda")
    todo = [
        (dense(4 if dry_run else 32, dry_run), (1, 2) if dry_run else BATCHES, False),
        (experts(4 if dry_run else 8, dry_run), (1,) if dry_run else BATCHES, False),
        (dense(4 if dry_run else COMPILED_LAYERS, dry_run), (1,) if dry_run else BATCHES, True),
    ]
    todo = [one for one in todo if arguments.match in f"{one[0].name} {'compiled' if one[2] else 'eager'}"]
    rows: list[Row] = []
    with torch.no_grad():
        for shape, batches, compiled in progress(todo, "generate", len(todo)):
            for row in measure(shape, batches, compiled, device):
                rows.append(row)
                write_section(arguments.out, "generate", rows)
            torch._dynamo.reset()
            release_memory(device)
    return 1 if any("error" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
