"""The comparison itself: the text first; then, only if it is right, the speed, in alternating runs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from accelerate.utils import get_max_memory
from torch import Tensor

import qwen_fastdecode
from qwen_fastdecode.errors import BadInput, PatchError
from qwen_fastdecode.names import Backend
from qwen_fastdecode.report import PatchReport
from qwen_fastdecode.upstream.families import FAMILIES

from ..arguments import Exit
from ..machine import cpu_name, device_name, versions
from .generation import Batch, Clock, Run, encode, forced_logits, generate
from .layerwise import LayerDistance, LayerwiseCheck, can_be_widened
from .memory import decode_step_bytes
from .parity import Float32Distance, GreedyAgreement, LogitsDistance, Parity, comparable_part
from .result import Comparison, Sample, Service, Setup, SideFailed, Speed
from .upstream import upstream_kernels

T = TypeVar("T")

ROOM = 2.0  # times the bytes of the weights in float32: what making that copy, and running it, may take


@dataclass(frozen=True)
class Settings:
    """What is generated, how often, by which backend, and with which dtype of the patched side's recurrent states."""

    new_tokens: int = 64
    repeat: int = 5
    backend: Backend = "auto"
    state_dtype: str | None = None  # None: upstream's

    def patched(self, model: Any) -> AbstractContextManager[PatchReport]:
        """The patched side."""
        state_dtype = None if self.state_dtype is None else getattr(torch, self.state_dtype)
        return qwen_fastdecode.patched(model, backend=self.backend, state_dtype=state_dtype)


class Sides:
    """One model on one batch of prompts, with and without the patch."""

    def __init__(self, model: Any, batch: Batch, settings: Settings, on_run: Callable[[str], None]):
        self.model, self.batch, self.settings = model, batch, settings
        self._on_run = on_run

    def run(self, what: str, is_patched: bool, call: Callable[[], T]) -> T:
        """`call` on one side. Raises SideFailed where it fails."""
        self._on_run(f"{what}, {'patched' if is_patched else 'unpatched'}")
        with told(what, is_patched), self.settings.patched(self.model) if is_patched else nullcontext():
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

    def comparable(self, tokens: Tensor) -> tuple[Batch, Tensor]:
        """As many of the prompts, and of the tokens [B, new tokens] after them, as there is memory for logits."""
        sequences, steps = tokens.shape
        sequences, steps = comparable_part(sequences, steps, self.model.config.get_text_config().vocab_size)
        return {name: tensor[:sequences] for name, tensor in self.batch.items()}, tokens[:sequences, :steps]

    def logits(self, tokens: Tensor, layers: Sequence[str]) -> tuple[Tensor, Tensor, LayerDistance]:
        """Of both sides, decoding the same tokens; the steps of `layers` are checked."""
        part, forced = self.comparable(tokens)
        check = LayerwiseCheck(self.model, layers)
        upstream = self.run("logits", False, lambda: forced_logits(self.model, part, forced))
        with check.watching():
            patched = self.run("logits", True, lambda: forced_logits(self.model, part, forced))
        return upstream, patched, check.distance

    def float32(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """A copy of the model in float32, unpatched: its greedy text, and its logits over the same tokens."""
        self._on_run("in float32, unpatched")
        with told("in float32", False):
            wide = copy.deepcopy(self.model).float()
            text = generate(wide, self.batch, self.settings.new_tokens).tokens
            return text, forced_logits(wide, *self.comparable(tokens))

    def step_bytes(self) -> int | None:
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
    texts = [(upstream.tokens, patched.tokens)]
    greedy = GreedyAgreement.between(texts, prompts)
    logits = sides.logits(upstream.tokens, layers)
    wide, float32, missing = _float32(sides, prompts, texts[0], logits[:2])
    distances = logits[2], LogitsDistance.between(*logits[:2])
    parity = Parity(setup.dtype, *distances, greedy, float32, missing, settings.state_dtype)
    sample = _sample(tokenizer, prompts, greedy.first_prompt or 0, *texts[0], wide)
    if parity.failures:
        return Comparison(setup, parity, None, sample)

    memory = sides.both("memory", sides.step_bytes)
    timed = [sides.both(f"run {i + 1}", sides.timed_run, patched_first=i % 2 == 1) for i in range(settings.repeat)]
    runs = [(before, after) for (before, _), (after, _) in timed]
    texts += [(before.tokens, after.tokens) for before, after in runs]  # what was timed must be right as well
    parity = replace(parity, greedy=GreedyAgreement.between(texts, prompts))
    served = sum((service for _, (_, service) in timed), Service())
    return Comparison(setup, parity, None if parity.failures else Speed.of(runs, memory, served), sample)


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
        return "its weights are quantised, or spread over devices"
    needed = ROOM * 4 * sum(parameter.numel() for parameter in model.parameters())
    device = model.device
    free = get_max_memory().get("cpu" if device.type == "cpu" else device.index or 0, 0)
    return "" if needed < free else f"it would take {needed / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free"


def _sample(
    tokenizer: Any, prompts: Sequence[str], which: int, upstream: Tensor, patched: Tensor, wide: Tensor | None
) -> Sample:
    exact = None if wide is None else tokenizer.decode(wide[which])
    return Sample(prompts[which], tokenizer.decode(upstream[which]), tokenizer.decode(patched[which]), exact)


@contextmanager
def told(what: str, is_patched: bool) -> Iterator[None]:
    """Raises SideFailed for what a side raises, but for what the user has to change."""
    try:
        yield
    except (BadInput, PatchError):
        raise
    except Exception as error:
        words = str(error).lower()
        no_memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or (
            isinstance(error, RuntimeError) and ("allocate memory" in words or "out of memory" in words)
        )
        raise SideFailed(what, is_patched, Exit.OUT_OF_MEMORY if no_memory else Exit.CRASHED) from error


def total_runs(settings: Settings) -> int:
    """How many `generate` calls a comparison makes at most: on each side greedy, logits, memory and the timed ones."""
    return 2 * (3 + settings.repeat) + 1


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
