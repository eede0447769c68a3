"""Calls of a layer by position and by name: what the patched layer takes and refuses is what upstream's own does."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import LINEAR, PROMPT, build, cache_tensors, call_layer, forward, linear_layers
from torch import Tensor

import qwen_fastdecode as qf
from qwen_fastdecode.layer.plan import plan_of
from qwen_fastdecode.reasons import Reason
from qwen_fastdecode.upstream.calls import KNOWN, call_reader
from qwen_fastdecode.upstream.seams import unwrap

TOKEN = torch.linspace(-1, 1, 2 * 32).view(2, 1, 32)  # hidden states [B, 1, hidden size]


def parameters(layer: Any) -> list[str]:
    """The names after self and hidden_states in upstream's forward, its **kwargs aside."""
    found = inspect.signature(unwrap(type(layer).forward)).parameters.values()
    return [parameter.name for parameter in found if parameter.kind is not parameter.VAR_KEYWORD][2:]


def values(layer: Any, cache: Any) -> list[Any]:
    """What the decoder layer passes, in the order of `parameters`."""
    given = {"cache": cache, "cache_params": cache, "cache_position": torch.tensor([6]), "attention_mask": None}
    return [given[name] for name in parameters(layer)]


def by_position(layer: Any, cache: Any) -> Tensor:
    return layer(TOKEN, *values(layer, cache))


def by_position_and_name(layer: Any, cache: Any) -> Tensor:
    first, *others = values(layer, cache)
    return layer(TOKEN, first, **dict(zip(parameters(layer)[1:], others, strict=True)))


def by_name(layer: Any, cache: Any) -> Tensor:
    return call_layer(layer, TOKEN, cache)


def twice(layer: Any, cache: Any) -> Tensor:
    return layer(TOKEN, *values(layer, cache), attention_mask=None)


def too_many(layer: Any, cache: Any) -> Tensor:
    return layer(TOKEN, *values(layer, cache), None)


def unknown_name(layer: Any, cache: Any) -> Tensor:
    return layer(TOKEN, **dict(zip(parameters(layer), values(layer, cache), strict=True)), no_such_argument=1)


def both(call: Callable[[Any, Any], Tensor]) -> tuple[Any, Any, int]:
    """Upstream's outcome, the patched layer's, and how many steps that served fast."""
    model = build()
    layer, cache = linear_layers(model)[0], forward(model, PROMPT)[1]
    outcomes: list[Any] = []
    for own in (copy.deepcopy(cache), cache):
        try:
            with torch.no_grad():
                outcomes.append([call(layer, own), *cache_tensors(own)])
        except TypeError as error:
            outcomes.append(str(error))
        qf.patch(model)
    return *outcomes, plan_of(layer).fast_steps


@pytest.mark.parametrize("call", [by_position, by_position_and_name, by_name])
def test_a_call_that_upstream_takes_is_served_fast(call: Callable[[Any, Any], Tensor]) -> None:
    expected, actual, fast = both(call)
    assert fast == 1
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("call", [twice, too_many, unknown_name])
def test_a_call_that_upstream_refuses_is_refused_with_its_words(call: Callable[[Any, Any], Tensor]) -> None:
    expected, actual, fast = both(call)
    if isinstance(expected, str):
        assert actual == expected
        assert fast == 0
    else:  # from 5.9 on upstream takes any name
        assert call is unknown_name
        assert fast == 1


def test_the_signature_that_is_seen_is_upstreams() -> None:
    model = build()
    layer_class = type(linear_layers(model)[0])
    expected = inspect.signature(layer_class.forward)
    qf.patch(model)
    assert inspect.signature(layer_class.forward) == expected
    assert layer_class.forward.__name__ == inspect.unwrap(layer_class.forward).__name__


def test_upstream_names_no_argument_that_we_do_not_know() -> None:
    assert set(parameters(linear_layers(build())[0])) < set(KNOWN)


def of_5_3(self: Any, hidden_states: Any, cache_params: Any = None, cache_position: Any = None) -> None:
    """As upstream's was up to 5.3."""


def of_5_24(self: Any, hidden_states: Any, cache: Any = None, attention_mask: Any = None, **kwargs: Any) -> None:
    """As upstream's is from 5.24 on, where a decorator still takes cache_params."""


def hides(function: Callable[..., Any]) -> Callable[..., Any]:
    """As upstream's decorator was from 5.13 to 5.15: no functools.wraps."""

    def decorator(forward_func: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
            return forward_func(self, *args, **kwargs)

        return wrapped

    return decorator(function)


@pytest.mark.parametrize("decorate", [lambda function: function, hides])
def test_the_arguments_of_every_release_are_understood(decorate: Callable[..., Any]) -> None:
    old, new = call_reader(decorate(of_5_3)), call_reader(decorate(of_5_24))
    cache, mask, position = object(), torch.ones(1), torch.tensor([6])
    assert old((cache, position), {})[:3] == (cache, None, False)
    assert old((), {"cache_params": cache})[:3] == (cache, None, True)
    assert old((), {"cache_params": cache, "seq_idx": 1}) is None
    assert old((cache,), {"cache_params": cache}) is None
    assert new((cache, mask), {})[:3] == (cache, mask, False)
    assert new((), {"cache_params": cache})[0] is cache
    assert new((), {"cache": cache, "cache_params": None, "seq_idx": 1}).cache is cache
    assert new((cache, mask, 1), {}) is None


def test_without_a_cache_position_a_call_is_a_prompt_where_upstream_says_so() -> None:
    model = build()
    layer, cache = linear_layers(model)[0], forward(model, PROMPT)[1]
    asks = "cache_position" in parameters(layer)
    name = parameters(layer)[0]
    expected_cache = copy.deepcopy(cache)
    with torch.no_grad():
        expected = layer(TOKEN, **{name: expected_cache})
        qf.patch(model)
        actual = layer(TOKEN, **{name: cache})
    torch.testing.assert_close(actual, expected)
    for a, b in zip(cache_tensors(cache), cache_tensors(expected_cache), strict=True):
        torch.testing.assert_close(a, b)
    assert plan_of(layer).fallbacks == ({Reason.NO_CACHE_POSITION: 1} if asks else {})
    assert plan_of(layer).fast_steps == (0 if asks else 1)
    assert len(qf.status(model).layers) == LINEAR
