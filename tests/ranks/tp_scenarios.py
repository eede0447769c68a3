"""What is done with a model: on one process unpatched, and on tensor-parallel ranks patched. Tokens must agree."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
from models import generate
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

import qwen_fastdecode as qf

FIRST = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])
MORE = torch.tensor([[7, 9, 3], [2, 3, 8]])
Side = Callable[..., None]  # patch(head_parallel=...) or, with None, unpatch


def load_ranks(folder: Any) -> PreTrainedModel:
    """This rank's shards, in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, tp_plan="auto").eval()


@torch.no_grad()
def say(model: PreTrainedModel, cache: DynamicCache, tokens: Tensor, new_tokens: int = 3) -> Tensor:
    """Prefill of `tokens` on top of the cache, then greedy steps. [B, new_tokens]"""
    said = []
    for _ in range(new_tokens):
        tokens = model(tokens, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        said.append(tokens)
    return torch.cat(said, dim=1)


def fresh(model: PreTrainedModel) -> DynamicCache:
    return DynamicCache(config=model.config)


def chat(model: PreTrainedModel, side: Side) -> Tensor:
    """`generate`, three turns on one cache."""
    cache, text = fresh(model), FIRST
    for _ in range(3):
        text = torch.cat([generate(model, 4, text, past_key_values=cache), MORE], dim=1)
    return text


def beams(model: PreTrainedModel, side: Side) -> Tensor:
    return generate(model, 5, FIRST, num_beams=3)


def reset(model: PreTrainedModel, side: Side) -> Tensor:
    """The second text starts as if the cache were new."""
    cache = fresh(model)
    texts = [say(model, cache, FIRST)]
    cache.reset()
    texts += [say(model, cache, MORE), say(model, cache, MORE)]
    return torch.cat(texts, dim=1)


def two_caches(model: PreTrainedModel, side: Side) -> Tensor:
    """In turns, of different batch sizes."""
    one, other = fresh(model), fresh(model)
    texts = [say(model, one, FIRST), say(model, other, MORE.repeat(2, 1)).view(2, -1)]
    texts += [say(model, cache, tokens).view(2, -1) for cache, tokens in ((one, MORE), (other, FIRST.repeat(2, 1)))]
    return torch.cat([*texts, say(model, one, MORE)], dim=1)


def copies(model: PreTrainedModel, side: Side) -> Tensor:
    """A copy of a cache whose states are stale is as stale, whatever is done with the original."""
    cache = fresh(model)
    texts = [say(model, cache, FIRST)]
    twin = copy.deepcopy(cache)
    texts += [say(model, cache, MORE), say(model, twin, MORE[:, :1]), say(model, twin, MORE)]
    return torch.cat(texts, dim=1)


def reorder(model: PreTrainedModel, side: Side) -> Tensor:
    """Both tensors of every layer are replaced between a split step and a prefill."""
    cache = fresh(model)
    texts = [say(model, cache, FIRST)]
    cache.reorder_cache(torch.tensor([1, 1]))
    return torch.cat([*texts, say(model, cache, MORE), say(model, cache, MORE)], dim=1)


def unpatched_in_between(model: PreTrainedModel, side: Side) -> Tensor:
    """A cache goes on without the patch, one step at a time and with a prefill; then with it again."""
    cache = fresh(model)
    texts = [say(model, cache, FIRST)]
    side(None)
    texts += [say(model, cache, MORE[:, :1]), say(model, cache, MORE)]
    side("on")
    return torch.cat([*texts, say(model, cache, MORE[:, :1]), say(model, cache, MORE)], dim=1)


def off_in_between(model: PreTrainedModel, side: Side) -> Tensor:
    """All heads on every rank from one step to the next, and back."""
    cache = fresh(model)
    texts = [say(model, cache, FIRST)]
    side("off")
    texts += [say(model, cache, MORE[:, :1])]
    side("on")
    return torch.cat([*texts, say(model, cache, MORE[:, :1])], dim=1)


def switched_off_in_between(model: PreTrainedModel, side: Side) -> Tensor:
    """By the environment, on all ranks."""
    cache = fresh(model)
    texts = [say(model, cache, FIRST)]
    os.environ["QWEN_FASTDECODE"] = "0"
    texts += [say(model, cache, MORE[:, :1])]
    del os.environ["QWEN_FASTDECODE"]
    return torch.cat([*texts, say(model, cache, MORE[:, :1])], dim=1)


SCENARIOS = {
    scenario.__name__: scenario
    for scenario in (
        chat,
        beams,
        reset,
        two_caches,
        copies,
        reorder,
        unpatched_in_between,
        off_in_between,
        switched_off_in_between,
    )
}


def on_one_process(model: PreTrainedModel, names: Iterable[str]) -> dict[str, Tensor]:
    """Upstream's tokens, unpatched."""
    return {name: SCENARIOS[name](model, lambda mode: None) for name in names}


def on_a_rank(model: PreTrainedModel, names: Iterable[str]) -> dict[str, Tensor]:
    """The same, patched, with every step that can be split on this rank's heads alone."""

    def side(mode: str | None) -> None:
        if mode is None:
            qf.unpatch(model)
        else:
            qf.patch(model, head_parallel=mode)

    tokens = {}
    for name in names:
        side("on")
        tokens[name] = SCENARIOS[name](model, side)
        status = qf.status(model)
        assert status.split_steps == status.fast_steps > 0, f"{name}:\n{status}"
        side(None)
    return tokens
