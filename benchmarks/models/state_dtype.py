"""What bfloat16 recurrent states cost in quality: `python -m benchmarks.models.state_dtype --out FILE`, on the CPU.

The shipped checkpoints decode a text that is given, once on float32 states and once on bfloat16 ones; and the op runs
on random inputs for many steps beside the float64 reference.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.progress import track
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import qwen_fastdecode
from qwen_fastdecode.cli.compare.generation import forced_logits
from qwen_fastdecode.ops import gated_delta_decode
from qwen_fastdecode.ops.reference import decode_reference
from qwen_fastdecode.ops.step import Recipe, Step

CHECKPOINTS = Path(__file__).parent.parent.parent / "examples" / "checkpoints"
PROMPT, FORCED, STRETCHES = 16, 512, 8
HK, HV, D = 16, 32, 128
MEMORIES = (4, 64, 1024, 10**9)  # steps after which a state has decayed to 1/e
STEPS = 1024
MEASURED = (1, 4, 16, 64, 256, 1024)


def checkpoint_rows(name: str) -> dict[str, Any]:
    """Both dtypes on the same forced text: the first logits that differ are those after the first forced token."""
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINTS / name, dtype=torch.float32).eval()
    text = (CHECKPOINTS / name / "held_out.txt").read_text(encoding="utf-8")
    tokens = AutoTokenizer.from_pretrained(CHECKPOINTS / name)(text, verbose=False)["input_ids"]
    length = PROMPT + FORCED
    windows = torch.tensor(tokens[: STRETCHES * length]).view(STRETCHES, length)
    prompts, forced = windows[:, :PROMPT], windows[:, PROMPT:]
    batch = {"input_ids": prompts, "attention_mask": torch.ones_like(prompts)}
    logits = {}
    for dtype in (torch.float32, torch.bfloat16):
        with qwen_fastdecode.patched(model, state_dtype=dtype):
            logits[dtype] = forced_logits(model, batch, forced)
            status = qwen_fastdecode.status(model)
        assert status.fast_steps == (FORCED - 1) * len(status.layers), f"not every step was served fast:\n{status}"
    return {"checkpoint": name, **distance(logits[torch.float32], logits[torch.bfloat16], forced[:, 1:])}


def distance(wide: Tensor, narrow: Tensor, targets: Tensor) -> dict[str, Any]:
    """Of logits [B, T, vocabulary] that predict targets [B, T]."""
    losses = [
        torch.nn.functional.cross_entropy(x.transpose(1, 2).double(), targets, reduction="none") for x in (wide, narrow)
    ]
    difference = losses[1] - losses[0]  # [B, T]
    agree = (wide.argmax(-1) == narrow.argmax(-1)).double()
    half = targets.shape[1] // 2
    return {
        "tokens": targets.numel(),
        "nll float32": losses[0].mean().item(),
        "nll bfloat16 minus float32": difference.mean().item(),
        "its standard error": (difference.std() / math.sqrt(difference.numel())).item(),
        "nll difference, second half": difference[:, half:].mean().item(),
        "largest of a token": difference.abs().max().item(),
        "greedy tokens that agree": agree.mean().item(),
        "greedy, second half": agree[:, half:].mean().item(),
        "logits, relative rms": ((narrow - wide).norm() / wide.norm()).item(),
    }


def growth_row(memory: int) -> dict[str, Any]:
    """Relative RMS error of the state against float64 on random inputs; the same decay at every step."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    C = 2 * HK * D + HV * D
    softplus_of_zero = math.log(2)
    A_log = torch.full((HV,), math.log(1 / memory / softplus_of_zero))
    weights = random(C, 4), A_log, torch.zeros(HV), torch.ones(D)
    states = {dtype: torch.zeros(1, HV, D, D, dtype=dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16)}
    taps = {dtype: torch.zeros(1, C, 4) for dtype in states}
    errors: dict[str, dict[int, float]] = {"float32": {}, "bfloat16": {}}
    for step in track(range(1, STEPS + 1), f"memory {memory}"):
        q, k, v, z = random(1, HK, D), random(1, HK, D), random(1, HK, HV // HK, D), random(1, HK, HV // HK, D)
        views = q, k, v, z, random(1, HK, HV // HK), torch.zeros(1, HK, HV // HK)
        recipe = Recipe((0, HV))
        for dtype, state in states.items():
            if dtype == torch.float64:
                decode_reference(Step.from_tensors((*views, taps[dtype], state, *weights)), recipe)
            else:
                gated_delta_decode(*views, taps[dtype], state, *weights, backend="torch")
        if step in MEASURED:
            exact = states[torch.float64]
            for dtype in (torch.float32, torch.bfloat16):
                error = (states[dtype].double() - exact).norm() / exact.norm()
                errors[str(dtype).removeprefix("torch.")][step] = error.item()
    return {"memory": memory, **errors}


def main() -> None:
    """Prints what was measured and writes it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", metavar="FILE", type=Path, help="JSON")
    out = parser.parse_args().out
    results = {
        "machine": {"torch": torch.__version__, "transformers": transformers.__version__, "cpu": platform.machine()},
        "checkpoints": [checkpoint_rows(name) for name in ("qwen3_next-tiny", "qwen3_5-tiny")],
        "growth": [growth_row(memory) for memory in MEMORIES],
    }
    text = json.dumps(results, indent=1)
    print(text)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
