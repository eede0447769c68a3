"""`patch(model, state_dtype=torch.bfloat16)`: the recurrent states in the cache are narrow, in every way to decode."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from models import FAMILIES, LINEAR, PROMPT, build, forward, generate, linear_layers, load, prompt
from test_compile import Recorder, decode, small
from tolerances import BFLOAT16_STATE, relative_rms
from torch import Tensor
from transformers import CompileConfig, DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import Cache

import qwen_fastdecode as qf
from qwen_fastdecode.layer.plan import plan_of
from qwen_fastdecode.ops.reference import decode_reference
from qwen_fastdecode.ops.step import States, Step
from qwen_fastdecode.upstream.caches import read_states

BF16, F32 = torch.bfloat16, torch.float32
TOKENS = torch.randint(1, 64, (2, 24), generator=torch.Generator().manual_seed(0))


def dtypes(model: PreTrainedModel, cache: Cache) -> list[torch.dtype]:
    """Of the recurrent states, layer by layer."""
    states = [read_states(cache, layer.layer_idx) for layer in linear_layers(model)]
    assert all(isinstance(state, States) for state in states)
    return [state.recurrent.dtype for state in states]


def turns(model: PreTrainedModel, cache: Cache) -> Tensor:
    """A conversation: prompts of several tokens on top of tokens that were decoded one by one. [2, 24, vocabulary]"""
    bounds = [0, 6, 7, 8, 9, 14, 15, 16, 17, 20, 21, 22, 23, 24]
    logits = []
    for start, stop in pairwise(bounds):
        chunk, cache = forward(model, TOKENS[:, start:stop], cache)
        logits.append(chunk)
    return torch.cat(logits, dim=1)


def steps(model: PreTrainedModel, cache: Cache) -> Tensor:
    """A prompt of one token, and no other."""
    return torch.cat([forward(model, token, cache)[0] for token in TOKENS.split(1, dim=1)], dim=1)


def after_reset(model: PreTrainedModel, cache: Cache) -> Tensor:
    """A cache that is used again."""
    forward(model, TOKENS[:, 3:7], cache)
    forward(model, TOKENS[:, :1], cache)
    cache.reset()
    return turns(model, cache)


def reordered(model: PreTrainedModel, cache: Cache) -> Tensor:
    """Beam search puts other tensors into the cache between any two steps."""
    forward(model, TOKENS[:, :6], cache)
    logits = []
    for token in TOKENS[:, 6:].split(1, dim=1):
        cache.reorder_cache(torch.tensor([1, 0]))
        logits.append(forward(model, token, cache)[0])
    return torch.cat(logits, dim=1)


def mixed_modes(model: PreTrainedModel, cache: Cache) -> Tensor:
    """States made without inference mode, updated with it and again without."""
    logits = []
    forward(model, TOKENS[:, :6], cache)
    for i, token in enumerate(TOKENS[:, 6:].split(1, dim=1)):
        with torch.inference_mode(i % 2 == 0):
            logits.append(forward(model, token, cache)[0].clone())
    return torch.cat(logits, dim=1)


def dynamic(model: PreTrainedModel) -> Cache:
    return DynamicCache(config=model.config)


def static(model: PreTrainedModel) -> Cache:
    return StaticCache(config=model.config, max_cache_len=32)


@pytest.mark.parametrize("make_cache", [dynamic, static])
@pytest.mark.parametrize(
    ("act", "fast"), [(turns, 10), (steps, 23), (after_reset, 11), (reordered, 18), (mixed_modes, 18)]
)
def test_every_way_to_decode(act: Callable[..., Tensor], fast: int, make_cache: Callable[..., Cache]) -> None:
    model = build()
    expected = act(model, make_cache(model))
    qf.patch(model, state_dtype=BF16)
    cache = make_cache(model)
    logits = act(model, cache)
    assert dtypes(model, cache) == [BF16] * LINEAR
    assert qf.status(model).fast_steps == fast * LINEAR
    assert 0 < relative_rms(logits, expected) < BFLOAT16_STATE


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str) -> None:
    model = build(family)
    expected = turns(model, dynamic(model))
    qf.patch(model, state_dtype=BF16)
    cache = dynamic(model)
    assert relative_rms(turns(model, cache), expected) < BFLOAT16_STATE
    assert dtypes(model, cache) == [BF16] * LINEAR


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static", "disable_compile": True}])
def test_generate(options: dict[str, Any]) -> None:
    model, tokens = load("qwen3_next-tiny"), prompt("qwen3_next-tiny")
    qf.patch(model, state_dtype=BF16)
    output = model.generate(
        tokens, max_new_tokens=12, do_sample=False, eos_token_id=None, return_dict_in_generate=True, **options
    )
    assert dtypes(model, output.past_key_values) == [BF16] * LINEAR
    assert qf.status(model).fast_steps == 11 * LINEAR
    assert qf.status(model).fallbacks == {"more than one token": LINEAR}


def test_a_padded_prompt_leaves_the_rounded_state_of_upstream() -> None:
    """Left padding puts a mask on the prompt's pass, and none on the steps that decode from it."""
    model, mask = build(), torch.ones_like(PROMPT)
    mask[0, :2] = 0
    _, upstream = forward(model, PROMPT, attention_mask=mask)
    assert not torch.equal(read_states(upstream, 0).recurrent, read_states(forward(model, PROMPT)[1], 0).recurrent)
    qf.patch(model, state_dtype=BF16)
    _, cache = forward(model, PROMPT, attention_mask=mask)
    assert dtypes(model, cache) == [BF16] * LINEAR
    for layer in linear_layers(model):
        narrow, wide = (read_states(each, layer.layer_idx).recurrent for each in (cache, upstream))
        assert torch.equal(narrow, wide.to(BF16))


@torch.no_grad()
def test_a_step_rounds_the_state_once() -> None:
    """Against the reference, from the rounded state of the prompt's end."""
    model = build()
    qf.patch(model, state_dtype=BF16)
    _, cache = forward(model, TOKENS[:, :6], dynamic(model))
    layer = linear_layers(model)[0]
    conv, recurrent = (state.double() for state in read_states(cache, layer.layer_idx))
    plan, hidden_states = plan_of(layer), torch.randn(2, 1, 32)
    parts = plan.family.parts(layer)
    sources, weights = parts.project(hidden_states), parts.weights
    step = Step(sources, plan.strategy.read, States(conv, recurrent), weights)
    out = decode_reference(step, plan.strategy.recipe)
    y = layer(hidden_states, cache_params=cache, attention_mask=None)
    torch.testing.assert_close(y, parts.project_out(out.float()))
    torch.testing.assert_close(read_states(cache, 0).recurrent, recurrent.to(BF16), rtol=2**-7, atol=1e-6)


def test_upstream_goes_on_from_the_rounded_state_exactly() -> None:
    """A second prompt, and what comes after unpatching: as upstream from the same numbers in float32."""
    model = build()
    qf.patch(model, state_dtype=BF16)
    _, narrow = forward(model, TOKENS[:, :6], dynamic(model))
    forward(model, TOKENS[:, 6:7], narrow)
    wide = copy.deepcopy(narrow)
    for layer in linear_layers(model):
        held = wide.layers[layer.layer_idx].recurrent_states
        held[0] = held[0].float()
    qf.unpatch(model)
    assert torch.equal(forward(model, TOKENS[:, 7:12], narrow)[0], forward(model, TOKENS[:, 7:12], wide)[0])
    assert dtypes(model, narrow) == [BF16] * LINEAR
    for layer in linear_layers(model):
        states = [read_states(cache, layer.layer_idx).recurrent for cache in (narrow, wide)]
        assert torch.equal(states[0], states[1].to(BF16))
    logits = [forward(model, TOKENS[:, 12:13], cache)[0] for cache in (narrow, wide)]
    assert relative_rms(*logits) < BFLOAT16_STATE


def test_the_default_is_upstreams_dtype() -> None:
    model = build()
    qf.patch(model)
    assert dtypes(model, forward(model, TOKENS[:, :1], forward(model, TOKENS)[1])[1]) == [F32] * LINEAR


def test_float32_states_by_choice_are_those_of_the_default() -> None:
    model = build()
    qf.patch(model)
    expected = generate(model, 8)
    qf.patch(model, state_dtype=F32)
    assert torch.equal(generate(model, 8), expected)


def test_a_cache_filled_before_patching_is_converted_at_its_next_step() -> None:
    model = build()
    _, cache = forward(model, TOKENS[:, :6])
    qf.patch(model, state_dtype=BF16)
    forward(model, TOKENS[:, 6:7], cache)
    assert dtypes(model, cache) == [BF16] * LINEAR
    assert qf.status(model).fast_steps == LINEAR


@pytest.mark.parametrize("why", ["switched off", "gradients"])
def test_a_state_that_no_fast_step_will_read_stays(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    qf.patch(model, state_dtype=BF16)
    if why == "switched off":
        monkeypatch.setenv("QWEN_FASTDECODE", "0")
    with torch.set_grad_enabled(why == "gradients"):
        cache = model(TOKENS, use_cache=True).past_key_values
    assert dtypes(model, cache) == [F32] * LINEAR


def test_patch_of_everything_and_patched_carry_it() -> None:
    with qf.patched(state_dtype=BF16):
        model = build()
        assert dtypes(model, forward(model, PROMPT)[1]) == [BF16] * LINEAR
        with qf.patched(model):
            assert dtypes(model, forward(model, PROMPT)[1]) == [F32] * LINEAR
        assert dtypes(model, forward(model, PROMPT)[1]) == [BF16] * LINEAR
    assert dtypes(model, forward(model, PROMPT)[1]) == [F32] * LINEAR


@pytest.mark.parametrize("state_dtype", [torch.float16, torch.int8, "bfloat16"], ids=str)
@pytest.mark.parametrize("everything", [False, True])
def test_another_dtype_is_refused(state_dtype: Any, everything: bool) -> None:
    model = build()
    message = r"state_dtype: got .*, expected torch\.bfloat16, torch\.float32 or None"
    with pytest.raises(ValueError, match=message):
        qf.patch(None if everything else model, state_dtype=state_dtype)
    assert qf.status().layers == ()


def test_a_compiled_step_is_one_graph_on_narrow_states() -> None:
    torch._dynamo.reset()
    model, recorder = small(), Recorder("aot_eager")
    qf.patch(model, state_dtype=BF16)
    expected = decode(model, model.forward, 16)
    assert torch.equal(decode(model, recorder.compile(model), 16), expected)
    assert recorder.operators == [1]


@pytest.mark.slow
def test_generate_compiles_one_step_on_narrow_states() -> None:
    torch._dynamo.reset()
    model, recorder = small(), Recorder()
    qf.patch(model, state_dtype=BF16)
    expected = generate(model, 16)
    config = CompileConfig(fullgraph=True, dynamic=None, backend=recorder.record, mode=None)
    config._compile_all_devices = True
    assert torch.equal(generate(model, 16, cache_implementation="static", compile_config=config), expected)
    assert recorder.operators == [1]


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_prompt_leaves_the_state_as_it_is() -> None:
    torch._dynamo.reset()
    model, recorder = small(), Recorder()
    expected = decode(model, model.forward, 1)[:, -1:]
    qf.patch(model, state_dtype=BF16)
    step, cache = recorder.compile(model), static(model)
    token = step(PROMPT, past_key_values=cache).logits[:, -1:].argmax(-1)
    assert torch.equal(token, expected)
    step(token, past_key_values=cache)
    assert dtypes(model, cache) == [F32]
    assert recorder.operators == [0, 1]
