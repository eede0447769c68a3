"""What patch, unpatch, patched and status promise: who is covered, what is counted, what is left behind."""

from __future__ import annotations

import copy
import io
import json
import pickle
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest
import torch
from models import FAMILIES, LINEAR, PROMPT, TRAINED, build, fingerprint, forward, generate, linear_layers, load
from torch import nn
from transformers import PreTrainedModel

import qwen_fastdecode as qf
from qwen_fastdecode.layer import install
from qwen_fastdecode.layer.plan import plan_of
from qwen_fastdecode.names import PLAN
from qwen_fastdecode.report import COUNTING, PREFILL, LayerStatus, Status

NEW = 5  # tokens to generate: the first comes from the prompt's pass, the others from a decode step each
STEPS = LINEAR * (NEW - 1)


def plans(model: nn.Module) -> list[object]:
    return [plan_of(layer) for layer in linear_layers(model)]


def attributes(model: nn.Module) -> dict[str, set[str]]:
    return {name: set(vars(module)) for name, module in model.named_modules()}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_decodes_fast_and_says_the_same(family: str) -> None:
    model = build(family)
    expected, weights = generate(model, NEW), fingerprint(model)
    report = qf.patch(model)
    assert torch.equal(generate(model, NEW), expected)
    assert fingerprint(model) == weights
    assert [layer.family for layer in report.layers] == [family.split()[0].rstrip(",")] * LINEAR
    assert report.covered == LINEAR
    assert qf.status(model).fast_steps == STEPS
    assert qf.status(model).fallbacks == {"more than one token": LINEAR}


def test_another_model_of_the_class_stays_upstreams() -> None:
    model, other = build(seed=0), build(seed=1)
    expected, _ = forward(other, PROMPT)
    qf.patch(model)
    generate(other, NEW)
    assert qf.status(other).fast_steps == 0
    assert [layer.reason for layer in qf.status(other).layers] == ["not patched"] * LINEAR
    assert qf.status().fast_steps == 0
    assert torch.equal(forward(other, PROMPT)[0], expected)


def test_one_layer_can_be_patched_alone() -> None:
    model = build()
    qf.patch(linear_layers(model)[1])
    generate(model, NEW)
    assert [layer.fast_steps for layer in qf.status(model).layers] == [0, NEW - 1, 0]


def test_patch_of_everything_covers_the_living_and_the_unborn() -> None:
    model = build("qwen3_next")
    expected = generate(model, NEW)
    report = qf.patch()
    assert report.covered >= LINEAR
    assert torch.equal(generate(model, NEW), expected)
    later = build(seed=1)
    assert [(layer.covered, layer.reason) for layer in qf.status(later).layers] == [
        (True, "from its first use")
    ] * LINEAR
    generate(later, NEW)
    assert qf.status(later).fast_steps == qf.status(model).fast_steps == STEPS
    assert qf.status().fast_steps == 2 * STEPS
    assert "patch() of everything is on" in str(qf.status())


def test_patching_twice_changes_nothing() -> None:
    model = build()
    qf.patch(model)
    generate(model, NEW)
    before = plans(model)
    assert qf.patch(model).fast_steps == STEPS
    assert plans(model) == before
    qf.patch()
    qf.patch()
    assert plans(model) == before
    assert qf.status(model).fast_steps == STEPS


def test_another_backend_is_another_plan() -> None:
    model = build()
    before = qf.patch(model), plans(model)
    qf.patch(model, backend="torch")
    assert not set(before[1]) & set(plans(model))
    assert [plan.settings.backend for plan in plans(model)] == ["torch"] * LINEAR


def test_patched_nests() -> None:
    model = build()
    with qf.patched(model) as outer:
        generate(model, NEW)
        before = plans(model)
        with qf.patched(model, backend="torch"):
            assert not set(before) & set(plans(model))
            generate(model, NEW)
        assert plans(model) == before
        with qf.patched(model):
            generate(model, NEW)
        assert qf.status(model).fast_steps == 2 * STEPS
        assert outer.fast_steps == 0  # the report is of the moment of patching
    assert plans(model) == [None] * LINEAR


def test_patched_leaves_an_outer_patch_on() -> None:
    model, other = build(seed=0), build(seed=1)
    qf.patch(model, backend="torch")
    before = plans(model)
    with qf.patched():
        assert [plan.settings.backend for plan in plans(other)] == ["auto"] * LINEAR
    assert plans(model) == before
    assert plans(other) == [None] * LINEAR
    later = build(seed=2)
    generate(later, NEW)
    assert qf.status(later).fast_steps == 0


def test_patched_model_inside_patch_of_everything() -> None:
    model, other = build(seed=0), build(seed=1)
    qf.patch()
    before = plans(model), plans(other)
    with qf.patched(model, backend="torch"):
        generate(model, NEW)
        generate(other, NEW)
    assert (plans(model), plans(other)) == before
    assert qf.status(other).fast_steps == STEPS
    assert qf.status(model).fast_steps == 0


def test_patched_restores_after_an_exception() -> None:
    model = build()
    layer_class = type(linear_layers(model)[0])
    before = vars(layer_class)["forward"], attributes(model)
    with pytest.raises(KeyError), qf.patched(model):
        raise KeyError
    with pytest.raises(KeyError), qf.patched():
        raise KeyError
    assert (vars(layer_class)["forward"], attributes(model)) == before


@pytest.mark.parametrize("everything", [False, True])
def test_unpatch_leaves_no_residue(everything: bool) -> None:
    model = build("qwen3_next")
    layer_class = type(linear_layers(model)[0])
    before = vars(layer_class)["forward"], attributes(model), fingerprint(model)
    expected = generate(model, NEW)
    qf.patch(None if everything else model)
    assert vars(layer_class)["forward"] is not before[0]
    generate(model, NEW)
    qf.unpatch(None if everything else model)
    assert vars(layer_class)["forward"] is before[0]
    assert (attributes(model), fingerprint(model)) == before[1:]
    assert torch.equal(generate(model, NEW), expected)
    assert qf.status(model).fast_steps == 0
    assert qf.status().layers == ()


def test_the_class_stays_patched_while_one_model_is() -> None:
    model, other = build(seed=0), build(seed=1)
    qf.patch(model)
    qf.patch(other)
    qf.unpatch(model)
    generate(model, NEW)
    generate(other, NEW)
    assert (qf.status(model).fast_steps, qf.status(other).fast_steps) == (0, STEPS)


def test_a_class_that_inherited_forward_inherits_it_again() -> None:
    class Derived(type(linear_layers(build())[0])):
        pass

    inherited = Derived.forward
    install.ensure_patched(Derived)
    assert Derived.forward is not inherited
    install.release(keep_classes=False)
    assert "forward" not in vars(Derived)
    assert Derived.forward is inherited


def test_a_model_that_is_gone_holds_nothing() -> None:
    model = build()
    layer_class = type(linear_layers(model)[0])
    upstream = vars(layer_class)["forward"]
    qf.patch(model)
    del model
    assert qf.status().layers == ()
    qf.unpatch()
    assert vars(layer_class)["forward"] is upstream


def pickled(model: PreTrainedModel) -> PreTrainedModel:
    return pickle.loads(pickle.dumps(model))


def saved(model: PreTrainedModel) -> PreTrainedModel:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled, saved])
def test_a_copy_of_a_patched_model_is_not_patched(duplicate) -> None:
    model = build()
    expected = generate(model, NEW)
    qf.patch(model)
    twin = duplicate(model)
    assert torch.equal(generate(twin, NEW), expected)
    assert [(layer.covered, layer.reason) for layer in qf.status(twin).layers] == [(False, "not patched")] * LINEAR
    generate(model, NEW)
    assert (qf.status(twin).fast_steps, qf.status(model).fast_steps) == (0, STEPS)
    qf.patch(twin)
    generate(twin, NEW)
    assert (qf.status(twin).fast_steps, qf.status(model).fast_steps) == (STEPS, STEPS)


def test_unpatch_of_a_model_excludes_it_from_patch_of_everything() -> None:
    model, other = build(seed=0), build(seed=1)
    qf.patch()
    qf.unpatch(model)
    generate(model, NEW)
    generate(other, NEW)
    assert qf.status(other).fast_steps == STEPS
    assert [(layer.covered, layer.reason) for layer in qf.status(model).layers] == [(False, "excluded")] * LINEAR
    qf.patch(model)
    generate(model, NEW)
    assert qf.status(model).fast_steps == STEPS
    qf.unpatch(model)
    qf.unpatch()
    assert PLAN not in vars(linear_layers(model)[0])


def test_the_kill_switch_works_before_and_after_patching(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    expected = generate(model, NEW)
    monkeypatch.setenv("QWEN_FASTDECODE", "0")
    qf.patch(model)
    assert torch.equal(generate(model, NEW), expected)
    assert qf.status(model).fast_steps == 0
    monkeypatch.delenv("QWEN_FASTDECODE")
    assert torch.equal(generate(model, NEW), expected)
    assert qf.status(model).fast_steps == STEPS
    monkeypatch.setenv("QWEN_FASTDECODE", "0")
    assert torch.equal(generate(model, NEW), expected)
    assert qf.status(model).fast_steps == STEPS
    assert qf.status(model).fallbacks["switched off by QWEN_FASTDECODE=0"] == 2 * STEPS


@pytest.mark.parametrize("checkpoint", TRAINED)
def test_the_plan_has_what_a_rank_works_on(checkpoint: str) -> None:
    model = load(checkpoint)
    qf.patch(model)
    config = model.config
    sizes = plan_of(linear_layers(model)[0]).sizes
    assert sizes.num_k_heads_per_tp == config.linear_num_key_heads
    assert sizes.num_v_heads_per_tp == config.linear_num_value_heads
    assert sizes.key_dim_per_tp == config.linear_num_key_heads * config.linear_key_head_dim
    assert sizes.value_dim_per_tp == config.linear_num_value_heads * config.linear_value_head_dim
    assert sizes.v_heads_per_k_head == config.linear_num_value_heads // config.linear_num_key_heads


def test_a_status_is_a_table_to_read() -> None:
    long = "its forward was replaced on the instance by some_package.some_module.some_function, which is not upstream's"
    layers = (
        LayerStatus("model.layers.0.linear_attn", "qwen3_5", "torch", True, "", 12, {"no cache": 1, PREFILL: 2}),
        LayerStatus("model.layers.1.linear_attn", "qwen3_5", "upstream", False, long),
        LayerStatus("model.layers.10.linear_attn", "qwen3_5", "upstream", False, long),
        LayerStatus("model.layers.11.linear_attn", "qwen3_5", "upstream", False, "its conv1d has a bias"),
    )
    status = Status(layers, ("A note.", long))
    assert str(status).splitlines() == [
        "qwen_fastdecode: 1 of 4 gated DeltaNet layers covered",
        "layers                          family   backend   fast steps  prefills  fallbacks",
        "model.layers.0.linear_attn      qwen3_5  torch     12          2         1",
        "2 x model.layers.*.linear_attn  qwen3_5  upstream  0           0         0          see below",
        "model.layers.11.linear_attn     qwen3_5  upstream  0           0         0          its conv1d has a bias",
        "fallback: no cache: 1",
        long,
        "A note.",
    ]
    assert (status.prefills, status.fallbacks) == (2, {"no cache": 1, PREFILL: 2})
    assert json.loads(json.dumps(status.to_dict()))["layers"][0]["fallbacks"] == {"no cache": 1, PREFILL: 2}
    html = ElementTree.fromstring(f"<div>{status._repr_html_()}</div>")
    assert [row.find("td").text for row in html.iter("tr") if row.find("td") is not None] == [
        "model.layers.0.linear_attn",
        "2 x model.layers.*.linear_attn",
        "model.layers.11.linear_attn",
    ]


def test_a_status_says_what_is_not_counted_where_that_may_be_so() -> None:
    layer = LayerStatus("model.layers.0.linear_attn", "qwen3_5", "torch", True)
    for fast_steps, fallbacks, said in [(0, {}, False), (9, {PREFILL: 1}, False), (0, {PREFILL: 1}, True)]:
        text = str(Status((replace(layer, fast_steps=fast_steps, fallbacks=fallbacks),)))
        assert (COUNTING in text) is said


def test_a_status_names_the_layers_of_the_model() -> None:
    model = build()
    report = qf.patch(model)
    names = [name for name, module in model.named_modules() if module in linear_layers(model)]
    assert [layer.name for layer in report.layers] == names
    assert [layer.backend for layer in report.layers] == ["torch"] * LINEAR
    assert str(report).startswith(f"qwen_fastdecode: {LINEAR} of {LINEAR} gated DeltaNet layers covered\n")
