"""Ways of running a patched model that need a GPU: CUDA graphs, captured by hand and by torch.compile; bitsandbytes."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, StaticCache

import qwen_fastdecode
from benchmarks.checks.gpu_report import progress, write_section
from benchmarks.models.gpu_models import build, dense

BATCH, PROMPT, NEW, LAYERS = 2, 8, 16, 4  # three of the layers are gated DeltaNet
LINEAR = 3
Step = Callable[[Tensor], Tensor]  # token [B, 1] -> logits [B, 1, vocabulary]
Row = dict[str, Any]


def decode(model: PreTrainedModel, make_step: Callable[[Step], Step]) -> Tensor:
    """Greedy tokens [B, NEW] by the step that `make_step` makes of an eager one, after an eager prefill."""
    device = model.device
    torch.manual_seed(1)
    prompt = torch.randint(1, model.config.vocab_size, (BATCH, PROMPT)).to(device)
    cache = StaticCache(config=model.config, max_cache_len=PROMPT + NEW)
    token = model(prompt, past_key_values=cache).logits[:, -1:].argmax(-1)
    step = make_step(lambda token: model(token, past_key_values=cache).logits)
    tokens = []
    for _ in range(NEW):
        tokens.append(token)
        token = step(token)[:, -1:].argmax(-1)
    return torch.cat(tokens, dim=1)


def captured(step: Step) -> Step:
    """The step as a CUDA graph: captured at the first call, whose work its one replay then does."""
    held: dict[str, Any] = {}

    def replay(token: Tensor) -> Tensor:
        if not held:
            held["token"], held["graph"] = token.clone(), torch.cuda.CUDAGraph()
            with torch.cuda.graph(held["graph"]):
                held["logits"] = step(held["token"])
        held["token"].copy_(token)
        held["graph"].replay()
        return held["logits"]

    return replay


def eager_then(make_step: Callable[[Step], Step]) -> Callable[[Step], Step]:
    """`make_step`, used from the second token on: kernels are compiled and loaded by the first, in eager mode."""

    def make(step: Step) -> Step:
        made, steps = make_step(step), iter([step])

        def run(token: Tensor) -> Tensor:
            return next(steps, made)(token)

        return run

    return make


def check_graphs(name: str, make_step: Callable[[Step], Step], device: torch.device) -> Row:
    """Tokens of patched graphs against patched and unpatched eager steps; float32, so they are equal."""
    model = build(dense(LAYERS, tiny=True), device, torch.float32)
    upstream = decode(model, lambda step: step)
    with qwen_fastdecode.patched(model):
        eager = decode(model, lambda step: step)
        counted = qwen_fastdecode.status(model).fast_steps
        graphed = decode(model, eager_then(make_step))
        in_graphs = qwen_fastdecode.status(model).fast_steps - counted
    return {
        "check": name,
        "fast_steps": counted,
        "expected_steps": NEW * LINEAR,
        "counted_with_graphs": in_graphs,  # the eager first step, and the capture where it runs our Python
        "tokens_equal": torch.equal(graphed, eager) and torch.equal(eager, upstream),
    }


def quantise(model: PreTrainedModel, bits: int, device: torch.device) -> None:
    """bitsandbytes linears in place of the projections of every gated DeltaNet layer, with their weights."""
    import bitsandbytes

    for layer in [module for module in model.modules() if type(module).__name__.endswith("GatedDeltaNet")]:
        for name, part in list(layer.named_children()):
            if isinstance(part, nn.Linear):
                sizes = part.in_features, part.out_features
                if bits == 8:
                    new = bitsandbytes.nn.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False)
                else:
                    new = bitsandbytes.nn.Linear4bit(*sizes, bias=False, compute_dtype=torch.float32)
                new.load_state_dict({"weight": part.weight.detach().cpu()})
                setattr(layer, name, new.to(device))


def check_bitsandbytes(bits: int, device: torch.device) -> Row:
    """Tokens of a patched model of quantised projections against the same model unpatched."""
    model = build(dense(LAYERS, tiny=True), device, torch.float32)
    quantise(model, bits, device)
    upstream = decode(model, lambda step: step)
    with qwen_fastdecode.patched(model):
        tokens = decode(model, lambda step: step)
        counted = qwen_fastdecode.status(model).fast_steps
    return {
        "check": f"bitsandbytes, {bits} bits",
        "fast_steps": counted,
        "expected_steps": NEW * LINEAR,
        "tokens_equal": torch.equal(tokens, upstream),
    }


def checks(device: torch.device) -> dict[str, Callable[[], Row]]:
    """Every check by name; on a CPU, where there are no CUDA graphs, the graphs are what torch.compile makes there."""
    on_gpu = device.type == "cuda"
    compiled = partial(
        torch.compile, mode="reduce-overhead" if on_gpu else None, backend="inductor" if on_gpu else "eager"
    )
    found: dict[str, Callable[[], Row]] = {
        "reduce-overhead": partial(check_graphs, "reduce-overhead", compiled, device)
    }
    if on_gpu:
        found["captured graph"] = partial(check_graphs, "captured graph", captured, device)
    if on_gpu and importlib.util.find_spec("bitsandbytes"):
        found |= {f"bitsandbytes {bits}": partial(check_bitsandbytes, bits, device) for bits in (8, 4)}
    return found


def attempt(name: str, check: Callable[[], Row]) -> Row:
    """The check's row with its verdict, or what stopped it."""
    torch._dynamo.reset()
    try:
        row = check()
    except (AssertionError, NotImplementedError, RuntimeError, ValueError) as error:
        return {"check": name, "passed": False, "error": f"{type(error).__name__}: {error}"[:500]}
    return {**row, "passed": row["tokens_equal"] and row["fast_steps"] == row["expected_steps"]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="benchmarks/results/latest", help="folder for the JSON")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, what of it runs there")
    arguments = parser.parse_args()
    device = torch.device("cpu" if arguments.dry_run else "cuda")
    todo, rows = checks(device), []
    with torch.no_grad():
        for name in progress(todo, "ways", len(todo)):
            rows.append(attempt(name, todo[name]))
            write_section(arguments.out, "ways", rows)
            print(rows[-1])
    return 0 if all(row["passed"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
