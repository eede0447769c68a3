"""Ways in which programs generate: by hand, ragged, streamed, in a pipeline, beside another model, continuously."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import CHECKPOINTS, LINEAR, PROMPT, TRAINED, build, forward, generate, llama, load, prompt
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, TextIteratorStreamer, pipeline

import qwen_fastdecode as qf

NEW = 24
PREFILL = {"more than one token": LINEAR}


def by_hand(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """The loop that everybody writes once."""
    logits, cache = forward(model, tokens)
    for _ in range(NEW):
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
        logits, cache = forward(model, tokens[:, -1:], cache)
    return tokens


@pytest.mark.parametrize("checkpoint", TRAINED)
def test_a_loop_by_hand(checkpoint: str) -> None:
    model, tokens = load(checkpoint), prompt(checkpoint)
    expected = by_hand(model, tokens)
    assert torch.equal(expected, generate(model, NEW, tokens))
    qf.patch(model)
    assert torch.equal(by_hand(model, tokens), expected)
    assert qf.status(model).fast_steps == NEW * LINEAR
    assert qf.status(model).fallbacks == PREFILL


@pytest.mark.parametrize("checkpoint", TRAINED)
def test_a_batch_whose_sequences_end_at_different_lengths(checkpoint: str) -> None:
    model, tokens = load(checkpoint), prompt(checkpoint)
    said = generate(model, NEW, tokens)[:, tokens.shape[1] :]
    ends = [said[0, 3].item(), said[1, 7].item(), said[2, 12].item(), said[3, 17].item()]
    options = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": NEW, "do_sample": False}
    options |= {"eos_token_id": ends, "pad_token_id": 0}

    expected = model.generate(tokens, **options)
    lengths = (expected[:, tokens.shape[1] :] != 0).sum(1)
    assert lengths.unique().numel() > 2
    qf.patch(model)
    assert torch.equal(model.generate(tokens, **options), expected)
    assert qf.status(model).fast_steps == (lengths.max() - 1) * LINEAR
    assert qf.status(model).fallbacks == PREFILL


@pytest.mark.parametrize("checkpoint", TRAINED)
def test_text_streamed_from_a_thread(checkpoint: str) -> None:
    model, tokenizer = load(checkpoint), AutoTokenizer.from_pretrained(CHECKPOINTS / checkpoint)
    tokens = prompt(checkpoint)[:1]
    expected = tokenizer.decode(generate(model, NEW, tokens)[0, tokens.shape[1] :])
    qf.patch(model)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    thread = threading.Thread(target=generate, args=(model, NEW, tokens), kwargs={"streamer": streamer})
    thread.start()
    assert "".join(streamer) == expected
    thread.join()
    assert qf.status(model).fast_steps == (NEW - 1) * LINEAR
    assert qf.status(model).fallbacks == PREFILL


@pytest.mark.parametrize("checkpoint", TRAINED)
def test_a_text_generation_pipeline(checkpoint: str) -> None:
    model, tokenizer = load(checkpoint), AutoTokenizer.from_pretrained(CHECKPOINTS / checkpoint)
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    prompts = (CHECKPOINTS / "prompts.txt").read_text("utf-8").splitlines()[:2]
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    expected = write(prompts, **options)
    assert all(text["generated_text"].startswith(begin) for begin, (text,) in zip(prompts, expected, strict=True))
    qf.patch(model)
    assert write(prompts, **options) == expected
    assert qf.status(model).fast_steps == len(prompts) * (NEW - 1) * LINEAR


DRAFT = 4  # tokens that an assistant proposes at a time


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5"])
def test_as_the_assistant_of_another_model_it_stays_upstreams(family: str) -> None:
    """Drafts are taken back, so the cache records past states, and every step of the assistant is upstream's."""
    model, assistant = llama(), build(family)
    settings = assistant.generation_config
    settings.num_assistant_tokens, settings.num_assistant_tokens_schedule = DRAFT, "constant"
    settings.assistant_confidence_threshold = 0
    expected = generate(model, 16, PROMPT[:1], assistant_model=assistant)
    assert torch.equal(expected, generate(model, 16, PROMPT[:1]))
    calls = count_calls(assistant)
    qf.patch(assistant)
    assert torch.equal(generate(model, 16, PROMPT[:1], assistant_model=assistant), expected)
    several, single = sum(length > 1 for length in calls), sum(length == 1 for length in calls)
    assert single > several > 0
    assert qf.status(assistant).fast_steps == 0
    assert qf.status(assistant).fallbacks == {
        "more than one token": several * LINEAR,
        "the cache is recording past states": single * LINEAR,
    }


def count_calls(model: PreTrainedModel) -> list[int]:
    """How many tokens each call of the model gets from now on."""
    lengths: list[int] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    return lengths


def refusal(model: PreTrainedModel, message: str, generate: Callable[[], Any]) -> str:
    with pytest.raises(ValueError, match=message) as caught:
        generate()
    assert (qf.status(model).fast_steps, qf.status(model).fallbacks) == (0, {})
    return str(caught.value)


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5"])
def test_what_upstream_refuses_is_refused_in_its_words(family: str) -> None:
    """With an assistant of its own, and in continuous batches."""
    model, assistant = build(family), build(family)
    config = GenerationConfig(max_new_tokens=4, eos_token_id=-1)
    refused = {
        "assisted generation is not supported": lambda: generate(model, 4, PROMPT[:1], assistant_model=assistant),
        "Invalid layer type: linear_attention": lambda: model.generate_batch([[3, 1, 4]], generation_config=config),
    }
    expected = [refusal(model, message, act) for message, act in refused.items()]
    qf.patch(model)
    assert [refusal(model, message, act) for message, act in refused.items()] == expected
