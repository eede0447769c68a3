"""What is true of `cuda_graph=True` on random-weight models of real shapes, beside its speed (`gpu_generate`).

Captures that fail, logits to the bit, sampling, memory, long prompts. Each section is written as soon as it is there.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import timeit
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

import qwen_fastdecode
from benchmarks.checks.gpu_report import Notebook
from benchmarks.models.gpu_models import ModelShape, build, dense, experts
from benchmarks.models.sides import SIDES, Side, prompts, source_of
from benchmarks.op.gpu_layers import pytorch_functions, release_memory
from qwen_fastdecode import graph
from qwen_fastdecode.cli.compare.generation import generate
from qwen_fastdecode.graph.call import Call
from qwen_fastdecode.graph.capture import Graph, Pool, copied
from qwen_fastdecode.graph.fingerprint import Fingerprint

PROMPT, NEW_TOKENS, SHORT, BITS_STEPS = 16, 48, 32, 64

Row = dict[str, Any]
captured = SIDES["cuda_graph"].entered


@contextmanager
def fixed_addresses(model: Any) -> Iterator[None]:
    """As `captured`, with the eager step in the place of every capture: the same cache, and no graph."""
    kept = Call._captured
    Call._captured = lambda self, inputs: self._first(inputs)  # type: ignore[method-assign]
    try:
        with pytorch_functions(source_of(model)), qwen_fastdecode.patched(model, cuda_graph=True):
            yield
    finally:
        Call._captured = kept  # type: ignore[method-assign]


def same_bits(model: Any, name: str, batch: int, steps: int) -> Row:
    """bfloat16: logits of replays beside eager steps on the same cache, to the bit."""
    inputs, found = prompts(model, batch, PROMPT), {}
    for side, enter in {"captured": captured, "eager": fixed_addresses}.items():
        with enter(model):
            out = model.generate(
                **inputs,
                max_new_tokens=steps,
                min_new_tokens=steps,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
            found[side] = torch.stack(out.logits)
    equal = [torch.equal(a, b) for a, b in zip(found["captured"], found["eager"], strict=True)]
    worst = (found["captured"].float() - found["eager"].float()).abs().max().item()
    return {"model": name, "batch": batch, "steps": steps, "equal to the bit": sum(equal), "largest difference": worst}


def noise(model: Any, name: str, batch: int, length: int) -> Row:
    """How far a first replay is from the eager step, and how far the eager step is from itself, on the same states."""
    inputs, row = prompts(model, batch, length), {"model": name, "batch": batch, "prompt": length}
    with captured(model):
        generate(model, inputs, 12)
        row["replay from eager"] = graph.describe(model).worst
    own = Graph.replay
    Graph.replay = lambda self, inputs: copied(model(**inputs))  # type: ignore[method-assign]
    try:
        with captured(model):
            generate(model, inputs, 12)
            row["eager from eager"] = graph.describe(model).worst
    finally:
        Graph.replay = own  # type: ignore[method-assign]
    return row


def sampled(model: Any, name: str) -> Row:
    """Sampling with a seed: the same tokens on the same cache."""
    inputs, said = prompts(model, 4, PROMPT), {}
    for side, enter in {"captured": captured, "eager": fixed_addresses}.items():
        with enter(model):
            torch.manual_seed(3)
            said[side] = model.generate(**inputs, max_new_tokens=48, min_new_tokens=48, do_sample=True, top_k=50)
    return {"model": name, "sampled tokens equal": bool(torch.equal(said["captured"], said["eager"]))}


def speeds(model: Any, name: str, sides: dict[str, Side], batch: int, length: int) -> Row:
    """ms a token after a long prompt, on each side; and the whole of a short call."""
    inputs = prompts(model, batch, length)
    row: Row = {"model": name, "batch": batch, "prompt": length, "errors": {}, "ms a token": {}, "ms, 32 tokens": {}}
    for turn in range(2):  # the first warms up
        for side, how in sides.items():
            if side in row["errors"]:
                continue
            try:
                with how.entered(model):
                    run = generate(model, inputs, NEW_TOKENS)
                    if turn:
                        row["ms a token"][side] = statistics.median(run.step_ms[6:])
                        _wait(model)
                        start = time.perf_counter()
                        generate(model, inputs, SHORT)
                        _wait(model)
                        row["ms, 32 tokens"][side] = 1e3 * (time.perf_counter() - start)
            except (RuntimeError, AssertionError) as error:
                row["errors"][side] = f"{type(error).__name__}: {error}"[:300]
                release_memory(model.device)
    return row


def memory(model: Any, name: str) -> Row:
    """MiB allocated and reserved before and after ten calls of ten shapes, and after the patch is off."""
    shapes = [(1, 16), (2, 40), (3, 100), (5, 16), (8, 300), (12, 64), (16, 16), (24, 128), (32, 32), (7, 500)]
    release_memory(model.device)
    found = [_memory(model.device)]
    with captured(model):
        for batch, length in shapes:
            generate(model, prompts(model, batch, length), 24)
            torch.cuda.empty_cache()
            found.append(_memory(model.device))
    release_memory(model.device)
    return {"model": name, "shapes": shapes, "allocated, reserved MiB": found, "unpatched": _memory(model.device)}


def _memory(device: torch.device) -> tuple[float, float]:
    return torch.cuda.memory_allocated(device) / 2**20, torch.cuda.memory_reserved(device) / 2**20


def failures(device: torch.device) -> Row:
    """A capture that fails leaves the stream and the allocator as they were."""
    pool, x, found = Pool(device), torch.ones(1 << 20, device=device), {}

    def reads_host(x: torch.Tensor) -> Any:
        return x.sum().item()

    def runs_out(x: torch.Tensor) -> Any:
        return [torch.empty(1 << 34, device=device) for _ in range(64)]

    def adds(x: torch.Tensor) -> Any:
        return (x * 2).sum()

    def waits(x: torch.Tensor) -> Any:
        torch.cuda.synchronize()  # nothing that PyTorch could have warned of: CUDA refuses the capture
        return x.sum()

    before = _memory(device)
    for step in (reads_host, runs_out, adds, reads_host, adds, waits, adds, waits, adds):
        print(step.__name__, flush=True)
        try:
            one = Graph(pool, step, {"x": x})
            found[f"{len(found)} {step.__name__}"] = float(one.replay({"x": x * len(found)}))
            one.close()
        except RuntimeError as error:
            found[f"{len(found)} {step.__name__}"] = f"{type(error).__name__}: {error}"[:120]
    del one
    found["sampled after"] = torch.multinomial(torch.ones(8, device=device), 2).shape[0]
    y = torch.ones(1 << 24, device=device)  # the allocator serves, and takes back
    value = float(y.sum())
    del y
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return {"steps": found, "value": value, "memory before, after": (before, _memory(device))}


def host(model: Any, name: str) -> Row:
    """Microseconds of what is asked before each replay."""
    with qwen_fastdecode.patched(model):
        fingerprint = Fingerprint(model)
        return {"model": name, "fingerprint us": 1e6 * min(timeit.repeat(fingerprint.holds, number=50, repeat=5)) / 50}


def _wait(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="benchmarks/results/latest", help="folder for the JSON")
    parser.add_argument("--dry-run", action="store_true", help="tiny models on the CPU")
    parser.add_argument("--sections", default="failures,dense,experts,long", help="which, separated by commas")
    arguments = parser.parse_args()
    tiny = arguments.dry_run
    device = torch.device("cpu" if tiny else "cuda")
    notes = Notebook(arguments.out, "graph")

    wanted = arguments.sections.split(",")
    with torch.no_grad():
        if "failures" in wanted and not tiny:
            notes.note(failures(device))
        if {"dense", "long"} & {*wanted}:
            _run(dense(4 if tiny else 32, tiny), (1, 2) if tiny else (1, 128), device, wanted, notes.note)
        if "experts" in wanted:
            _run(experts(4 if tiny else 8, tiny), (1,) if tiny else (1, 32), device, ["experts"], notes.note)
    return 0 if all(map(right, notes.rows)) else 1


def right(row: Row) -> bool:
    """Whether nothing that the row says is a fault."""
    same = "equal to the bit" not in row or row["equal to the bit"] == row["steps"]
    return same and row.get("sampled tokens equal", True) and not row.get("errors")


def _run(shape: ModelShape, batches: tuple[int, ...], device: torch.device, wanted: Any, note: Any) -> None:
    model, name, tiny = build(shape, device, torch.bfloat16), shape.name, device.type == "cpu"
    if {"dense", "experts"} & {*wanted}:
        note(host(model, name))
        for batch in batches:
            note(same_bits(model, name, batch, BITS_STEPS))
        note(sampled(model, name))
        if not tiny:
            note(memory(model, name))
            for batch, length in ((1, 300), (8, 300), (8, 310)):
                note(noise(model, name, batch, length))
    if "long" in wanted:
        sides = {side: SIDES[side] for side in ("patched", "cuda_graph")}
        for batch, length in ((1, 100), (2, 40)) if tiny else ((1, 4096), (1, 32768), (8, 8192), (32, 2048)):
            note(speeds(model, name, sides, batch, length))
    del model
    release_memory(device)


if __name__ == "__main__":
    sys.exit(main())
