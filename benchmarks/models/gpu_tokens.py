"""float32: every side says what Transformers alone says, token by token. `gpu_generate` gives no speed without it.

tokens-MODEL.json: rows {model, side, batch, steps, equal, logits, right} or {model, side, batch, steps, error}.
flash-linear-attention multiplies prompts in TF32, and is held to logits instead. Where there are experts, one near-tie
between two of them weighs far more than that: routers then give what they gave Transformers alone. Rows that --out
holds already are kept and not made again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from benchmarks.checks.gpu_report import KeptRows
from benchmarks.models.gpu_models import MODELS, build
from benchmarks.models.sides import (
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
from qwen_fastdecode.cli.compare.generation import Batch, forced_logits, generate

LAYERS, PROMPT, STEPS, FORCED = 4, 16, 512, 32
TF32_LIMIT = 2e-2

Row = dict[str, Any]


def rows(model: Any, name: str, sides: dict[str, Side], steps: int, kept: KeptRows) -> Iterator[Row]:
    """Those that `kept` lacks. Sides that compile run at one batch: each costs a compilation."""
    for batch in (3, 1):
        todo = {side: how for side, how in sides.items() if kept.lacks(name, batch, side)}
        todo = {side: how for side, how in todo.items() if batch > 1 or not how.compiled}
        if not todo:
            continue
        inputs, choices = prompts(model, batch, PROMPT), Choices()
        with SIDES["eager"].entered(model):
            tokens = generate(model, inputs, steps).tokens
            with recorded_choices(model, choices):
                logits = logits_of(model, inputs)
        for side, how in todo.items():
            row = {"model": name, "side": side, "batch": batch, "steps": steps}
            try:
                with ExitStack() as stack:
                    stack.enter_context(how.entered(model))
                    equal = bool(torch.equal(generate(model, inputs, steps).tokens, tokens))
                    if how.fla:
                        stack.enter_context(replayed_choices(model, choices))
                    apart = distance(logits_of(model, inputs), logits)
                yield {**row, "equal": equal, "logits": apart, "right": apart < TF32_LIMIT if how.fla else equal}
            except (AssertionError, RuntimeError, TorchDynamoException) as error:
                yield {**row, "error": f"{type(error).__name__}: {error}"[:300]}
            release_memory(model.device)


def logits_of(model: Any, inputs: Batch) -> Tensor:
    """Over the same tokens on every side."""
    return forced_logits(model, inputs, forced_tokens(model, len(inputs["input_ids"]), FORCED))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--out", default="benchmarks/results/latest", help="folder for the JSON")
    parser.add_argument("--dry-run", action="store_true", help="a tiny model on the CPU")
    parser.add_argument("--sides", default="", help="some of them, separated by commas (default: all)")
    arguments = parser.parse_args()
    tiny = arguments.dry_run
    shape = MODELS[arguments.model](LAYERS, tiny)
    kept = KeptRows(arguments.out, f"tokens-{arguments.model}", lambda row: True)
    with torch.no_grad():
        model = build(shape, torch.device("cpu" if tiny else "cuda"), torch.float32)
        for row in rows(model, shape.name, chosen(arguments.sides, model), 24 if tiny else STEPS, kept):
            print(row, flush=True)
            kept.add(row)
    return 0 if all(row.get("right") for row in kept.rows) else 1


if __name__ == "__main__":
    sys.exit(main())
