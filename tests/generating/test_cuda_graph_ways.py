"""`cuda_graph=True` with trained models, in the ways in which programs generate: the same words, from replays."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from cuda_graph_stand_in import captured, stand_in
from models import CHECKPOINTS, LINEAR, PROMPT, TRAINED, build, generate, linear_layers, load, prompt
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoTokenizer, GenerationConfig, TextIteratorStreamer, pipeline

import qwen_fastdecode as qf
from qwen_fastdecode import graph

pytestmark = pytest.mark.usefixtures(stand_in.__name__)
NEW = 24


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", TRAINED)
def test_512_free_running_tokens_are_identical(checkpoint: str) -> None:
    model, tokens = load(checkpoint), prompt(checkpoint)[:1]
    expected = generate(model, 512, tokens)
    captured(model)
    assert torch.equal(generate(model, 512, tokens), expected)
    assert graph.describe(model).captures == 2  # of 512 places, and of 523
    assert graph.describe(model).replays == 511 - 2 * 2
    assert qf.status(model).fast_steps == 511 * LINEAR


@pytest.mark.parametrize("checkpoint", TRAINED)
def test_a_pipeline(checkpoint: str) -> None:
    model, tokenizer = load(checkpoint), AutoTokenizer.from_pretrained(CHECKPOINTS / checkpoint)
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)  # it keeps a copy of the settings
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    expected = write("The", **options)
    captured(model)
    assert write("The", **options) == expected
    assert graph.describe(model).replays == NEW - 3


def test_settings_of_the_callers_own() -> None:
    model = build()
    settings = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)
    expected = model.generate(PROMPT, generation_config=settings)
    captured(model)
    assert torch.equal(model.generate(PROMPT, generation_config=settings), expected)
    assert graph.describe(model).replays == NEW - 3


@pytest.mark.parametrize("checkpoint", TRAINED)
def test_words_as_they_come(checkpoint: str) -> None:
    """A streamer, and a text that ends: the step that was made in vain is not heard of."""
    model, tokenizer = load(checkpoint), AutoTokenizer.from_pretrained(CHECKPOINTS / checkpoint)
    tokens = prompt(checkpoint)[:1]
    end = int(generate(model, NEW, tokens)[0, -4])

    def streamed() -> tuple[list[str], torch.Tensor]:
        streamer = TextIteratorStreamer(tokenizer)
        options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": end, "streamer": streamer}
        said: list[torch.Tensor] = []
        thread = threading.Thread(target=lambda: said.append(model.generate(tokens, **options)))
        thread.start()
        words = list(streamer)
        thread.join()
        return words, said[0]

    expected = streamed()
    captured(model)
    words, said = streamed()
    assert words == expected[0]
    assert torch.equal(said, expected[1])
    assert graph.describe(model).replays > 0


def test_an_adapter_that_is_switched_between_calls_and_within_one() -> None:
    projections = [name for name, part in linear_layers(build())[0].named_children() if isinstance(part, nn.Linear)]
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=projections, init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(build(), config).eval()

    def switches(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if ids.shape[1] == 14:
            model.base_model.disable_adapter_layers()
        return scores

    def said() -> list[torch.Tensor]:
        with_it = generate(model, NEW)
        with model.disable_adapter():
            without = generate(model, NEW)
        both = generate(model, NEW, logits_processor=[switches])
        model.base_model.enable_adapter_layers()
        return [with_it, without, both]

    expected = said()
    assert not torch.equal(expected[0], expected[1])
    captured(model)
    assert all(torch.equal(a, b) for a, b in zip(said(), expected, strict=True))
    assert graph.describe(model).captures == 4


def test_states_in_bfloat16() -> None:
    model = build()
    qf.patch(model, backend="torch", state_dtype=torch.bfloat16)
    expected = generate(model, NEW)
    qf.patch(model, backend="torch", state_dtype=torch.bfloat16, cuda_graph=True)
    assert torch.equal(generate(model, NEW), expected)
    assert graph.describe(model).replays == NEW - 3


def test_images() -> None:
    """A picture in the prompt: its positions are not those of a text, and decoding goes on from them."""
    model = build("qwen3_5 with vision")
    config, vision = model.config, model.config.vision_config
    merge = vision.spatial_merge_size
    grid = torch.tensor([[1, 2 * merge, 2 * merge]])
    patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    begin, picture, end = 61, 62, 63
    config.image_token_id, config.vision_start_token_id, config.vision_end_token_id = picture, begin, end
    tokens = torch.tensor([[3, begin, picture, picture, picture, picture, end, 5, 9]])
    torch.manual_seed(2)
    inputs = {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "pixel_values": torch.randn(int(grid.prod()), patch),
        "image_grid_thw": grid,
        "mm_token_type_ids": (tokens == picture).long(),
    }
    options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
    expected = model.generate(**inputs, **options)
    captured(model)
    assert torch.equal(model.generate(**inputs, **options), expected)
    assert graph.describe(model).replays == NEW - 3
