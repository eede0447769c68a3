"""The sides of a comparison: ways to run one model on one batch of prompts."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from time import perf_counter
from typing import Any, TypeVar

import torch
from torch import Tensor

import qwen_fastdecode
from qwen_fastdecode.errors import BadInput, PatchError
from qwen_fastdecode.names import Backend
from qwen_fastdecode.report import PatchReport

from ..arguments import Exit
from .generation import Batch, Clock, Run, forced_logits, generate
from .layerwise import LayerDistance, LayerwiseCheck
from .memory import decode_step_bytes
from .parity import comparable_part
from .result import CUDA_GRAPH, PATCHED, UPSTREAM, Service, SideFailed, Start

T = TypeVar("T")

HUNDRED = 100  # tokens of the first call: short enough to wait for, long enough to pay for what it compiles


@dataclass(frozen=True)
class Settings:
    """What is generated, how often, by which backend, with which dtype of the patched sides' recurrent states, and what
    is compared beside Transformers and the patch (None: everything that runs here)."""

    new_tokens: int = 64
    repeat: int = 5
    backend: Backend = "auto"
    state_dtype: str | None = None  # None: upstream's
    beside: tuple[str, ...] | None = None

    def patched(self, model: Any, *, cuda_graph: bool = False) -> AbstractContextManager[PatchReport]:
        """The patch."""
        state_dtype = None if self.state_dtype is None else getattr(torch, self.state_dtype)
        return qwen_fastdecode.patched(model, backend=self.backend, state_dtype=state_dtype, cuda_graph=cuda_graph)

    def entered(self, model: Any, side: str) -> AbstractContextManager[Any]:
        """A side that compiles nothing; see `compiled` for the one that does."""
        if side in (PATCHED, CUDA_GRAPH):
            return self.patched(model, cuda_graph=side == CUDA_GRAPH)
        return nullcontext()


class Sides:
    """One model on one batch of prompts, on any side."""

    def __init__(self, model: Any, batch: Batch, settings: Settings, on_run: Callable[[str], None]):
        self.model, self.batch, self.settings = model, batch, settings
        self._on_run = on_run

    def run(self, what: str, side: str, call: Callable[[], T]) -> T:
        """`call` on one side. Raises SideFailed where it fails."""
        self.announce(what, side)
        with told(what, side), self.settings.entered(self.model, side):
            return call()

    def announce(self, what: str, side: str) -> None:
        """Says what runs next."""
        self._on_run(f"{what}, {side.replace('_', ' ')}")

    def both(self, what: str, call: Callable[[], T]) -> tuple[T, T]:
        """`call` unpatched, then patched."""
        found = self.each(what, (UPSTREAM, PATCHED), call)
        return found[UPSTREAM], found[PATCHED]

    def each(self, what: str, sides: Sequence[str], call: Callable[[], T]) -> dict[str, T]:
        """`call` on some sides, in this order."""
        return {side: self.run(what, side, call) for side in sides}

    def generate(self) -> Run:
        """Greedy text of the batch."""
        return generate(self.model, self.batch, self.settings.new_tokens)

    def start(self, side: str) -> Start:
        """The first call of a side: patching and compiling are in it."""
        clock, begun = Clock(), perf_counter()
        self.run("first call", side, lambda: generate(self.model, self.batch, HUNDRED, clock))
        return started(clock, begun)

    def timed_run(self) -> tuple[Run, Service]:
        """Counts who served the decode steps; asking costs time on all sides, between prefill and first step."""
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
        """Of Transformers and the patch, decoding the same tokens; the steps of `layers` are checked."""
        part, forced = self.comparable(tokens)
        check = LayerwiseCheck(self.model, layers)
        upstream = self.run("logits", UPSTREAM, lambda: forced_logits(self.model, part, forced))
        with check.watching():
            patched = self.run("logits", PATCHED, lambda: forced_logits(self.model, part, forced))
        return upstream, patched, check.distance

    def float32(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """A copy of the model in float32, unpatched: its greedy text, and its logits over the same tokens."""
        self.announce("in float32", UPSTREAM)
        with told("in float32", UPSTREAM):
            wide = copy.deepcopy(self.model).float()
            text = generate(wide, self.batch, self.settings.new_tokens).tokens
            return text, forced_logits(wide, *self.comparable(tokens))

    def step_bytes(self) -> int | None:
        """Peak memory of a decode step."""
        return decode_step_bytes(self.model, self.batch)


def started(clock: Clock, begun: float) -> Start:
    """When the tokens of a call came, in seconds after `begun`."""
    return Start(clock.arrivals[1] - begun, clock.arrivals[HUNDRED] - begun)


@contextmanager
def compiled(model: Any) -> Iterator[None]:
    """Transformers' own: a static cache, whose decode step `generate` compiles, with CUDA graphs on a GPU.

    Nothing that was compiled before is used, neither by this process nor from the disk.
    """
    from torch._inductor.utils import fresh_cache  # slow, and for this side only

    config = model.generation_config
    before, own = config.cache_implementation, dict(vars(model))
    torch._dynamo.reset()
    config.cache_implementation = "static"
    try:
        with fresh_cache(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"torch\._inductor")  # advice to who develops it
            yield
    finally:
        config.cache_implementation = before
        for name in {*vars(model)} - {*own}:  # what `generate` keeps of a compiled step, and how long its cache was
            vars(model).pop(name)
        torch._dynamo.reset()


@contextmanager
def told(what: str, side: str) -> Iterator[None]:
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
        raise SideFailed(what, side, Exit.OUT_OF_MEMORY if no_memory else Exit.CRASHED) from error


def service_of(model: Any) -> Service:
    """Who served `model`'s layer-steps since it was patched; nothing is counted while it is not."""
    status = qwen_fastdecode.status(model)
    return Service(status.fast_steps, status.fallbacks)
