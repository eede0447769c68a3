"""One greedy `generate` call, timed token by token.

The clock is a streamer, so what is timed is what a user of `generate` waits for: the forward pass, the choice of the
token and `generate`'s own bookkeeping, which weigh the same on both sides. A streamer gets its tokens on the host, so
on a GPU every arrival is also a synchronisation; `generate` waits for the device in each step anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

from ...errors import BadInput

Batch = dict[str, Tensor]  # what a tokenizer gives: input_ids and attention_mask, both [B, prompt length]


@dataclass(frozen=True)
class Run:
    """One `generate` call."""

    prefill_ms: float  # from the prompt's entry into the loop to the first token
    step_ms: list[float]  # of every later token; a step decodes one token of every sequence
    tokens: Tensor  # [B, new tokens] int64, on the CPU


class Clock(BaseStreamer):
    """Notes when tokens arrive. `generate` puts the prompt first, then one token of every sequence at a time."""

    def __init__(self, after_prefill: Callable[[], None] | None = None):
        self.arrivals: list[float] = []
        self._after_prefill = after_prefill
        self._decode_start = 0.0

    def put(self, value: Tensor) -> None:
        """Tokens have arrived."""
        self.arrivals.append(perf_counter())
        if len(self.arrivals) == 2:
            if self._after_prefill is not None:
                self._after_prefill()
            self._decode_start = perf_counter()

    def end(self) -> None:
        """Nothing is buffered."""

    @property
    def prefill_ms(self) -> float:
        """From the prompt to the first token."""
        return 1e3 * (self.arrivals[1] - self.arrivals[0])

    @property
    def step_ms(self) -> list[float]:
        """Of every later token."""
        return [1e3 * (after - before) for before, after in pairwise([self._decode_start, *self.arrivals[2:]])]


class ForcedTokens(LogitsProcessor):
    """Makes `generate` write a given text, whatever the model would say."""

    def __init__(self, tokens: Tensor, prompt_length: int):
        self.tokens = tokens  # [B, new tokens]
        self.prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [B, vocabulary] that leave one token possible."""
        forced = torch.full_like(scores, float("-inf"))
        return forced.scatter_(1, self.tokens[:, input_ids.shape[1] - self.prompt_length, None], 0.0)


def encode(tokenizer: Any, prompts: Sequence[str], device: torch.device) -> Batch:
    """The prompts as one batch on `device`, padded on the left: decoding goes on at the right.

    Raises BadInput for a prompt without tokens.
    """
    ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    for prompt, own in zip(prompts, ids, strict=True):
        if not own:
            raise BadInput(f"the prompt {prompt!r} has no tokens for this tokenizer")
    longest = max(map(len, ids))
    pad = tokenizer.pad_token_id or 0  # masked: any token would do
    return {
        "input_ids": torch.tensor([[pad] * (longest - len(own)) + own for own in ids], device=device),
        "attention_mask": torch.tensor([[0] * (longest - len(own)) + [1] * len(own) for own in ids], device=device),
    }


def generate(model: Any, batch: Batch, new_tokens: int, clock: Clock | None = None) -> Run:
    """Greedy text of exactly `new_tokens` tokens: the end-of-text token is suppressed, all runs do equal work."""
    clock = clock or Clock()
    length = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens}
    out = model.generate(**batch, **length, do_sample=False, num_beams=1, streamer=clock)
    return Run(clock.prefill_ms, clock.step_ms, out[:, batch["input_ids"].shape[1] :].cpu())


def forced_logits(model: Any, batch: Batch, tokens: Tensor) -> Tensor:
    """The model's own logits [B, decode steps, vocabulary] while it decodes `tokens` [B, new tokens], on their device.

    Those of the prefill are left out: it is not what the patch changes.
    """
    prompt_length = batch["input_ids"].shape[1]
    forced = ForcedTokens(tokens.to(batch["input_ids"].device), prompt_length)
    out = model.generate(
        **batch,
        max_new_tokens=tokens.shape[1],
        do_sample=False,
        num_beams=1,
        logits_processor=LogitsProcessorList([forced]),
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.stack(out.logits[1:], dim=1)
