"""A cache that lives longer than one `generate`: turns of a chat, reset, rolled back, from one mode into another."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from models import LINEAR, PROMPT, TRAINED, build, cache_tensors, forward, load, prompt
from tolerances import FLOAT32, relative_rms
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache

import qwen_fastdecode as qf

NEW = 16  # tokens a turn


def turn(model: PreTrainedModel, tokens: Tensor, cache: Cache) -> Tensor:
    """`NEW` greedy tokens more; the cache already holds what an earlier turn said."""
    return model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        past_key_values=cache,
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=None,
    )


def chat(model: PreTrainedModel, said: Iterable[Tensor]) -> Tensor:
    """A turn for each of `said`, all with one cache: [B, all tokens]."""
    cache, tokens = DynamicCache(config=model.config), None
    for words in said:
        tokens = turn(model, words if tokens is None else torch.cat([tokens, words], dim=1), cache)
    return tokens


@pytest.mark.parametrize("checkpoint", TRAINED)
def test_a_chat_keeps_its_cache_over_three_turns(checkpoint: str) -> None:
    model, words = load(checkpoint), prompt(checkpoint)
    said = [words[:2], words[2:, :5], words[2:, 5:]]
    expected = chat(model, said)
    qf.patch(model)
    assert torch.equal(chat(model, said), expected)
    assert qf.status(model).fast_steps == 3 * (NEW - 1) * LINEAR
    assert qf.status(model).fallbacks == {"more than one token": 3 * LINEAR}  # what is said: a prefill after decode


@pytest.mark.parametrize("checkpoint", TRAINED)
def test_a_cache_that_was_reset_serves_another_text(checkpoint: str) -> None:
    model, words = load(checkpoint), prompt(checkpoint)

    def run() -> list[Tensor]:
        cache = StaticCache(config=model.config, max_cache_len=words.shape[1] + NEW)
        first = turn(model, words[:2], cache)
        cache.reset()
        return [first, turn(model, words[2:], cache)]

    model.generation_config.disable_compile = True
    expected = run()
    qf.patch(model)
    assert all(torch.equal(a, b) for a, b in zip(run(), expected, strict=True))
    assert qf.status(model).fast_steps == 2 * (NEW - 1) * LINEAR
    assert qf.status(model).fallbacks == {"more than one token": 2 * LINEAR}


def roll_back(model: PreTrainedModel) -> list[Tensor]:
    """Two fast steps, three recorded tokens of which two are taken back, and a step from the strided window left."""
    _, cache = forward(model, PROMPT)
    for token in PROMPT[:, :2].split(1, dim=1):
        _, cache = forward(model, token, cache)
    cache.activate_past_recording()
    _, cache = forward(model, PROMPT[:, 2:5], cache)
    _, cache = forward(model, PROMPT[:, 5:], cache)
    cache.crop(-2)
    for layer in cache.layers[:LINEAR]:
        layer.record_past = False  # as `generate` does before it gives a cache back
    logits, cache = forward(model, PROMPT[:, 3:4], cache)
    return [logits, *cache_tensors(cache)]


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5"])
def test_a_step_from_a_window_that_was_cropped_is_fast(family: str) -> None:
    model = build(family)
    expected = roll_back(model)
    qf.patch(model)
    assert all(relative_rms(a, b) < FLOAT32 for a, b in zip(roll_back(model), expected, strict=True))
    assert qf.status(model).fast_steps == 3 * LINEAR
    assert qf.status(model).fallbacks == {
        "more than one token": 2 * LINEAR,
        "the cache is recording past states": LINEAR,
    }


def crossing(model: PreTrainedModel, tokens: Tensor, *modes: Callable[[], AbstractContextManager[Any]]) -> Tensor:
    """The prompt's pass in the first mode, a decode step with the same cache in each of the others: greedy tokens."""
    with modes[0]():
        cache = model(tokens[:, :-1], use_cache=True).past_key_values
    for mode in modes[1:]:
        with mode():
            logits = model(tokens[:, -1:], past_key_values=cache).logits
            tokens = torch.cat([tokens, logits.argmax(-1)], dim=1)
    return tokens


@pytest.mark.parametrize("checkpoint", TRAINED)
def test_no_grad_and_inference_mode_take_turns_with_one_cache(checkpoint: str) -> None:
    model, modes = load(checkpoint), (torch.no_grad, torch.inference_mode) * 4
    expected = crossing(model, prompt(checkpoint), *modes)
    qf.patch(model)
    assert torch.equal(crossing(model, prompt(checkpoint), *modes), expected)
    assert qf.status(model).fast_steps == 7 * LINEAR


def test_a_cache_made_in_inference_mode_goes_on_outside_where_upstream_raises() -> None:
    model, tokens = load(TRAINED[0]), prompt(TRAINED[0])
    expected = crossing(model, tokens, *[torch.inference_mode] * 8)
    with pytest.raises(RuntimeError, match="Inplace update to inference tensor"):
        crossing(model, tokens, torch.inference_mode, torch.no_grad)
    qf.patch(model)
    assert torch.equal(crossing(model, tokens, torch.inference_mode, *[torch.no_grad] * 7), expected)
    assert qf.status(model).fast_steps == 7 * LINEAR
