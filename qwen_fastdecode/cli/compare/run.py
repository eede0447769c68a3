"""The comparison itself: the text first; then, only if it is right, the speed, in alternating runs."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from importlib.metadata import distributions, version
from typing import Any, TypeVar

import torch
from torch import Tensor

import qwen_fastdecode
from qwen_fastdecode.report import PatchReport
from qwen_fastdecode.upstream.families import FAMILIES

from .generation import Batch, Clock, Run, encode, forced_logits, generate
from .layerwise import LayerDistance, LayerwiseCheck
from .memory import decode_step_bytes
from .parity import GreedyAgreement, LogitsDistance, Parity, comparable_part
from .result import Comparison, Sample, Service, Setup, Speed
from .upstream import upstream_kernels

T = TypeVar("T")

STATE_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Settings:
    """What is generated, how often, by which backend, and with which dtype of the patched side's recurrent states."""

    new_tokens: int = 64
    repeat: int = 5
    backend: str = "auto"
    state_dtype: str | None = None  # None: upstream's

    def patched(self, model: Any) -> AbstractContextManager[PatchReport]:
        """The patched side."""
        state_dtype = None if self.state_dtype is None else STATE_DTYPES[self.state_dtype]
        return qwen_fastdecode.patched(model, backend=self.backend, state_dtype=state_dtype)


class Sides:
    """One model on one batch of prompts, with and without the patch."""

    def __init__(self, model: Any, batch: Batch, settings: Settings, on_run: Callable[[str], None]):
        self.model, self.batch, self.settings = model, batch, settings
        self._on_run = on_run

    def run(self, what: str, is_patched: bool, call: Callable[[], T]) -> T:
        """`call` on one side."""
        self._on_run(f"{what}, {'patched' if is_patched else 'unpatched'}")
        with self.settings.patched(self.model) if is_patched else nullcontext():
            return call()

    def both(self, what: str, call: Callable[[], T], patched_first: bool = False) -> tuple[T, T]:
        """`call` on both sides; returns the unpatched model's result first, whichever side ran first."""
        results = {side: self.run(what, side, call) for side in (patched_first, not patched_first)}
        return results[False], results[True]

    def generate(self) -> Run:
        """Greedy text of the batch."""
        return generate(self.model, self.batch, self.settings.new_tokens)

    def timed_run(self) -> tuple[Run, Service]:
        """Counts who served the decode steps; asking costs time on both sides, between prefill and first step."""
        after_prefill: list[Service] = []
        clock = Clock(after_prefill=lambda: after_prefill.append(service_of(self.model)))
        run = generate(self.model, self.batch, self.settings.new_tokens, clock)
        return run, service_of(self.model) - after_prefill[0]

    def distances(self, tokens: Tensor, layers: Sequence[str]) -> tuple[LayerDistance, LogitsDistance]:
        """Both sides decode `tokens` [B, new tokens], or as many of them as fit in memory; `layers` are checked."""
        sequences, steps = tokens.shape
        sequences, steps = comparable_part(sequences, steps, self.model.config.get_text_config().vocab_size)
        part = {name: tensor[:sequences] for name, tensor in self.batch.items()}
        forced = tokens[:sequences, :steps]
        check = LayerwiseCheck(self.model, layers)
        upstream = self.run("logits", False, lambda: forced_logits(self.model, part, forced))
        with check.watching():
            patched = self.run("logits", True, lambda: forced_logits(self.model, part, forced))
        return check.distance, LogitsDistance.between(upstream, patched)

    def step_bytes(self) -> int:
        """Peak memory of a decode step."""
        return decode_step_bytes(self.model, self.batch)


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
        on_run: called before each of the at most `total_runs(settings)` `generate` calls, with what is about to run.

    Raises:
        PatchError: the model cannot be patched.
        BadInput: a prompt has no tokens.
    """
    batch = encode(tokenizer, prompts, model.device)
    sides = Sides(model, batch, settings, on_run)
    setup, layers = describe(model, batch, settings)

    upstream, patched = sides.both("greedy text", sides.generate)  # also warms both sides up
    sample = Sample(prompts[0], tokenizer.decode(upstream.tokens[0]), tokenizer.decode(patched.tokens[0]))
    texts = [(upstream.tokens, patched.tokens)]
    distances = sides.distances(upstream.tokens, layers)
    greedy = GreedyAgreement.between(texts)
    parity = Parity(setup.dtype, setup.num_layers, *distances, greedy, setup.state_dtype)
    if parity.failures:
        return Comparison(setup, parity, None, sample)

    memory = sides.both("memory", sides.step_bytes)
    timed = [sides.both(f"run {i + 1}", sides.timed_run, patched_first=i % 2 == 1) for i in range(settings.repeat)]
    runs = [(before, after) for (before, _), (after, _) in timed]
    texts += [(before.tokens, after.tokens) for before, after in runs]  # what was timed must be right as well
    parity = replace(parity, greedy=GreedyAgreement.between(texts))
    served = sum((service for _, (_, service) in timed), Service())
    return Comparison(setup, parity, None if parity.failures else Speed.of(runs, memory, served), sample)


def total_runs(settings: Settings) -> int:
    """How many `generate` calls a comparison makes at most: on each side greedy, logits, memory and the timed ones."""
    return 2 * (3 + settings.repeat)


def service_of(model: Any) -> Service:
    """Who served `model`'s layer-steps since it was patched; nothing is counted while it is not."""
    status = qwen_fastdecode.status(model)
    return Service(status.fast_steps, status.fallbacks)


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
        threads=torch.get_num_threads(),
        sequences=sequences,
        prompt_tokens=prompt_tokens,
        new_tokens=settings.new_tokens,
        repeat=settings.repeat,
        versions=versions(),
        state_dtype=settings.state_dtype,
    )
    return setup, [layer.name for layer in layers if layer.covered]


def device_name(device: torch.device) -> str:
    """The device, and on a GPU which one."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def versions() -> dict[str, str]:
    """Of everything installed whose version a number may depend on."""
    names = ("torch", "triton", "transformers", "flash-linear-attention", "causal-conv1d", "kernels")
    installed = {name: version(name) for name in names if any(distributions(name=name))}
    return {"python": platform.python_version(), **installed}
