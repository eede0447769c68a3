"""Tensor-parallel decoding, a process a device: unpatched, patched with every head on every rank, and with heads split.

Run by gpu_tp.sh. Models have random weights of real shapes and few layers, and a vocabulary and number of experts cut
down, which the patch does not touch; a rank saves them and every rank loads its shards, as users do.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

import qwen_fastdecode
from benchmarks.checks.gpu_report import machine, write_section
from benchmarks.markdown import table
from benchmarks.models.gpu_models import ModelShape, build, dense, experts
from benchmarks.ranks.tp_counts import of_a_layer
from qwen_fastdecode.cli.compare.generation import forced_logits, generate

SIDES = ("unpatched", "off", "on")
BATCHES, TINY_BATCHES = (1, 32, 256), (2,)
PROMPT, NEW_TOKENS, TINY_NEW_TOKENS, ROUNDS, FORCED = 16, 32, 4, 2, 5
# float32 sums in another order, over a few layers; a head that is wrong or stale changes the logits altogether.
LOGITS_LIMIT = 1e-3
Row = dict[str, Any]


def shapes(tiny: bool) -> tuple[ModelShape, ...]:
    """4B Qwen3.5, eight layers of 32; Qwen3-Next 80B-A3B, four layers of 48 with 32 experts of 512."""
    small = {"vocab_size": 256 if tiny else 32768}
    found = dense(4 if tiny else 8, tiny), experts(4, tiny)
    for shape in found:
        shape.config.update({**small, "num_key_value_heads": 2, "num_attention_heads": 4 if tiny else 16})
        shape.config.update({"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None})
    if not tiny:
        found[1].config.update({"num_experts": 32})
    return found


def side_of(name: str, model: Any) -> AbstractContextManager[Any]:
    """The patch with this head_parallel, or nothing."""
    return nullcontext() if name == "unpatched" else qwen_fastdecode.patched(model, head_parallel=name)


def join(tiny: bool, seconds: float = 600) -> None:
    """This process becomes a rank: by NCCL on a GPU of its own, or by gloo on the CPU. Collectives wait so long."""
    if tiny:
        dist.init_process_group("gloo")
        return
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device, timeout=timedelta(seconds=seconds))


def load(folder: Path, dtype: torch.dtype) -> Any:
    """This rank's shards."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, tp_plan="auto").eval()


def prompt(model: Any, batch: int, length: int = PROMPT) -> Tensor:
    """The same tokens on every rank."""
    generator = torch.Generator().manual_seed(batch)
    return torch.randint(1, model.config.vocab_size, (batch, length), generator=generator).to(model.device)


def chat(model: Any, batch: int, turns: int = 3, new_tokens: int = 6) -> Tensor:
    """Several turns on one cache, each with a prefill on top of what was decoded before."""
    cache, text = DynamicCache(config=model.config), prompt(model, batch)
    for turn in range(turns):
        said = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
        text = model.generate(text, attention_mask=torch.ones_like(text), past_key_values=cache, **said)
        text = torch.cat([text, prompt(model, batch, 3 + turn)], dim=1)
    return text


def said(model: Any, batch: int) -> tuple[Tensor, Tensor]:
    """What every side has to say: the tokens of a chat of three turns, and the logits of a forced text; on the CPU."""
    ids = prompt(model, batch)
    logits = forced_logits(
        model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, prompt(model, batch, FORCED)
    )
    return chat(model, batch).cpu(), logits.cpu()


def compared(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> Row:
    """How far two of these are apart, and whether that is right."""
    distance = ((found[1] - expected[1]).norm() / expected[1].norm()).item()
    same = (found[0] == expected[0]).float().mean().item()
    return {"logits": distance, "same_tokens": same, "passed": distance <= LOGITS_LIMIT and same == 1.0}


def correctness(shape: ModelShape, folder: Path, batch: int, expected: tuple[Tensor, Tensor]) -> Iterator[Row]:
    """In float32: what one process says, on every side."""
    model = load(folder, torch.float32)
    for name in SIDES:
        with side_of(name, model):
            row = {"model": shape.name, "side": name, "batch": batch, **compared(said(model, batch), expected)}
            status = qwen_fastdecode.status(model)
        served = status.fast_steps > 0 or name == "unpatched"
        split = status.split_steps == (status.fast_steps if name == "on" else 0)
        yield {**row, "passed": row["passed"] and served and split}


def speeds(shape: ModelShape, folder: Path, batches: tuple[int, ...], new_tokens: int) -> Iterator[Row]:
    """Decode ms per token in bfloat16, the median step; collectives and bytes of one gated DeltaNet layer."""
    model = load(folder, torch.bfloat16)
    for batch in batches:
        ids = prompt(model, batch)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        for name in SIDES:
            with side_of(name, model):
                generate(model, inputs, 4)  # compiles and warms up
                runs = [generate(model, inputs, new_tokens) for _ in range(ROUNDS)]
                seen = of_a_layer(model, batch)
            ms = statistics.median(step for run in runs for step in run.step_ms[2:])
            row = {"model": shape.name, "batch": batch, "side": name, "ms": ms}
            yield {**row, "collectives": seen.count, "bytes": seen.bytes}


def markdown(results: dict[str, list[Row]]) -> str:
    """What holds, then the times."""
    lines = ["; ".join(f"{name} {value}" for name, value in machine().items()), f"{dist.get_world_size()} ranks."]
    checks = results["correctness"]
    passed = f"{sum(row['passed'] for row in checks)} of {len(checks)} passed"
    lines.append(f"Correctness, float32, three turns, against one process: {passed}.")
    lines += [f"- FAILED: {row}" for row in checks if not row["passed"]]
    header = (
        "model",
        "batch",
        "side",
        "decode ms per token",
        "against unpatched",
        "collectives a layer",
        "bytes a layer",
    )
    before = {(row["model"], row["batch"]): row["ms"] for row in results["speed"] if row["side"] == "unpatched"}
    rows = []
    for row in results["speed"]:
        ratio = f"{before[row['model'], row['batch']] / row['ms']:.2f}x"
        columns = (row["model"], row["batch"], row["side"], f"{row['ms']:.2f}", ratio, row["collectives"], row["bytes"])
        rows.append(tuple(map(str, columns)))
    speeds = [table(header, rows)] if rows else []
    return "\n\n".join(["## Tensor parallel results", *lines, *speeds]) + "\n"


def run(out: str, tiny: bool, deadline: float, speed: bool) -> bool:
    """Everything, written after every model by rank 0; False if something failed or was left out."""
    results: dict[str, list[Row]] = {"correctness": [], "speed": []}
    whole = True
    batches, new_tokens = (TINY_BATCHES, TINY_NEW_TOKENS) if tiny else (BATCHES, NEW_TOKENS)
    if not speed:
        batches = ()
    with tempfile.TemporaryDirectory() as scratch:
        for i, shape in enumerate(shapes(tiny)):
            # A rank saves what all load: they are processes of one host.
            folder = Path(_of_rank_0(f"{scratch}/{i}"))
            alone = None
            if dist.get_rank() == 0:
                model = build(shape, torch.device("cpu" if tiny else "cuda"), torch.float32)
                alone = said(model, 2)
                model.save_pretrained(folder)
                del model
            rows = list(correctness(shape, folder, 2, _of_rank_0(alone)))
            passed = all(row["passed"] for row in rows)
            results["correctness"] += rows
            whole &= passed
            for row in _until(deadline, speeds(shape, folder, batches, new_tokens) if passed else iter(())):
                results["speed"].append(row)
            whole &= sum(row["model"] == shape.name for row in results["speed"]) == len(SIDES) * len(batches)
            if dist.get_rank() == 0:
                write_section(out, "tp", results)
                (Path(out) / "results.md").write_text(markdown(results))
            dist.barrier()
    return whole


def _until(deadline: float, rows: Iterator[Row]) -> Iterator[Row]:
    """Rows until rank 0's clock says that there is no time for more."""
    for row in rows:
        yield row
        if not _of_rank_0(time.monotonic() < deadline):
            return


def _of_rank_0(value: Any) -> Any:
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True, help="folder for tp.json and results.md")
    parser.add_argument("--seconds", type=float, default=490, help="no new row after so long")
    parser.add_argument("--dry-run", action="store_true", help="tiny models on the CPU")
    parser.add_argument("--no-speed", action="store_true", help="only whether every side is right")
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.seconds
    join(arguments.dry_run)
    try:
        with torch.no_grad():
            return 0 if run(arguments.out, arguments.dry_run, deadline, not arguments.no_speed) else 1
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
