"""`cuda_graph=True` on the CPU, with a stand-in for the graph: what is said, what stays eager, what is undone."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from cuda_graph_stand_in import captured, stand_in
from models import LINEAR, PROMPT, build, cache_tensors, generate
from tolerances import DRIFT, relative_rms
from transformers import CompileConfig, DynamicCache, LogitsProcessor, LogitsProcessorList

import qwen_fastdecode as qf
from qwen_fastdecode import graph
from qwen_fastdecode.graph import caches, state

FAMILIES = ["qwen3_5", "qwen3_next", "qwen3_5_moe", "qwen3_5 with vision"]


pytestmark = pytest.mark.usefixtures(stand_in.__name__)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_tokens_from_replays(family: str) -> None:
    model = build(family)
    expected = generate(model, 24)
    captured(model)
    assert torch.equal(generate(model, 24), expected)
    found = graph.describe(model)
    assert (found.captures, found.compared, found.replays, found.tokens) == (1, 1, 21, 42)
    assert found.reasons == {}
    assert qf.status(model).fast_steps == 23 * LINEAR


def eager_reason(model: Any, **options: Any) -> dict[str, int]:
    """Why a call was eager; what it said is what an unpatched model says."""
    qf.patch(model, backend="torch")
    expected = generate(model, 12, **options)
    captured(model)
    assert torch.equal(generate(model, 12, **options), expected)
    found = graph.describe(model)
    assert (found.captures, found.replays) == (0, 0)
    return found.reasons


CHOSEN: dict[str, dict[str, Any]] = {
    "a way of generating other than greedy and sampling": {"num_beams": 2},
    "the caller chose a cache_implementation": {"cache_implementation": "dynamic"},
    "the caller set use_cache=False": {"use_cache": False},
    "the caller set disable_compile": {"disable_compile": True},
    "the caller chose a compile_config": {"compile_config": CompileConfig()},
}


@pytest.mark.parametrize("reason", CHOSEN)
def test_what_the_caller_chose_is_respected(reason: str) -> None:
    model = build()
    assert eager_reason(model, **CHOSEN[reason]) == {reason: 1}
    assert model.generation_config.cache_implementation is None


def test_a_cache_of_the_callers_is_his() -> None:
    model = build()
    captured(model)
    cache = DynamicCache(config=model.config)
    generate(model, 12, past_key_values=cache)
    assert graph.describe(model).reasons == {"the caller passed a cache": 1}
    assert cache.get_seq_length() == PROMPT.shape[1] + 11


def test_a_static_cache_by_name_is_upstreams_way() -> None:
    model = build()
    captured(model)
    generate(model, 12, cache_implementation="static", disable_compile=True)
    assert graph.describe(model).reasons == {"the caller chose a cache_implementation": 1}


SAMPLED = {"do_sample": True, "temperature": 0.8, "top_k": 20}
WAYS: dict[str, dict[str, Any]] = {
    "sampled": SAMPLED,
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
    "several sequences of a prompt": {**SAMPLED, "num_return_sequences": 2},
    "chunks of the prompt": {"prefill_chunk_size": 4},
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_says_the_same(way: str) -> None:
    model = build()

    def said() -> torch.Tensor:
        torch.manual_seed(5)
        return generate(model, 20, **WAYS[way])

    expected = said()
    captured(model)
    assert torch.equal(said(), expected)
    assert graph.describe(model).replays == 17


def test_left_padding_and_ends_of_text() -> None:
    model, tokens = build(), PROMPT.clone()
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    options = {
        "attention_mask": mask,
        "max_new_tokens": 40,
        "do_sample": False,
        "eos_token_id": [11, 13],
        "pad_token_id": 0,
    }
    expected = model.generate(tokens * mask, **options)
    captured(model)
    assert torch.equal(model.generate(tokens * mask, **options), expected)
    assert graph.describe(model).captures == 1


def test_what_the_caller_keeps_is_his_own() -> None:
    model = build()
    options = {
        "max_new_tokens": 16,
        "do_sample": False,
        "eos_token_id": None,
        "return_dict_in_generate": True,
        "output_logits": True,
        "output_scores": True,
        "output_hidden_states": True,
    }
    expected = model.generate(PROMPT, **options)
    captured(model)
    found = model.generate(PROMPT, **options)
    assert graph.describe(model).replays == 13
    assert torch.equal(found.sequences, expected.sequences)
    for name in ("logits", "scores"):
        assert relative_rms(torch.stack(found[name]), torch.stack(expected[name])) < DRIFT
    for mine, theirs in zip(found.hidden_states, expected.hidden_states, strict=True):
        assert all(relative_rms(a, b) < DRIFT for a, b in zip(mine, theirs, strict=True))


def test_the_cache_that_comes_back_is_the_one_that_would_have_come() -> None:
    model = build()
    options = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}

    def talk() -> tuple[torch.Tensor, Any]:
        first = model.generate(PROMPT, **options)
        longer = torch.cat([first.sequences, PROMPT], dim=1)
        second = model.generate(longer, past_key_values=first.past_key_values, **options)
        return second.sequences, second.past_key_values

    expected, their_cache = talk()
    captured(model)
    found, my_cache = talk()
    assert graph.describe(model).reasons == {"the caller passed a cache": 1}
    assert torch.equal(found, expected)
    assert type(my_cache) is type(their_cache)
    for mine, theirs in zip(cache_tensors(my_cache), cache_tensors(their_cache), strict=True):
        assert mine.shape == theirs.shape
        assert relative_rms(mine, theirs) < DRIFT


def test_a_long_call_grows_and_captures_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caches, "STEP", 8)
    model = build()
    expected = generate(model, 80)
    captured(model)
    assert torch.equal(generate(model, 80), expected)
    found = graph.describe(model)
    assert (found.captures, found.compared) == (5, 5)
    assert found.replays == 79 - 2 * 5
    assert qf.status(model).fast_steps == 79 * LINEAR


def test_a_short_call_is_not_worth_it() -> None:
    model = build()
    captured(model)
    generate(model, 5)
    assert graph.describe(model).reasons == {"too few tokens to be worth a capture": 1}


class Meddler(LogitsProcessor):
    """Does something to the model after some steps of a call."""

    def __init__(self, act: Callable[[], Any], step: int = 8):
        self.act, self.left = act, step

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.left -= 1
        if self.left == 0:
            self.act()
        return scores


def meddled(act: Callable[[Any], Any], *, capture: bool) -> tuple[torch.Tensor, Any]:
    """The tokens of a call during which `act` is done to the model."""
    model = build()
    qf.patch(model, backend="torch", cuda_graph=capture)
    tokens = generate(model, 24, logits_processor=LogitsProcessorList([Meddler(partial(act, model))]))
    return tokens, graph.describe(model)


def _replace_weight(model: Any) -> None:
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().roll(1, 0).clone())


def _replace_data(model: Any) -> None:
    model.lm_head.weight.data = model.lm_head.weight.data.roll(1, 0).clone()


def _write_in_place(model: Any) -> None:
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.roll(1, 0))


def _replace_module(model: Any) -> None:
    head = torch.nn.Linear(32, 64, bias=False)
    head.weight = torch.nn.Parameter(model.lm_head.weight.detach().roll(1, 0).clone())
    model.lm_head = head


def _hook(model: Any) -> None:
    model.lm_head.register_forward_hook(lambda module, args, out: -out)


def _forward(model: Any) -> None:
    own = model.lm_head.forward
    model.lm_head.forward = lambda x: -own(x)


def _scaling(model: Any) -> None:
    attention_of(model).scaling *= 3


def _other_class(model: Any) -> None:
    mlp = model.model.layers[0].mlp
    kind = type(mlp)
    mlp.__class__ = type(kind.__name__, (kind,), {"forward": lambda self, x: -kind.forward(self, x)})


def _fewer_layers(model: Any) -> None:
    model.config.num_hidden_layers = LINEAR


AGAIN = {
    "number": _scaling,
    "class": _other_class,
    "configuration": _fewer_layers,
    "weight": _replace_weight,
    "data": _replace_data,
    "module": _replace_module,
    "hook": _hook,
    "forward": _forward,
}


@pytest.mark.parametrize("what", AGAIN)
def test_what_changes_during_a_call_is_captured_again(what: str) -> None:
    expected, _ = meddled(AGAIN[what], capture=False)
    found, status = meddled(AGAIN[what], capture=True)
    assert torch.equal(found, expected)
    assert (status.captures, status.replays) == (2, 23 - 4)


def attention_of(model: Any) -> Any:
    return model.model.layers[-1].self_attn


CODE: dict[str, Callable[[Any], tuple[Any, str]]] = {
    "a class's forward": lambda model: (type(model.model.layers[0].mlp), "forward"),
    "the model's own": lambda model: (type(model.model.norm), "forward"),
    "a function of PyTorch": lambda model: (torch.nn.functional, "linear"),
    "a function of the module": lambda model: (sys.modules[type(attention_of(model)).__module__], "rotate_half"),
    "what attention is computed by": lambda model: (torch.nn.functional, "scaled_dot_product_attention"),
}


@pytest.mark.parametrize("what", CODE)
def test_code_that_changes_during_a_call_is_captured_again(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def enlarge(model: Any, patching: pytest.MonkeyPatch) -> None:
        owner, name = CODE[what](model)
        function = getattr(owner, name)
        patching.setattr(owner, name, lambda *args, **kwargs: -9 * function(*args, **kwargs))

    unchanged, _ = meddled(lambda model: None, capture=False)
    with monkeypatch.context() as patching:
        expected, _ = meddled(partial(enlarge, patching=patching), capture=False)
    found, status = meddled(partial(enlarge, patching=monkeypatch), capture=True)
    assert not torch.equal(unchanged, expected)
    assert torch.equal(found, expected)
    assert (status.captures, status.replays) == (2, 23 - 4)


def test_a_cache_whose_tensors_were_replaced_is_captured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[caches.GrowingCache] = []
    own = caches.GrowingCache.__init__

    def noted(self: caches.GrowingCache, *args: Any) -> None:
        made.append(self)
        own(self, *args)

    def replace(model: Any) -> None:
        layer = made[0].static.layers[-1]
        layer.keys = layer.keys.clone()

    monkeypatch.setattr(caches.GrowingCache, "__init__", noted)
    expected, _ = meddled(lambda model: None, capture=False)
    found, status = meddled(replace, capture=True)
    assert torch.equal(found, expected)
    assert (status.captures, status.replays) == (2, 23 - 4)


def test_weights_that_are_written_in_place_stay_captured() -> None:
    expected, _ = meddled(_write_in_place, capture=False)
    found, status = meddled(_write_in_place, capture=True)
    assert torch.equal(found, expected)
    assert (status.captures, status.replays) == (1, 21)


ENDS: dict[str, Callable[[Any], Any]] = {
    "switched off by QWEN_FASTDECODE=0": lambda model: os.environ.update(QWEN_FASTDECODE="0"),
    "the patch was taken off during the call": qf.unpatch,
}


@pytest.mark.parametrize("reason", ENDS)
def test_what_ends_replaying_during_a_call(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN_FASTDECODE", "1")
    model = build()
    expected = generate(model, 24)
    captured(model)
    own = state.state_of(model)
    processors = LogitsProcessorList([Meddler(partial(ENDS[reason], model))])
    assert torch.equal(generate(model, 24, logits_processor=processors), expected)
    assert (own.captures, own.replays) == (1, 5)
    assert {str(found): count for found, count in own.reasons.items()} == {reason: 1}
