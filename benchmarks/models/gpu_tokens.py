"""float32: every side says what Transformers alone says, token by token. `gpu_generate` gives no speed without it.

tokens-MODEL.json: rows {model, side, batch, steps, equal, right} or {model, side, batch, error}.
flash-linear-attention multiplies prompts in TF32, and is held to logits instead: {.., logits, right}.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch._dynamo.exc import TorchDynamoException

from benchmarks.checks.gpu_report import write_section
from benchmarks.models.gpu_models import MODELS, build
from benchmarks.models.sides import SIDES, Side, chosen, distance, forced_tokens, prompts
from benchmarks.op.gpu_layers import release_memory
from qwen_fastdecode.cli.compare.generation import forced_logits, generate

LAYERS, PROMPT, STEPS, FORCED = 4, 16, 512, 32
TF32_LIMIT = 2e-2

Row = dict[str, Any]


def rows(model: Any, name: str, sides: dict[str, Side], steps: int) -> Iterator[Row]:
    """Sides that compile run at one batch: each costs a compilation."""
    for batch in (3, 1):
        inputs, forced = prompts(model, batch, PROMPT), forced_tokens(model, batch, FORCED)
        with SIDES["eager"].entered(model):
            expected = generate(model, inputs, steps).tokens
            logits = forced_logits(model, inputs, forced)
        for side, how in sides.items():
            if how.compiled and batch == 1:
                continue
            row = {"model": name, "side": side, "batch": batch, "steps": steps}
            try:
                with how.entered(model):
                    equal = bool(torch.equal(generate(model, inputs, steps).tokens, expected))
                    apart = distance(forced_logits(model, inputs, forced), logits)
                yield {**row, "equal": equal, "logits": apart, "right": apart < TF32_LIMIT if how.fla else equal}
            except (AssertionError, RuntimeError, TorchDynamoException) as error:
                yield {**row, "error": f"{type(error).__name__}: {error}"[:300]}
            release_memory(model.device)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--out", default="benchmarks/results/latest", help="folder for the JSON")
    parser.add_argument("--dry-run", action="store_true", help="a tiny model on the CPU")
    parser.add_argument("--sides", default="", help="some of them, separated by commas (default: all)")
    arguments = parser.parse_args()
    tiny = arguments.dry_run
    shape = MODELS[arguments.model](LAYERS, tiny)
    found: list[Row] = []
    with torch.no_grad():
        model = build(shape, torch.device("cpu" if tiny else "cuda"), torch.float32)
        for row in rows(model, shape.name, chosen(arguments.sides, model), 24 if tiny else STEPS):
            print(row, flush=True)
            found.append(row)
            write_section(arguments.out, f"tokens-{arguments.model}", found)
    return 0 if all(row.get("right") for row in found) else 1


if __name__ == "__main__":
    sys.exit(main())
