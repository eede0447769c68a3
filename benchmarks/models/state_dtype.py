"""What bfloat16 recurrent states cost in quality: `python -m benchmarks.models.state_dtype --out FILE`, on the CPU.

The shipped checkpoints decode a text that is given on float32 states, on bfloat16 ones, and on bfloat16 ones that are
written every 8th step (`deferred_state=True`, by PyTorch's ring: a CPU is not sent there); and the op runs on random
inputs for many steps beside the float64 reference, in each of these ways.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from collections.abc import Iterator
from contextlib import contextmanager
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
from qwen_fastdecode.ops.deferral import Deferral
from qwen_fastdecode.ops.reference import decode_reference
from qwen_fastdecode.ops.ring import Ring, decode_deferred_torch, new_ring, settle
from qwen_fastdecode.ops.step import Recipe, Step
from qwen_fastdecode.steps import deferred

CHECKPOINTS = Path(__file__).parent.parent.parent / "examples" / "checkpoints"
PROMPT, FORCED, STRETCHES = 16, 512, 8
HK, HV, D = 16, 32, 128
MEMORIES = (4, 64, 1024, 10**9)  # steps after which a state has decayed to 1/e
STEPS = 1024
MEASURED = (1, 4, 16, 64, 256, 1024)
N = 8  # of the ring, as bfloat16 states have it
WAYS = {"float32": (torch.float32, False), "bfloat16": (torch.bfloat16, False), "deferred": (torch.bfloat16, True)}


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
    for way, (dtype, defer) in WAYS.items():
        with by_pytorchs_ring(), qwen_fastdecode.patched(model, state_dtype=dtype, deferred_state=defer):
            logits[way] = forced_logits(model, batch, forced)
            status = qwen_fastdecode.status(model)
        steps = (FORCED - 1) * len(status.layers)
        assert status.fast_steps == steps, f"not every step was served fast:\n{status}"
        assert status.deferred_steps == defer * steps, f"not every step was deferred:\n{status}"
    wide, narrow, waits = (logits[way] for way in WAYS)
    targets = forced[:, 1:]
    return {"checkpoint": name, **distance(wide, narrow, targets), "deferred": distance(wide, waits, targets)}


@contextmanager
def by_pytorchs_ring() -> Iterator[None]:
    """States are deferred on the CPU as well, from one sequence on."""
    own, found = deferred.deferral, Deferral(N, 1, decode_deferred_torch, settle, lambda device: 0)
    deferred.deferral = lambda backend, state: found  # type: ignore[assignment]
    try:
        yield
    finally:
        deferred.deferral = own


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
    dtypes = {"float64": torch.float64, **{way: dtype for way, (dtype, _) in WAYS.items()}}
    states = {way: torch.zeros(1, HV, D, D, dtype=dtype) for way, dtype in dtypes.items()}
    taps = {way: torch.zeros(1, C, 4) for way in states}
    ring = new_ring(states["deferred"], HK, N)
    errors: dict[str, dict[int, float]] = {way: {} for way in WAYS}
    for step in track(range(1, STEPS + 1), f"memory {memory}"):
        q, k, v, z = random(1, HK, D), random(1, HK, D), random(1, HK, HV // HK, D), random(1, HK, HV // HK, D)
        views = q, k, v, z, random(1, HK, HV // HK), torch.zeros(1, HK, HV // HK)
        recipe = Recipe((0, HV))
        for way, state in states.items():
            own = Step.from_tensors((*views, taps[way], state, *weights))
            if way == "float64":
                decode_reference(own, recipe)
            elif way == "deferred":
                decode_deferred_torch(own, recipe, ring)
            else:
                gated_delta_decode(*own.tensors, backend="torch")
        if step in MEASURED:
            exact = states["float64"]
            for way in WAYS:
                error = (settled(states[way], ring, way).double() - exact).norm() / exact.norm()
                errors[way][step] = error.item()
    return {"memory": memory, **errors}


def settled(state: Tensor, ring: Ring, way: str) -> Tensor:
    """A copy of the state with what waits, which goes on waiting."""
    state = state.clone()
    if way == "deferred":
        settle(state, Ring(*(part.clone() for part in ring)))
    return state


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
