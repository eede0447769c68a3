"""The comparison itself: the text first; then, only if it is right, the speed, in alternating runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import get_max_memory
from torch import Tensor

from qwen_fastdecode.upstream.families import FAMILIES

from ..machine import cpu_name, device_name, versions
from . import beside as beside_them
from .generation import Batch, encode, generate
from .layerwise import can_be_widened
from .parity import Float32Distance, GreedyAgreement, LogitsDistance, Parity, differing_texts
from .result import (
    COMPILED,
    CUDA_GRAPH,
    PATCHED,
    UPSTREAM,
    Beside,
    Comparison,
    Sample,
    Service,
    Setup,
    Side,
    Speed,
    Start,
)
from .sides import Settings, Sides, told
from .upstream import upstream_kernels

ROOM = 2.0  # times the bytes of the weights in float32: what making that copy, and running it, may take


def compare(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    settings: Settings,
    on_run: Callable[[str], None] = lambda what: None,
) -> Comparison:
    """Compares the unpatched `model` with itself, patched, on `prompts`, which are decoded as one batch.

    Args:
        model: a causal language model with gated DeltaNet layers, in eval mode, unpatched.
        tokenizer: the model's.
        prompts: one a sequence.
        settings: how much is generated.
        on_run: called at most `total_runs(model, settings)` times, with what is about to run.

    Raises:
        PatchError: the model cannot be patched.
        BadInput: a prompt has no tokens.
    """
    batch = encode(tokenizer, prompts, model.device)
    sides = Sides(model, batch, settings, on_run)
    setup, layers = describe(model, batch, settings)
    missing = beside_them.missing(model, settings.beside)
    running = [side for side, why in missing.items() if not why]
    beside = {side: Beside(missing=why) for side, why in missing.items() if why}
    starts = _starts(sides, running)

    upstream, patched = sides.both("greedy text", sides.generate)  # also warms both sides up
    texts = [(upstream.tokens, patched.tokens)]
    greedy = GreedyAgreement.between(texts, prompts)
    logits = sides.logits(upstream.tokens, layers)
    wide, float32, absent = _float32(sides, prompts, texts[0], logits[:2])
    distances = logits[2], LogitsDistance.between(*logits[:2])
    parity = Parity(setup.dtype, *distances, greedy, float32, absent, settings.state_dtype)
    sample = _sample(tokenizer, prompts, greedy.first_prompt or 0, *texts[0], wide)
    apart = max(distances[1].relative_rms, parity.max_layer_distance)
    judge = beside_them.Judge(prompts, parity.exact, upstream.tokens, logits[0], apart)
    if CUDA_GRAPH in running and not parity.failures:
        beside[CUDA_GRAPH] = beside_them.captured(sides, judge)
    result = Comparison(setup, parity, None, sample, beside, starts)
    if result.failures:
        return result

    result = _timed(sides, prompts, texts, result)
    if COMPILED in running and not result.failures:
        compiled, start = beside_them.run_compiled(sides, judge)
        starts = starts if start is None else {**starts, COMPILED: start}
        result = replace(result, beside={**result.beside, COMPILED: compiled}, starts=starts)
    return result


def _starts(sides: Sides, running: Sequence[str]) -> dict[str, Start]:
    """Of each side that compiles nothing, where something is compared beside the two."""
    if not running:
        return {}
    with told("first call", UPSTREAM):
        generate(sides.model, sides.batch, 4)  # what every program pays: the device and its libraries
    return {
        side: sides.start(side) for side in (UPSTREAM, PATCHED, CUDA_GRAPH) if side != CUDA_GRAPH or side in running
    }


def _timed(sides: Sides, prompts: Sequence[str], texts: list[tuple[Tensor, Tensor]], result: Comparison) -> Comparison:
    """The result with its speeds. The sides take turns, in an order that turns as well."""
    memory = sides.both("memory", sides.step_bytes)
    graph = result.beside.get(CUDA_GRAPH, Beside(missing="not asked for"))
    turns = [UPSTREAM, PATCHED, *([] if graph.missing else [CUDA_GRAPH])]
    timed = [
        sides.each(f"run {i + 1}", turns[::-1] if i % 2 else turns, sides.timed_run)
        for i in range(sides.settings.repeat)
    ]
    runs = [(found[UPSTREAM][0], found[PATCHED][0]) for found in timed]
    texts = [*texts, *((before.tokens, after.tokens) for before, after in runs)]  # what was timed must be right as well
    parity = replace(result.parity, greedy=GreedyAgreement.between(texts, prompts))
    beside = result.beside
    if CUDA_GRAPH in turns:
        replayed = [found[CUDA_GRAPH][0] for found in timed]
        agreement = GreedyAgreement.between([(texts[0][0], run.tokens) for run in replayed], prompts)
        wrong = differing_texts(agreement) if parity.exact else []
        beside = {**beside, CUDA_GRAPH: replace(graph, greedy=agreement, failures=wrong, speed=Side.of(replayed, None))}
    served = sum((found[PATCHED][1] for found in timed), Service())
    result = replace(result, parity=parity, beside=beside)
    return result if result.failures else replace(result, speed=Speed.of(runs, memory, served))


def _float32(
    sides: Sides, prompts: Sequence[str], texts: tuple[Tensor, Tensor], logits: tuple[Tensor, Tensor]
) -> tuple[Tensor | None, Float32Distance | None, str]:
    """The greedy text of float32 and both sides' distance from it, or why it was not taken."""
    if sides.model.dtype == torch.float32:
        return None, None, ""
    missing = no_float32(sides.model)
    if missing:
        return None, None, missing
    text, exact = sides.float32(texts[0])
    upstream, patched = (LogitsDistance.between(exact, side.to(exact.device)).relative_rms for side in logits)
    identical = [GreedyAgreement.between([(text, side)], prompts).identical for side in texts]
    return text, Float32Distance(upstream, patched, *identical), ""


def no_float32(model: Any) -> str:
    """Why there is no copy of `model` in float32; empty where there is room for one."""
    if not can_be_widened(model):
        return "its weights are quantised, offloaded, or spread over devices"
    needed = ROOM * 4 * sum(parameter.numel() for parameter in model.parameters())
    device = model.device
    free = get_max_memory().get("cpu" if device.type == "cpu" else device.index or 0, 0)
    return "" if needed < free else f"it would take {needed / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free"


def _sample(
    tokenizer: Any, prompts: Sequence[str], which: int, upstream: Tensor, patched: Tensor, wide: Tensor | None
) -> Sample:
    exact = None if wide is None else tokenizer.decode(wide[which])
    return Sample(prompts[which], tokenizer.decode(upstream[which]), tokenizer.decode(patched[which]), exact)


def total_runs(model: Any, settings: Settings) -> int:
    """Announced at most: on each side greedy, logits, memory and the timed ones; what is beside; float32."""
    beside = beside_them.missing(model, settings.beside)
    running = [side for side, why in beside.items() if not why]
    of_graph = (2 + settings.repeat) * (CUDA_GRAPH in running)
    return 2 * (3 + settings.repeat) + 1 + (2 if running else 0) + of_graph + (COMPILED in running)


def describe(model: Any, batch: Batch, settings: Settings) -> tuple[Setup, list[str]]:
    """The setup, and the names of the layers that the patch covers. Raises PatchError where it covers none."""
    with settings.patched(model) as report:
        layers = report.layers
    sequences, prompt_tokens = batch["input_ids"].shape
    setup = Setup(
        model=model.config.name_or_path,
        family=layers[0].family,
        backend=layers[0].backend,
        num_layers=model.config.get_text_config().num_hidden_layers,
        gdn_layers=len(layers),
        upstream=upstream_kernels(model.get_submodule(layers[0].name), FAMILIES[layers[0].family]),
        dtype=str(model.dtype).removeprefix("torch."),
        device=device_name(model.device),
        cpu=cpu_name(),
        threads=torch.get_num_threads(),
        sequences=sequences,
        prompt_tokens=prompt_tokens,
        new_tokens=settings.new_tokens,
        repeat=settings.repeat,
        versions=versions(),
        state_dtype=settings.state_dtype,
    )
    return setup, [layer.name for layer in layers if layer.covered]
