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


def correctness(shape: ModelShape, folder: Path, batch: int) -> Iterator[Row]:
    """In float32: a chat of three turns gives the same tokens, and forced text the same logits, on every side."""
    model = load(folder, torch.float32)
    batch_of = {"input_ids": prompt(model, batch), "attention_mask": torch.ones_like(prompt(model, batch))}
    forced = prompt(model, batch, FORCED)
    expected = chat(model, batch), forced_logits(model, batch_of, forced)
    for name in SIDES[1:]:
        with side_of(name, model):
            tokens, logits = chat(model, batch), forced_logits(model, batch_of, forced)
            status = qwen_fastdecode.status(model)
        distance = ((logits - expected[1]).norm() / expected[1].norm()).item()
        same = (tokens == expected[0]).float().mean().item()
        row = {"model": shape.name, "side": name, "batch": batch, "logits": distance, "same_tokens": same}
        split = status.split_steps == (status.fast_steps if name == "on" else 0)
        yield {**row, "passed": distance <= LOGITS_LIMIT and same == 1.0 and split and status.fast_steps > 0}


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
    lines.append(f"Correctness, float32, three turns: {sum(row['passed'] for row in checks)} of {len(checks)} passed.")
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
    return "\n\n".join(["## Tensor parallel results", *lines, table(header, rows)]) + "\n"


def run(out: str, tiny: bool, deadline: float) -> bool:
    """Everything, written after every model by rank 0; False if something failed or was left out."""
    results: dict[str, list[Row]] = {"correctness": [], "speed": []}
    whole = True
    batches, new_tokens = (TINY_BATCHES, TINY_NEW_TOKENS) if tiny else (BATCHES, NEW_TOKENS)
    with tempfile.TemporaryDirectory() as scratch:
        for i, shape in enumerate(shapes(tiny)):
            # A rank saves what all load: they are processes of one host.
            folder = Path(_of_rank_0(f"{scratch}/{i}"))
            if dist.get_rank() == 0:
                build(shape, torch.device("cpu" if tiny else "cuda"), torch.float32).save_pretrained(folder)
            dist.barrier()
            rows = list(correctness(shape, folder, 2))
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
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.seconds
    if arguments.dry_run:
        dist.init_process_group("gloo")
    else:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl", device_id=torch.device("cuda", int(os.environ["LOCAL_RANK"])))
    try:
        with torch.no_grad():
            return 0 if run(arguments.out, arguments.dry_run, deadline) else 1
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
