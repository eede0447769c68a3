"""Parts of a layer that change between two fast steps: each step works with what is there now, as upstream's does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import FEW_HEADS, LINEAR, PROMPT, build, cache_tensors, forward, linear_layers
from tolerances import FLOAT32_MODEL, relative_rms
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, weight_norm

import qwen_fastdecode as qf
from qwen_fastdecode.reasons import Reason

TOKENS = PROMPT[:, :3].split(1, dim=1)  # three times [2, 1]


def other(weight: Tensor) -> Tensor:
    """Other values of the same shape."""
    return weight.detach().flip(0) * 1.5


def other_rates(layer: Any) -> None:
    layer.A_log = nn.Parameter(other(layer.A_log))


def data_of_rates(layer: Any) -> None:
    layer.A_log.data = other(layer.A_log)


def rates_in_place(layer: Any) -> None:
    layer.A_log.data.copy_(other(layer.A_log))


def strided_rates(layer: Any) -> None:
    """Of the same shape and dtype; Triton's backend does not take the stride."""
    layer.A_log.data = other(layer.A_log).repeat_interleave(2)[::2]


def wide_rates(layer: Any) -> None:
    layer.A_log.data = other(layer.A_log).double()


def other_norm(layer: Any) -> None:
    norm = type(layer.norm)(layer.norm.weight.shape[0], eps=layer.norm.variance_epsilon)
    norm.weight = nn.Parameter(other(layer.norm.weight))
    layer.norm = norm


def other_taps(layer: Any) -> None:
    layer.conv1d.weight = nn.Parameter(other(layer.conv1d.weight))


def flat_taps(layer: Any) -> None:
    """The taps where they were, strided otherwise."""
    taps = other(layer.conv1d.weight)
    layer.conv1d.weight.data = taps.transpose(0, 2).contiguous().transpose(0, 2)


def swapped_rates(layer: Any) -> None:
    torch.utils.swap_tensors(layer.dt_bias, nn.Parameter(other(layer.dt_bias)))


class Marked(Tensor):
    """A tensor subclass that says nothing of itself."""


def rates_of_another_class(layer: Any) -> None:
    """The same object, which is of another class afterwards."""
    torch.utils.swap_tensors(layer.dt_bias, nn.Parameter(other(layer.dt_bias).as_subclass(Marked)))


def other_projection(layer: Any) -> None:
    name = next(name for name, _ in layer.named_children() if name.startswith("in_proj"))
    old = getattr(layer, name)
    new = nn.Linear(old.in_features, old.out_features, bias=False)
    new.weight = nn.Parameter(other(old.weight))
    setattr(layer, name, new)


def other_out_proj(layer: Any) -> None:
    new = nn.Linear(layer.out_proj.in_features, layer.out_proj.out_features, bias=False)
    new.weight = nn.Parameter(other(layer.out_proj.weight))
    layer.out_proj = new


def rates_that_are_no_parameter(layer: Any) -> None:
    rates = other(layer.A_log)
    del layer.A_log
    layer.A_log = rates


def rates_over_the_parameter(layer: Any) -> None:
    vars(layer)["A_log"] = other(layer.A_log)


class Half(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def parametrized_rates(layer: Any) -> None:
    parametrize.register_parametrization(layer, "A_log", Half())


def parametrized_taps(layer: Any) -> None:
    parametrize.register_parametrization(layer.conv1d, "weight", Half())


def weight_norm_of_taps(layer: Any) -> None:
    """The old kind: an attribute over the parameter, which a hook before each call makes anew."""
    weight_norm(layer.conv1d)


def new_weight_norm_of_taps(layer: Any) -> None:
    parametrizations.weight_norm(layer.conv1d)
    layer.conv1d.parametrizations.weight.original0.data.mul_(2)


def spectral_norm_of_a_projection(layer: Any) -> None:
    parametrizations.spectral_norm(layer.out_proj)


def other_weight_of_norm(layer: Any) -> None:
    layer.norm.weight = nn.Parameter(other(layer.norm.weight))


def other_class_of_norm(layer: Any) -> None:
    kind = type(layer.norm)
    layer.norm.__class__ = type(kind.__name__, (kind,), {"forward": lambda self, *args: 2 * kind.forward(self, *args)})


def other_class_of_conv1d(layer: Any) -> None:
    kind = type(layer.conv1d)
    taps = property(lambda self: other(self._parameters["weight"]))
    layer.conv1d.__class__ = type(kind.__name__, (kind,), {"weight": taps})


def other_class_of_layer(layer: Any) -> None:
    """A subclass with a property over a parameter, given to a living layer."""
    kind = type(layer)
    layer.__class__ = type(
        kind.__name__, (kind,), {"dt_bias": property(lambda self: other(self._parameters["dt_bias"]))}
    )


# What becomes of the steps afterwards: fast (None), or why not.
CHANGES: dict[Callable[[Any], None], Reason | None] = {
    other_rates: None,
    data_of_rates: None,
    rates_in_place: None,
    strided_rates: Reason.UNSUPPORTED_STEP,
    wide_rates: Reason.UNSUPPORTED_STEP,
    other_norm: None,
    other_taps: None,
    flat_taps: None,
    swapped_rates: None,
    rates_of_another_class: Reason.WEIGHT_TYPE,
    other_projection: None,
    other_out_proj: None,
    rates_that_are_no_parameter: None,
    rates_over_the_parameter: None,
    parametrized_rates: None,
    parametrized_taps: Reason.CHANGED_LAYER,
    new_weight_norm_of_taps: Reason.CHANGED_LAYER,
    weight_norm_of_taps: Reason.HOOKED_SUBMODULE,
    spectral_norm_of_a_projection: None,
    other_weight_of_norm: None,
    other_class_of_norm: Reason.CHANGED_LAYER,
    other_class_of_conv1d: Reason.CHANGED_LAYER,
    other_class_of_layer: None,
}


def steps_around(change: Callable[[Any], Any], model: nn.Module) -> list[Tensor]:
    """Logits of a step before and of two after the change of each layer, and the cache in the end."""
    _, cache = forward(model, PROMPT)
    logits = [forward(model, TOKENS[0], cache)[0]]
    for layer in linear_layers(model):
        change(layer)
    torch.manual_seed(0)  # spectral norm draws a vector
    logits += [forward(model, token, cache)[0] for token in TOKENS[1:]]
    return [*logits, *cache_tensors(cache)]


@pytest.mark.parametrize("family", [pytest.param("qwen3_next", marks=pytest.mark.slow), "qwen3_5"])
@pytest.mark.parametrize("change", CHANGES)
def test_the_next_step_works_with_what_is_there(change: Callable[[Any], None], family: str) -> None:
    expected = steps_around(change, build(family, **FEW_HEADS))
    model = build(family, **FEW_HEADS)
    qf.patch(model, backend="triton")
    actual = steps_around(change, model)
    assert max(map(relative_rms, actual, expected)) <= FLOAT32_MODEL
    status, reason = qf.status(model), CHANGES[change]
    assert status.fast_steps == (3 if reason is None else 1) * LINEAR
    assert status.fallbacks.get(str(reason), 0) == (0 if reason is None else 2 * LINEAR)


def test_sizes_that_upstream_cannot_work_with_are_upstreams_to_refuse() -> None:
    def change(layer: Any) -> None:
        layer.key_dim, layer.value_dim = layer.key_dim // 2, layer.value_dim + layer.key_dim

    for patched in (False, True):
        model = build()
        if patched:
            qf.patch(model)
        with pytest.raises(RuntimeError, match="is invalid for input of size"):
            steps_around(change, model)
    assert qf.status(model).fallbacks[str(Reason.CHANGED_LAYER)] == 1


def test_a_property_that_a_class_gets_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(layer: Any) -> None:
        rates = property(lambda self: other(self._parameters["A_log"]))
        monkeypatch.setattr(type(layer), "A_log", rates, raising=False)

    expected = steps_around(change, build())
    monkeypatch.undo()
    model = build()
    qf.patch(model)
    actual = steps_around(change, model)
    assert max(map(relative_rms, actual, expected)) <= FLOAT32_MODEL
    assert qf.status(model).fast_steps == 3 * LINEAR


def test_a_method_that_a_class_gets_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that qwen3_next splits its projections by."""
    name = "fix_query_key_value_ordering"

    def change(layer: Any) -> None:
        own = vars(type(layer))[name]
        if own.__name__ == name:  # of the first layer
            monkeypatch.setattr(type(layer), name, lambda *args: [x.flip(1) for x in own(*args)])

    expected = steps_around(change, build("qwen3_next"))
    monkeypatch.undo()
    model = build("qwen3_next")
    qf.patch(model)
    actual = steps_around(change, model)
    assert max(map(relative_rms, actual, expected)) <= FLOAT32_MODEL
    assert qf.status(model).fallbacks[str(Reason.CHANGED_LAYER)] == 2 * LINEAR
