"""One provocation for each reason why a call is not a fast decode step: counted by name, and upstream's to the bit.

Each case runs on two models of the same weights, one of them patched, and compares logits and every tensor of the
cache bit for bit, or the error where upstream itself refuses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from models import LINEAR, PROMPT, build, cache_tensors, forward, generate, linear_layers
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

import qwen_fastdecode as qf
from qwen_fastdecode.reasons import Reason

TOKEN = PROMPT[:, :1]  # [2, 1]
Act = Callable[[PreTrainedModel], Any]  # returns what is to be the same


def prefilled(model: PreTrainedModel) -> Any:
    return forward(model, PROMPT)[1]


def step(model: PreTrainedModel, cache: Any = None, tokens: Tensor = TOKEN, **options: Any) -> list[Tensor]:
    logits, cache = forward(model, tokens, cache or prefilled(model), **options)
    return [logits, *cache_tensors(cache)]


def no_cache(model: PreTrainedModel) -> list[Tensor]:
    with torch.no_grad():
        return [model(TOKEN, use_cache=False).logits]


def no_previous_state(model: PreTrainedModel) -> list[Tensor]:
    return step(model, DynamicCache(config=model.config))


def after_reset(model: PreTrainedModel) -> list[Tensor]:
    cache = prefilled(model)
    for layer in cache.layers[:LINEAR]:  # a tensor that is there is not yet a state
        layer.reset()
    return step(model, cache)


def recording_past(model: PreTrainedModel) -> list[Tensor]:
    cache = prefilled(model)
    for layer in cache.layers[:LINEAR]:
        layer.record_past = True
    return step(model, cache)


def attention_mask(model: PreTrainedModel) -> list[Tensor]:
    masks = {"full_attention": None, "linear_attention": torch.tensor([[0], [1]])}  # upstream's own is None here
    return step(model, attention_mask=masks)


def packed_sequences(model: PreTrainedModel) -> list[Tensor]:
    return step(model, cu_seq_lens_q=torch.tensor([0, 1, 2], dtype=torch.int32))


def sequence_index(model: PreTrainedModel) -> list[Tensor]:
    return step(model, seq_idx=torch.tensor([[0], [0]], dtype=torch.int32))


def gradients(model: PreTrainedModel) -> list[Tensor]:
    cache = prefilled(model)
    logits = model(TOKEN, past_key_values=cache).logits
    assert logits.requires_grad
    return [logits, *cache_tensors(cache)]


def on_meta(model: PreTrainedModel) -> str:
    cache = forward(model.to("meta", torch.bfloat16), PROMPT.to("meta"))[1]
    return str([tensor.shape for tensor in step(model, cache, TOKEN.to("meta"))])


def autocast(model: PreTrainedModel) -> list[Tensor]:
    cache = prefilled(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return step(model, cache)


def exporting(model: PreTrainedModel) -> str:
    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.cache = model, prefilled(model)

        def forward(self, token: Tensor) -> Tensor:
            return self.model(token, past_key_values=self.cache).logits

    with torch.no_grad():
        return torch.export.export(Step(), (TOKEN,), strict=False).graph_module.code


class DoublingCache(DynamicCache):
    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, **options: Any) -> Tensor:
        return super().update_recurrent_state(2 * recurrent_states, layer_idx, **options)


def cache_of_another_class(model: PreTrainedModel) -> list[Tensor]:
    cache = DoublingCache(config=model.config)
    forward(model, PROMPT, cache)
    return step(model, cache)


def cache_layer_of_another_class(model: PreTrainedModel) -> list[Tensor]:
    cache = prefilled(model)

    class DoublingLayer(type(cache.layers[0])):
        def update_recurrent_state(self, recurrent_states: Tensor, *args: Any, **options: Any) -> Tensor:
            return super().update_recurrent_state(2 * recurrent_states, *args, **options)

    for layer in cache.layers[:LINEAR]:
        layer.__class__ = DoublingLayer
    return step(model, cache)


def change_states(cache: Any, name: str, change: Callable[[Tensor], Tensor]) -> None:
    for layer in cache.layers[:LINEAR]:
        states = getattr(layer, name)
        if isinstance(states, dict):
            states[0] = change(states[0])
        else:
            setattr(layer, name, change(states))


def longer_window(model: PreTrainedModel) -> list[Tensor]:
    cache = prefilled(model)
    change_states(cache, "conv_states", lambda conv: nn.functional.pad(conv, (1, 0)))
    return step(model, cache)


def transposed_state(model: PreTrainedModel) -> list[Tensor]:
    cache = prefilled(model)
    change_states(cache, "recurrent_states", lambda S: S.transpose(2, 3).contiguous().transpose(2, 3))
    return step(model, cache)


def meta_rates(model: PreTrainedModel) -> list[Tensor]:
    cache = prefilled(model)
    for layer in linear_layers(model):
        layer.A_log = nn.Parameter(layer.A_log.to("meta"))
    return step(model, cache)


@contextmanager
def subclassed_rates(model: PreTrainedModel) -> Iterator[None]:
    class Weight(Tensor):
        pass

    for layer in linear_layers(model):
        layer.A_log = nn.Parameter(layer.A_log.detach().as_subclass(Weight))
    yield


@contextmanager
def doubling_hook(model: PreTrainedModel) -> Iterator[None]:
    for layer in linear_layers(model):
        layer.norm.register_forward_hook(lambda module, args, output: 2 * output)
    yield


@contextmanager
def replaced_forward(model: PreTrainedModel) -> Iterator[None]:
    for layer in linear_layers(model):
        layer.norm.forward = lambda hidden_states, gate: hidden_states
    yield


@contextmanager
def added_bias(model: PreTrainedModel) -> Iterator[None]:
    for layer in linear_layers(model):
        layer.conv1d.bias = nn.Parameter(torch.ones(layer.conv1d.out_channels))
    yield


class Ungated(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight = norm.weight

    def forward(self, hidden_states: Tensor, gate: Tensor) -> Tensor:
        return self.weight * hidden_states


@contextmanager
def replaced_norm(model: PreTrainedModel) -> Iterator[None]:
    for layer in linear_layers(model):
        layer.norm = Ungated(layer.norm)
    yield


@contextmanager
def switched_off(model: PreTrainedModel) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QWEN_FASTDECODE", "0")
        yield


@contextmanager
def unchanged(model: PreTrainedModel) -> Iterator[None]:
    yield


@dataclass(frozen=True)
class Case:
    reason: Reason
    act: Act = step
    change: Callable[[PreTrainedModel], Any] = field(default=unchanged)  # after patching

    @property
    def name(self) -> str:
        return self.change.__name__ if self.act is step else self.act.__name__


CASES = [
    Case(Reason.SWITCHED_OFF, change=switched_off),
    Case(Reason.NO_CACHE, no_cache),
    Case(Reason.NO_PREVIOUS_STATE, no_previous_state),
    Case(Reason.NO_PREVIOUS_STATE, after_reset),
    Case(Reason.RECORDING_PAST, recording_past),
    Case(Reason.ATTENTION_MASK, attention_mask),
    Case(Reason.PACKED_SEQUENCES, packed_sequences),
    Case(Reason.PACKED_SEQUENCES, sequence_index),
    Case(Reason.GRAD_ENABLED, gradients),
    Case(Reason.META_DEVICE, on_meta),
    Case(Reason.AUTOCAST, autocast),
    Case(Reason.EXPORTING, exporting),
    Case(Reason.UNKNOWN_CACHE, cache_of_another_class),
    Case(Reason.UNKNOWN_CACHE, cache_layer_of_another_class),
    Case(Reason.UNEXPECTED_STATE, longer_window),
    Case(Reason.UNEXPECTED_STATE, transposed_state),
    Case(Reason.WEIGHTS_ELSEWHERE, meta_rates),
    Case(Reason.WEIGHT_TYPE, change=subclassed_rates),
    Case(Reason.HOOKED_SUBMODULE, change=doubling_hook),
    Case(Reason.HOOKED_SUBMODULE, change=replaced_forward),
    Case(Reason.CHANGED_LAYER, change=added_bias),
    Case(Reason.CHANGED_LAYER, change=replaced_norm),
]


REFUSED_UPSTREAM = (Reason.PACKED_SEQUENCES, Reason.WEIGHTS_ELSEWHERE)  # by some or all releases


def outcome(case: Case, model: PreTrainedModel) -> Any:
    """What the case gives, or the error that upstream raises."""
    try:
        with case.change(model):
            return case.act(model)
    except (RuntimeError, ValueError) as error:
        if case.reason not in REFUSED_UPSTREAM:
            raise
        return error


def same(actual: Any, expected: Any) -> bool:
    """Equal to the bit."""
    if isinstance(expected, list):
        pairs = zip(actual, expected, strict=True)
        return all(torch.equal(a.as_subclass(Tensor), b.as_subclass(Tensor)) for a, b in pairs)
    return repr(actual) == repr(expected)


@pytest.mark.parametrize(
    ("family", "case"),
    [
        pytest.param(
            family,
            case,
            id=f"{family}-{case.name}",
            marks=[pytest.mark.slow] if (family, case.act) == ("qwen3_next", exporting) else [],
        )
        for family in ("qwen3_next", "qwen3_5")
        for case in CASES
    ],
)
def test_a_fallback_is_counted_and_upstreams_to_the_bit(case: Case, family: str) -> None:
    expected = outcome(case, build(family))
    model = build(family)
    qf.patch(model)
    assert same(outcome(case, model), expected)
    fallbacks = qf.status(model).fallbacks
    calls = 1 if isinstance(expected, Exception) else LINEAR  # upstream raises in the first layer
    assert fallbacks.pop(str(case.reason)) == calls
    fallbacks.pop(str(Reason.SEVERAL_TOKENS), None)  # the prompt
    assert fallbacks == {}
    assert qf.status(model).fast_steps == 0


def test_several_tokens_fall_back() -> None:
    expected = step(build(), tokens=PROMPT[:, :3])
    model = build()
    qf.patch(model)
    assert same(step(model, tokens=PROMPT[:, :3]), expected)
    assert qf.status(model).fallbacks == {str(Reason.SEVERAL_TOKENS): 2 * LINEAR}


def test_every_reason_is_provoked() -> None:
    elsewhere = {Reason.SEVERAL_TOKENS, Reason.NO_CACHE_POSITION}  # above, and in test_arguments.py
    assert {case.reason for case in CASES} | elsewhere == set(Reason)


def test_after_a_fallback_the_fast_path_goes_on_from_its_state() -> None:
    model = build()
    tokens = generate(model, 4)
    qf.patch(model)
    cache = prefilled(model)
    for position, switched in [(6, False), (7, True), (8, False)]:
        with switched_off(model) if switched else unchanged(model):
            logits, cache = forward(model, tokens[:, position : position + 1], cache)
        assert torch.equal(logits[:, -1].argmax(-1), tokens[:, position + 1])
    assert qf.status(model).fast_steps == 2 * LINEAR
