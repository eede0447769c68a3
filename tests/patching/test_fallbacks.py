"""One provocation for each reason why a call is not a fast decode step: counted by name, and upstream's to the bit.

Each case runs on two models of the same weights, one of them patched, and compares logits and every tensor of the
cache bit for bit, or the error where upstream itself refuses.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from models import LINEAR, PROMPT, build, cache_tensors, call_layer, forward, generate, linear_layers
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.testing._internal.two_tensor import TwoTensor
from transformers import Cache, DynamicCache, PreTrainedModel

import qwen_fastdecode as qf
from qwen_fastdecode.reasons import Reason

TOKEN = PROMPT[:, :1]  # [2, 1]
HIDDEN = torch.linspace(-1, 1, 64).view(2, 1, 32)
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


def each_layer(model: PreTrainedModel, run: Callable[[Callable[[Tensor, Any], Tensor], Any], Tensor]) -> list[Tensor]:
    """What `run` returns for each gated DeltaNet layer, given its step (of hidden states and a cache) and a cache."""
    cache = prefilled(model.requires_grad_(False))
    with torch.no_grad():
        return [run(partial(call_layer, layer), copy.deepcopy(cache)) for layer in linear_layers(model)]


def traced(model: PreTrainedModel) -> list[Tensor]:
    """With some hidden states, and run with others."""
    return each_layer(
        model, lambda step, cache: torch.jit.trace(lambda x: step(x, cache), HIDDEN, check_trace=False)(2 * HIDDEN)
    )


def recorded(model: PreTrainedModel) -> list[Tensor]:
    return each_layer(model, lambda step, cache: make_fx(lambda x: step(x, cache))(HIDDEN)(2 * HIDDEN))


def forward_gradients(model: PreTrainedModel) -> list[Tensor]:
    def run(step: Callable[[Tensor, Any], Tensor], cache: Any) -> Tensor:
        with forward_ad.dual_level():
            return torch.cat(forward_ad.unpack_dual(step(forward_ad.make_dual(HIDDEN, torch.ones_like(HIDDEN)), cache)))

    return each_layer(model, run)


def function_transform(model: PreTrainedModel) -> list[Tensor]:
    def run(step: Callable[[Tensor, Any], Tensor], cache: Any) -> Tensor:
        both = torch.func.jvp(lambda x: step(x, copy.deepcopy(cache)), (HIDDEN,), (torch.ones_like(HIDDEN),))
        return torch.cat(both)

    return each_layer(model, run)


@contextmanager
def function_mode(model: PreTrainedModel) -> Iterator[None]:
    class Doubling(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **kwargs or {})
            return 2 * result if function is nn.functional.softplus else result

    with Doubling():
        yield


def wrapped_states(model: PreTrainedModel) -> list[Tensor]:
    """Of a class whose memory is not its value."""
    cache = prefilled(model)
    change_states(cache, "recurrent_states", lambda S: TwoTensor(S.clone(), S.clone()))
    return [forward(model, TOKEN, cache)[0]]


@contextmanager
def subclassed_projections(model: PreTrainedModel) -> Iterator[None]:
    for layer in linear_layers(model):
        first = next(module for name, module in layer.named_children() if name.startswith("in_proj"))
        first.register_forward_hook(lambda module, args, out: out.as_subclass(Marked) if out.shape[1] == 1 else out)
        layer.out_proj.register_forward_hook(lambda module, args, output: output.as_subclass(Tensor))
    yield


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


def shared_state(model: PreTrainedModel) -> list[Tensor]:
    """Two sequences in one place: upstream cannot copy into that, a kernel would write it twice."""
    cache = prefilled(model)
    change_states(cache, "recurrent_states", lambda S: S[:1].expand(len(S), -1, -1, -1))
    return step(model, cache)


def overlapping_window(model: PreTrainedModel) -> list[Tensor]:
    cache = prefilled(model)
    change_states(cache, "conv_states", lambda conv: conv[:1].expand(len(conv), -1, -1))
    return step(model, cache)


class ReadDoubledCache(DynamicCache):
    """Overrides a method that reads, none that writes."""

    def get_recurrent_state(self, *args: Any, **options: Any) -> Any:
        state = super().get_recurrent_state(*args, **options)
        return None if state is None else 2 * state


class DenyingCache(DynamicCache):
    """Says that there is no past, so that each token is a prompt."""

    def has_previous_state(self, *args: Any, **options: Any) -> bool:
        return False


def cache_that_denies_its_past(model: PreTrainedModel) -> list[Tensor]:
    cache = DenyingCache(config=model.config)
    forward(model, PROMPT, cache)
    return step(model, cache)


def cache_that_reads_otherwise(model: PreTrainedModel) -> list[Tensor]:
    cache = ReadDoubledCache(config=model.config)
    forward(model, PROMPT, cache)
    return step(model, cache)


def method_set_on_a_cache(model: PreTrainedModel) -> list[Tensor]:
    cache = prefilled(model)
    update = cache.update_recurrent_state
    cache.update_recurrent_state = lambda states, *args, **options: update(2 * states, *args, **options)
    return step(model, cache)


def method_set_on_a_cache_layer(name: str) -> Act:
    def act(model: PreTrainedModel) -> list[Tensor]:
        cache = prefilled(model)
        for layer in cache.layers[:LINEAR]:
            method = getattr(layer, name)
            setattr(layer, name, lambda states, *args, method=method, **options: method(2 * states, *args, **options))
        return step(model, cache)

    act.__name__ = f"{name}_set_on_a_cache_layer"
    return act


def replaced_cache_method(model: PreTrainedModel) -> list[Tensor]:
    cache, own = prefilled(model), Cache.update_recurrent_state
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Cache, "update_recurrent_state", lambda self, states, *a, **k: own(self, 2 * states, *a, **k))
        return step(model, cache)


def subclassed_inputs(model: PreTrainedModel) -> list[Tensor]:
    cache = prefilled(model)
    with torch.no_grad():
        inputs = model.get_input_embeddings()(TOKEN).as_subclass(Marked)
        output = model(inputs_embeds=inputs, past_key_values=cache, use_cache=True)
    return [output.logits, *cache_tensors(output.past_key_values)]


class Marked(Tensor):
    """A tensor subclass that says nothing of itself."""


@contextmanager
def hook_on_every_module(model: PreTrainedModel) -> Iterator[None]:
    norms = {id(layer.norm) for layer in linear_layers(model)}
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: 3 * output if id(module) in norms else None
    )
    try:
        yield
    finally:
        hook.remove()


def setting(name: str, change: Callable[[Any], Any]) -> Callable[[PreTrainedModel], Any]:
    """Something of a layer that a plan was made from has another value afterwards."""

    @contextmanager
    def changed(model: PreTrainedModel) -> Iterator[None]:
        for layer in linear_layers(model):
            change(layer)
        yield

    changed.__name__ = name
    return changed


def larger_epsilon(layer: Any) -> None:
    layer.norm.variance_epsilon = 0.5


def epsilon_in_a_tensor(layer: Any) -> None:
    layer.norm.variance_epsilon = torch.tensor(0.5)


def other_gate(layer: Any) -> None:
    layer.norm.activation = "sigmoid"


def other_activation(layer: Any) -> None:
    layer.activation = "gelu"


def other_reordering(layer: Any) -> None:
    if hasattr(layer, "fix_query_key_value_ordering"):
        order = layer.fix_query_key_value_ordering
        layer.fix_query_key_value_ordering = lambda *args: [x.flip(-1) for x in order(*args)]
    else:
        layer.norm.variance_epsilon = 0.25


def doubled(owner: Callable[[Any], Any], name: str) -> Callable[[PreTrainedModel], Any]:
    """A function of Transformers' own that gives twice as much afterwards, the first of its results if it has more."""

    @contextmanager
    def replaced(model: PreTrainedModel) -> Iterator[None]:
        place = owner(linear_layers(model)[0])
        own = getattr(place, name)

        def twice(*args: Any, **options: Any) -> Any:
            result = own(*args, **options)
            return (2 * result[0], *result[1:]) if isinstance(result, tuple) else 2 * result

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(place, name, twice)
            yield

    replaced.__name__ = f"replaced_{name}"
    return replaced


def module_of(layer: Any) -> Any:
    return sys.modules[type(layer).__module__]


def norm_class_of(layer: Any) -> Any:
    return type(layer.norm)


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
def compiled_norm(model: PreTrainedModel) -> Iterator[None]:
    """As `norm.compile()` leaves it, with a backend that computes something else."""
    for layer in linear_layers(model):
        layer.norm._compiled_call_impl = lambda *args, norm=layer.norm: 2 * norm.forward(*args)
    yield


@contextmanager
def added_bias(model: PreTrainedModel) -> Iterator[None]:
    for layer in linear_layers(model):
        layer.conv1d.bias = nn.Parameter(torch.ones(layer.conv1d.out_channels))
    yield


def parameter_of_norm(layer: nn.Module) -> None:
    layer.norm.bias = nn.Parameter(torch.ones_like(layer.norm.weight))


def tensor_of_norm(layer: nn.Module) -> None:
    layer.norm.bias = torch.ones_like(layer.norm.weight)


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
    Case(Reason.EXPORTING, traced),
    Case(Reason.EXPORTING, recorded),
    Case(Reason.TRANSFORMED, forward_gradients),
    Case(Reason.TRANSFORMED, function_transform),
    Case(Reason.TRANSFORMED, change=function_mode),
    Case(Reason.STATE_TYPE, wrapped_states),
    Case(Reason.UNSUPPORTED_STEP, change=subclassed_projections),
    Case(Reason.UNKNOWN_CACHE, cache_of_another_class),
    Case(Reason.UNKNOWN_CACHE, cache_layer_of_another_class),
    Case(Reason.UNEXPECTED_STATE, longer_window),
    Case(Reason.UNKNOWN_CACHE, method_set_on_a_cache),
    Case(Reason.UNKNOWN_CACHE, method_set_on_a_cache_layer("update_recurrent_state")),
    Case(Reason.UNKNOWN_CACHE, replaced_cache_method),
    Case(Reason.UNSUPPORTED_STEP, shared_state),
    Case(Reason.UNSUPPORTED_STEP, overlapping_window),
    Case(Reason.TENSOR_TYPE, subclassed_inputs),
    Case(Reason.WEIGHTS_ELSEWHERE, meta_rates),
    Case(Reason.WEIGHT_TYPE, change=subclassed_rates),
    Case(Reason.HOOKED_SUBMODULE, change=doubling_hook),
    Case(Reason.HOOKED_SUBMODULE, change=replaced_forward),
    Case(Reason.HOOKED_SUBMODULE, change=compiled_norm),
    Case(Reason.CHANGED_LAYER, change=added_bias),
    Case(Reason.CHANGED_LAYER, change=setting("parameter_of_norm", parameter_of_norm)),
    Case(Reason.CHANGED_LAYER, change=setting("tensor_of_norm", tensor_of_norm)),
    Case(Reason.CHANGED_LAYER, change=replaced_norm),
    Case(Reason.CHANGED_LAYER, change=setting("larger_epsilon", larger_epsilon)),
    Case(Reason.CHANGED_LAYER, change=setting("epsilon_in_a_tensor", epsilon_in_a_tensor)),
    Case(Reason.CHANGED_LAYER, change=setting("other_gate", other_gate)),
    Case(Reason.CHANGED_LAYER, change=setting("other_activation", other_activation)),
    Case(Reason.CHANGED_LAYER, change=setting("other_reordering", other_reordering)),
    Case(Reason.GLOBAL_HOOKS, change=hook_on_every_module),
    Case(Reason.CHANGED_UPSTREAM, change=doubled(norm_class_of, "forward")),
    Case(Reason.CHANGED_UPSTREAM, change=doubled(lambda layer: nn.functional, "softplus")),
]
if "causal_conv1d_update" not in vars(linear_layers(build())[0]):  # up to 5.14 a layer keeps what it calls
    CASES += [
        Case(Reason.CHANGED_UPSTREAM, change=doubled(module_of, "causal_conv1d_update")),
        Case(Reason.CHANGED_UPSTREAM, change=doubled(module_of, "torch_recurrent_gated_delta_rule")),
    ]
if hasattr(Cache, "get_recurrent_state"):  # 5.21 on
    CASES.append(Case(Reason.UNKNOWN_CACHE, cache_that_reads_otherwise))
elif callable(getattr(Cache, "has_previous_state", None)):  # 5.5 on
    CASES.append(Case(Reason.UNKNOWN_CACHE, cache_that_denies_its_past))


# By some or all releases.
REFUSED_UPSTREAM = (Reason.PACKED_SEQUENCES, Reason.WEIGHTS_ELSEWHERE, Reason.UNSUPPORTED_STEP)


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


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5"])
@pytest.mark.parametrize("case", [case for case in CASES if case.act is step], ids=lambda case: case.name)
def test_a_change_between_fast_steps_is_noticed(case: Case, family: str) -> None:
    """What a served step found is not taken for granted by the next."""
    expected = outcome(case, build(family))
    model = build(family)
    qf.patch(model)
    step(model)
    step(model)
    assert qf.status(model).fast_steps == 2 * LINEAR
    assert same(outcome(case, model), expected)
    assert qf.status(model).fallbacks[str(case.reason)] == LINEAR
    assert qf.status(model).fast_steps == 2 * LINEAR


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
