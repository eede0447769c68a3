"""`cuda_graph=True` on tensor-parallel ranks, a process a device: what they say, what they agree on, ms a token.

Run by gpu_tp.sh --graph. tp-graph.json: a row for each check and each time, written as soon as it is there, with what
each rank found. It ends by itself: after --seconds no more is begun, and 30 s later every rank prints where it is and
exits with 1. The last check leaves a rank waiting inside a graph, as that is what it is about, and ends the processes.
On the CPU (--dry-run, gloo) nothing is captured, and the rows say that.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import statistics
import sys
import tempfile
import threading
import time
import timeit
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import StoppingCriteriaList

import qwen_fastdecode
from benchmarks.checks.gpu_report import Notebook, machine
from benchmarks.graph_tables import ranks_table
from benchmarks.models.gpu_graph import same_bits
from benchmarks.models.gpu_models import ModelShape, build, dense
from benchmarks.ranks.disturbed import At, failing, moved, steps_of
from benchmarks.ranks.gpu_tp import join, load, prompt, shapes
from qwen_fastdecode import graph
from qwen_fastdecode.cli.compare.generation import generate
from qwen_fastdecode.graph.fingerprint import Fingerprint
from qwen_fastdecode.graph.together import Together, Verdict, ranks_of_model
from qwen_fastdecode.steps import ranks

STEPS, TINY_STEPS, BATCHES, MODES = 64, 12, (1, 8), ("on", "off")
FEW_BATCHES = (1, 4)
SPEED_BATCHES, ROUNDS = (1, 8, 32), 2
# Tokens of a timed call: an eager step of 32 layers takes a tenth of a second and more.
SIDES = {"unpatched": 10, "patched": 14, "captured": 48}
ALONE, WAIT = 1, 5.0  # the rank that does something alone; seconds that it waits for the others then
Row = dict[str, Any]


def text(model: Any, batch: int, steps: int, does: tuple[int, Callable[[], None]] | None = None) -> Tensor:
    """Greedy tokens [batch, steps] on the CPU; `does` (after so many of them, what) is done meanwhile."""
    ids = prompt(model, batch)
    criteria = [] if does is None else [At(ids.shape[1] + does[0], does[1])]
    length = {"max_new_tokens": steps, "min_new_tokens": steps}
    said = {"do_sample": False, "stopping_criteria": StoppingCriteriaList(criteria)}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **length, **said)[:, ids.shape[1] :].cpu()


def counted(model: Any) -> Row:
    """What was captured, and why not, since the counters began."""
    found, status = graph.describe(model), qwen_fastdecode.status(model)
    assert found is not None
    counts = {name: getattr(found, name) for name in ("captures", "compared", "replays", "worst", "norms", "reasons")}
    return {**counts, "details": found.details, "split steps": status.split_steps, "fast steps": status.fast_steps}


def captured(head_parallel: Any = "auto") -> Callable[[Any], AbstractContextManager[Any]]:
    """The patch with graphs."""
    return lambda model: qwen_fastdecode.patched(model, cuda_graph=True, head_parallel=head_parallel)


class Bench:
    """The rows of one run, of all ranks. Each check is made on every rank, and passes where it does on all."""

    def __init__(self, out: str, tiny: bool, deadline: float):
        self.tiny = tiny
        self.captures = not tiny  # whether there is anything to capture on
        self.steps = TINY_STEPS if tiny else STEPS
        self.out = out
        self.rank = dist.get_rank()
        self.deadline = deadline
        self.notebook = Notebook(out, "tp-graph") if self.rank == 0 else None
        self.talk = dist.new_group(backend="gloo")  # apart from what is measured
        self.passed = True

    def check(self, name: str, row: Callable[[], Row], **about: Any) -> None:
        """Notes what this is."""
        self.note({"check": name, **about}, row)

    def note(self, about: Row, row: Callable[[], Row]) -> None:
        """Notes every rank's row, which says whether it `passed`. An error is one that has not."""
        try:
            own = row()
        except (RuntimeError, AssertionError, ValueError) as error:
            own = {"passed": False, "error": f"{type(error).__name__}: {error}"[:600]}
        every: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(every, own, group=self.talk)
        passed = all(row.get("passed", True) for row in every)
        self.passed &= passed
        if self.notebook is not None:
            self.notebook.note({**about, "passed": passed, "ranks": every})

    def has_time(self) -> bool:
        """By rank 0's clock."""
        left = [time.monotonic() < self.deadline]
        dist.broadcast_object_list(left, src=0, group=self.talk)
        return bool(left[0])

    def replayed(self, model: Any, captures: int, after: int = 3) -> Row:
        """The counts, and whether they are those of a call that replays; on a CPU, of one that does not."""
        row = counted(model)
        expected = (captures, self.steps - after) if self.captures else (0, 0)
        passed = (row["captures"], row["replays"]) == expected and self.captures != bool(row["reasons"])
        return {**row, "passed": passed}


def tokens(bench: Bench, model: Any, batch: int, mode: str) -> Row:
    """float32: what eager steps say, from replays."""
    with qwen_fastdecode.patched(model, head_parallel=mode):
        expected = text(model, batch, bench.steps)
    with captured(mode)(model):
        found = text(model, batch, bench.steps)
        row = bench.replayed(model, 1)
    same = torch.equal(found, expected)
    split = row["split steps"] == (row["fast steps"] if mode == "on" else 0) and row["fast steps"] > 0
    return {**row, "same tokens": same, "passed": row["passed"] and same and split}


def grows(bench: Bench, model: Any, batch: int) -> Row:
    """The static layers fill up: all ranks capture again, at the same steps."""
    with qwen_fastdecode.patched(model):
        expected = text(model, batch, bench.steps)
    with steps_of(16), captured()(model):
        same = torch.equal(text(model, batch, bench.steps), expected)
        row = counted(model)
    return {
        **row,
        "same tokens": same,
        "passed": same and (row["captures"] > 1 and not row["reasons"]) == bench.captures,
    }


def one_fails(bench: Bench, model: Any) -> Row:
    """A rank runs out of memory while it records, and the next call is captured: nothing of the first is left."""
    with qwen_fastdecode.patched(model):
        expected = text(model, 2, bench.steps)
    with captured()(model):
        with failing(model, bench.rank == ALONE):
            first = text(model, 2, bench.steps)
        failed = counted(model)
        qwen_fastdecode.reset_counters(model)
        second = text(model, 2, bench.steps)
        row = bench.replayed(model, 1)
    reason = "the step could not be captured" if bench.rank == ALONE else "another rank of the model goes on eagerly"
    named = not bench.captures or [*failed["reasons"]] == [reason]
    same = torch.equal(first, expected) and torch.equal(second, expected)
    return {**row, "failed": failed, "same tokens": same, "passed": row["passed"] and same and named}


def one_refuses(bench: Bench, model: Any) -> Row:
    """A hook on one rank keeps all of them eager."""
    with qwen_fastdecode.patched(model):
        expected = text(model, 2, bench.steps)
    hook = model.lm_head.register_forward_hook(lambda *_: None) if bench.rank == ALONE else None
    with captured()(model):
        same = torch.equal(text(model, 2, bench.steps), expected)
        row = counted(model)
    if hook is not None:
        hook.remove()
    reason = "hooks on the model's modules" if hook is not None else "another rank of the model goes on eagerly"
    named = not bench.captures or [*row["reasons"]] == [reason]
    return {**row, "same tokens": same, "passed": same and named and row["captures"] == 0}


def all_move(bench: Bench, model: Any) -> Row:
    """Every rank moves a weight between the same two steps: they capture again."""
    with qwen_fastdecode.patched(model):
        expected = text(model, 2, bench.steps)
    with captured()(model):
        same = torch.equal(text(model, 2, bench.steps, (bench.steps // 2, lambda: moved(model))), expected)
        row = bench.replayed(model, 2, after=5)
    return {**row, "same tokens": same, "passed": row["passed"] and same}


def host(model: Any) -> Row:
    """Milliseconds of an agreement, and microseconds of what is asked before each replay."""
    together, times = Together(ranks_of_model(model)), []
    for i in range(20):
        start = time.perf_counter()
        together.agreed(f"measurement {i}", Verdict())
        times.append(1e3 * (time.perf_counter() - start))
    with qwen_fastdecode.patched(model):
        asked = min(timeit.repeat(Fingerprint(model).holds, number=50, repeat=5)) / 50
    return {"agreement ms": statistics.median(times), "fingerprint us": 1e6 * asked}


def bits(bench: Bench, model: Any, name: str, batch: int) -> Row:
    """bfloat16: logits of replays beside eager steps on a cache like theirs."""
    row = same_bits(model, name, batch, bench.steps)
    return {**row, "passed": row["equal to the bit"] == bench.steps}


def correctness(bench: Bench, shape: ModelShape, folder: Path) -> Any:
    """Everything in float32, then bits in bfloat16. Returns the float32 model."""
    model = load(folder, torch.float32)
    # From 8 sequences on experts keep grouped_mm, which may read the host for float32: these are left to bfloat16.
    has_experts = hasattr(shape.config, "num_experts")
    for batch in FEW_BATCHES if has_experts else BATCHES:
        for mode in MODES:
            about = {"model": shape.name, "batch": batch, "head_parallel": mode}
            bench.check("tokens", lambda batch=batch, mode=mode: tokens(bench, model, batch, mode), **about)
    half = load(folder, torch.bfloat16)
    for batch in BATCHES:
        bench.check("bits", lambda batch=batch: bits(bench, half, shape.name, batch), model=shape.name, batch=batch)
    return model


def contract(bench: Bench, model: Any, name: str) -> None:
    """What ranks agree on."""
    bench.check("layers grow", lambda: grows(bench, model, 8), model=name)
    bench.check("a rank refuses", lambda: one_refuses(bench, model), model=name)
    bench.check("all move a weight", lambda: all_move(bench, model), model=name)
    bench.check("on the host", lambda: {**host(model), "passed": True}, model=name)


def speeds(bench: Bench, shape: ModelShape, folder: Path, batches: tuple[int, ...]) -> None:
    """bfloat16: ms a token, the median step, of each side."""
    model = load(folder, torch.bfloat16)
    enter: dict[str, Callable[[Any], AbstractContextManager[Any]]] = {
        "unpatched": lambda model: nullcontext(),
        "patched": qwen_fastdecode.patched,
        "captured": captured(),
    }
    for batch in batches:
        ids = prompt(model, batch)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        for side in SIDES:
            if not bench.has_time():
                bench.passed = False
                return
            about = {"speed": side, "model": shape.name, "batch": batch}
            bench.note(about, lambda side=side, inputs=inputs: timed(bench, model, side, inputs, enter[side]))


def timed(bench: Bench, model: Any, side: str, inputs: Any, enter: Any) -> Row:
    """A side's row."""
    with enter(model):
        generate(model, inputs, 10)  # compiles and warms up
        runs = [generate(model, inputs, SIDES[side]).step_ms[4:] for _ in range(ROUNDS)]
        row: Row = {"ms": statistics.median(ms for run in runs for ms in run)}
        row["ms, each round"] = [*map(statistics.median, runs)]
        if side == "captured":
            row |= counted(model)
    return {**row, "passed": side != "captured" or (row["replays"] > 0) == bench.captures}


def one_moves(bench: Bench, model: Any) -> None:
    """A rank alone moves a weight: it raises RanksDisagree within the timeout, while the others wait inside the graph.
    Every process ends here."""
    store = dist.distributed_c10d._get_default_store()
    ranks.TIMEOUT = WAIT
    if bench.rank != ALONE:
        threading.Thread(target=_note_and_exit, args=(bench, store), daemon=True).start()
    start, said = time.monotonic(), "nothing"
    try:
        with captured("off")(model):  # which a rank can take off by itself
            text(model, 2, bench.steps, (bench.steps // 2, lambda: moved(model) if bench.rank == ALONE else None))
    except qwen_fastdecode.RanksDisagree as error:
        said = str(error)
    if bench.rank == ALONE:
        store.set("alone", json.dumps({"said": said, "after s": round(time.monotonic() - start, 1)}))
        _wait_for(store, "noted")
        _exit(bench)
    time.sleep(60)  # here if it was not waiting after all: the thread ends it


def _note_and_exit(bench: Bench, store: Any) -> None:
    _wait_for(store, "alone")
    row = json.loads(store.get("alone"))
    expected = "the place of a weight or buffer changed on rank 1" if bench.captures else "nothing"
    passed = row["said"].startswith(expected)
    bench.passed &= passed
    if bench.notebook is not None:
        bench.notebook.note({"check": "a rank alone moves a weight", **row, "passed": passed})
        print(report(bench.notebook.rows, bench.out), flush=True)
        store.set("noted", str(int(bench.passed)))
    _wait_for(store, "noted")
    _exit(bench)


def _wait_for(store: Any, key: str) -> None:
    """Asks again and again: a store's `wait` would keep this process's other thread from the store."""
    until = time.monotonic() + 90
    while not store.check([key]) and time.monotonic() < until:
        time.sleep(0.2)


def _exit(bench: Bench) -> None:
    """Without taking leave of the others, one of whom may wait for ever."""
    sys.stdout.flush()
    time.sleep(0.5)  # what was noted is read by all
    os._exit(0 if bench.passed else 1)


def report(rows: list[Row], out: str) -> str:
    """The rows as Markdown, which is written as well."""
    checks = [row for row in rows if "check" in row]
    passed = f"{sum(row['passed'] for row in checks)} of {len(checks)} checks passed."
    lines = ["; ".join(f"{name} {value}" for name, value in machine().items()), passed]
    lines += [f"- FAILED: {row}" for row in rows if not row["passed"]]
    lines += [ranks_table(rows)] * any("speed" in row for row in rows)
    said = "\n\n".join(["## Captured steps on tensor-parallel ranks", *lines]) + "\n"
    (Path(out) / "results.md").write_text(said)
    return said


def saved(bench: Bench, shape: ModelShape, dtype: torch.dtype, folder: str) -> Path:
    """Rank 0 builds and saves what all load: they are processes of one host."""
    path = [folder]
    if bench.rank == 0:
        model = build(shape, torch.device("cpu" if bench.tiny else "cuda"), dtype)
        model.save_pretrained(folder)
        del model
    dist.broadcast_object_list(path, src=0, group=bench.talk)
    return Path(path[0])


def run(out: str, tiny: bool, deadline: float, speed: bool) -> None:
    """Everything; it does not return on a run that is whole, see `one_moves`."""
    bench = Bench(out, tiny, deadline)
    with tempfile.TemporaryDirectory() as scratch:
        models = []
        for i, shape in enumerate(shapes(tiny)):
            folder = saved(bench, shape, torch.float32, f"{scratch}/{i}")
            models.append((correctness(bench, shape, folder), shape.name))
        contract(bench, *models[0])
        if speed and bench.has_time():
            whole = dense(4 if tiny else 32, tiny)
            whole.config.update({"num_key_value_heads": 2} if tiny else {})
            speeds(bench, whole, saved(bench, whole, torch.bfloat16, f"{scratch}/speed"), SPEED_BATCHES)
        model, name = models[0]  # the last two may leave a rank waiting
        bench.check("a rank fails to capture", lambda: one_fails(bench, model), model=name)
        if bench.notebook is not None:
            report(bench.notebook.rows, out)
    dist.barrier(bench.talk)  # rank 0 has removed the models: some seconds, which the others would not wait for
    one_moves(bench, model)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True, help="folder for tp-graph.json and results.md")
    parser.add_argument("--seconds", type=float, default=220, help="no new time after so long; 30 s more end the run")
    parser.add_argument("--dry-run", action="store_true", help="tiny models on the CPU")
    parser.add_argument("--no-speed", action="store_true", help="only whether everything is right")
    arguments = parser.parse_args()
    faulthandler.dump_traceback_later(arguments.seconds + 30, exit=True)
    deadline = time.monotonic() + arguments.seconds
    join(arguments.dry_run, seconds=100)
    with torch.no_grad():
        run(arguments.out, arguments.dry_run, deadline, not arguments.no_speed)
    return 1


if __name__ == "__main__":
    sys.exit(main())
