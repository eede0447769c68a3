"""One process, a model over several GPUs (`device_map="auto"`): in float32 it says what one GPU says, on every side.

Run by gpu_tp.sh. map.json: rows {model, side, devices, logits, same_tokens, passed}. With `cuda_graph=True` such a
model stays eager, and says so.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import qwen_fastdecode
from benchmarks.checks.gpu_report import write_section
from benchmarks.models.gpu_models import ModelShape, build
from benchmarks.op.gpu_layers import release_memory
from benchmarks.ranks.gpu_tp import Row, compared, said, shapes
from qwen_fastdecode.graph.reasons import Eager
from qwen_fastdecode.report import PREFILL

BATCH = 2
CUDA_GRAPH = "cuda_graph=True"
SIDES: dict[str, dict[str, Any] | None] = {"unpatched": None, "patched": {}, CUDA_GRAPH: {"cuda_graph": True}}


def rows(shape: ModelShape, device: torch.device) -> Iterator[Row]:
    """A row a side. On a CPU there is but one device."""
    with tempfile.TemporaryDirectory() as folder:
        model = build(shape, device, torch.float32)
        expected = said(model, BATCH)
        model.save_pretrained(folder)
        del model
        release_memory(device)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="auto").eval()
    for name, patch in SIDES.items():
        with nullcontext() if patch is None else qwen_fastdecode.patched(model, **patch):
            row = compared(said(model, BATCH), expected)
            status = qwen_fastdecode.status(model)
        devices = sorted({str(model.get_submodule(layer.name).A_log.device) for layer in status.layers})
        spread = len(devices) > 1 or device.type == "cpu"
        served = patch is None or ({*status.fallbacks} <= {PREFILL} and all(x.fast_steps for x in status.layers))
        reason = Eager.SEVERAL_DEVICES if device.type == "cuda" else Eager.NOT_ON_GPU
        refused = name != CUDA_GRAPH or was_refused(status, reason)
        passed = row["passed"] and spread and served and refused
        yield {"model": shape.name, "side": name, "devices": devices, **row, "passed": passed}


def was_refused(status: qwen_fastdecode.Status, reason: Eager) -> bool:
    """Whether nothing was captured, for this reason."""
    graphs = status.graphs
    return graphs is not None and not graphs.captures and str(reason) in graphs.reasons


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder for map.json")
    parser.add_argument("--dry-run", action="store_true", help="tiny models on the CPU")
    arguments = parser.parse_args()
    found: list[Row] = []
    with torch.no_grad():
        for shape in shapes(arguments.dry_run):
            for row in rows(shape, torch.device("cpu" if arguments.dry_run else "cuda")):
                print(row, flush=True)
                found.append(row)
                write_section(arguments.out, "map", found)
    return 0 if all(row["passed"] for row in found) else 1


if __name__ == "__main__":
    sys.exit(main())
