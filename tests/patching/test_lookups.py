"""What upstream's decode step looks up by name when it runs, and somebody replaces: what is there counts."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import FAMILIES, LINEAR, PROMPT, USUAL, build, cache_tensors, forward, judge_upstream, linear_layers
from tolerances import FLOAT32_MODEL, relative_rms
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.activations import ACT2FN, ClassInstantier

import qwen_fastdecode as qf
from qwen_fastdecode.layer.plan import plan_of
from qwen_fastdecode.reasons import Reason

TOKENS = PROMPT[:, :3].split(1, dim=1)  # three times [2, 1]


class Doubled(nn.Module):
    """Twice the SiLU, or twice the sigmoid."""

    gate = staticmethod(nn.functional.silu)

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.gate(x)


class DoubledSigmoid(Doubled):
    gate = staticmethod(torch.sigmoid)


class Replacing:
    """Puts things where others were, for the length of a test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, model: nn.Module):
        layer = linear_layers(model)[0]
        self.module = sys.modules[type(layer).__module__]
        self.norm = type(layer.o_norm if hasattr(layer, "o_norm") else layer.norm)
        self.put = monkeypatch.setattr
        self.put_item = monkeypatch.setitem

    def double(self, owner: Any, name: str) -> None:
        function = getattr(owner, name)
        self.put(owner, name, lambda *args, **kwargs: 2 * function(*args, **kwargs))


def activation(replacing: Replacing) -> None:
    replacing.put_item(ACT2FN, "silu", Doubled)
    replacing.put_item(ACT2FN, "sigmoid", DoubledSigmoid)


def table_of_activations(replacing: Replacing) -> None:
    replacing.put(replacing.module, "ACT2FN", ClassInstantier({**ACT2FN, "silu": Doubled}))


def reading_of_the_table(replacing: Replacing) -> None:
    replacing.put(ClassInstantier, "__getitem__", lambda table, name: Doubled())


def code_of_an_activation(replacing: Replacing) -> None:
    replacing.double(type(ACT2FN["silu"]), "forward")


def norms_call(replacing: Replacing) -> None:
    """A class gets a `__call__` of its own."""
    inherited = replacing.norm.__call__
    replacing.put(replacing.norm, "__call__", lambda *args: 2 * inherited(*args), raising=False)


def call_of_every_module(replacing: Replacing) -> None:
    call = nn.Module._call_impl

    def doubled(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        out = call(self, *args, **kwargs)
        return 2 * out if type(self) is replacing.norm else out

    replacing.put(nn.Module, "_call_impl", doubled)


def attribute_of_every_module(replacing: Replacing) -> None:
    read = nn.Module.__getattr__
    replacing.put(
        nn.Module, "__getattr__", lambda self, name: read(self, name) * 2 if name == "A_log" else read(self, name)
    )


def masking(replacing: Replacing) -> None:
    """Called at every step, mask or none."""
    replacing.double(replacing.module, "apply_mask_to_padding_states")


def length_of_keys(replacing: Replacing) -> None:
    replacing.double(replacing.module, "l2norm")


def functions_of_the_module(replacing: Replacing) -> None:
    """The module's `F` is another, that of everybody else is not."""
    functions = SimpleNamespace(**vars(nn.functional))
    functions.softplus = lambda x: 2 * nn.functional.softplus(x)
    replacing.put(replacing.module, "F", functions)


def convolution(replacing: Replacing) -> None:
    replacing.double(nn.functional, "conv1d")


def silu(replacing: Replacing) -> None:
    replacing.double(nn.functional, "silu")


def function_of_torch(replacing: Replacing) -> None:
    replacing.double(torch, "rsqrt")


CHANGES = [
    activation,
    table_of_activations,
    reading_of_the_table,
    code_of_an_activation,
    norms_call,
    call_of_every_module,
    attribute_of_every_module,
    masking,
    length_of_keys,
    functions_of_the_module,
    convolution,
    silu,
    function_of_torch,
]


def steps(model: nn.Module, change: Callable[[], None] = lambda: None) -> list[Tensor]:
    """Logits of a step before and of two after the change, and the cache in the end."""
    _, cache = forward(model, PROMPT)
    logits = [forward(model, TOKENS[0], cache)[0]]
    change()
    logits += [forward(model, token, cache)[0] for token in TOKENS[1:]]
    return [*logits, *cache_tensors(cache)]


@pytest.mark.parametrize(
    ("change", "family"),
    [(change, USUAL) for change in CHANGES]
    + [(activation, family) for family in FAMILIES if family != USUAL and "vision" not in family],
)
def test_what_is_found_under_a_name_is_what_counts(
    change: Callable[[Replacing], None], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(family)
    before = steps(model)
    with monkeypatch.context() as patching:
        expected = steps(model, lambda: change(Replacing(patching, model)))
    qf.patch(model)
    with monkeypatch.context() as patching:
        actual = steps(model, lambda: change(Replacing(patching, model)))
    status = qf.status(model)
    noticed = str(Reason.CHANGED_UPSTREAM) in status.fallbacks
    if "causal_conv1d_update" not in vars(linear_layers(model)[0]):  # up to 5.14 it is, and fewer names are looked up
        assert noticed
        assert not all(map(torch.equal, expected, before))
    assert status.fast_steps == (1 if noticed else 3) * LINEAR
    assert status.fallbacks.get(str(Reason.CHANGED_UPSTREAM), 0) == (2 * LINEAR if noticed else 0)
    assert max(map(relative_rms, actual, expected)) <= FLOAT32_MODEL
    steps(model)  # with everything back in its place
    assert qf.status(model).fast_steps == (4 if noticed else 6) * LINEAR


def test_a_function_for_prompts_is_the_business_of_whoever_puts_it_there(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    qf.patch(model)
    module = Replacing(monkeypatch, model).module
    for name in ("torch_chunk_gated_delta_rule", "causal_conv1d_fn"):
        function = getattr(module, name, None)
        if function is not None:
            monkeypatch.setattr(module, name, lambda *args, function=function, **kwargs: function(*args, **kwargs))
    steps(model)
    assert qf.status(model).fast_steps == 3 * LINEAR


def test_layers_that_are_alike_share_what_is_compared() -> None:
    model = build()
    qf.patch(model)
    plans = [plan for plan in map(plan_of, linear_layers(model)) if plan is not None]
    assert len(plans) == LINEAR
    assert len({id(plan.lookups) for plan in plans}) == 1


def test_activations_are_judged_by_real_numbers() -> None:
    judge_upstream()
    with FakeTensorMode():
        assert qf.patch(build()).covered == LINEAR


def test_an_activation_that_was_replaced_before_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the class passed the self-test before, and where the self-test has another activation."""
    model, other = build(), build(hidden_act="swish")
    qf.patch()
    qf.unpatch()
    with monkeypatch.context() as patching:
        patching.setitem(ACT2FN, "swish", Doubled)
        with pytest.raises(qf.LayerNotCovered, match="activation 'swish' is not the silu: somebody replaced it"):
            qf.patch(other)
    monkeypatch.setitem(ACT2FN, "silu", Doubled)
    with pytest.raises(qf.PatchError):
        qf.patch(model)
