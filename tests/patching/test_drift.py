"""Code of Transformers that was not reviewed: what the self-test lets through, and what it refuses and why."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from drift import drift, modeling
from models import FAMILIES, LINEAR, build, generate, linear_layers

import qwen_fastdecode as qf
from qwen_fastdecode.layer import review as guard
from qwen_fastdecode.layer.selftest import self_test

NEW = 4
MODULE = modeling("qwen3_5")
LAYER, NORM, RULE = "Qwen3_5GatedDeltaNet", "Qwen3_5RMSNormGated", "torch_recurrent_gated_delta_rule"
CONVOLUTION = "torch_causal_conv1d_update" if hasattr(MODULE, "torch_causal_conv1d_update") else "causal_conv1d_update"
MASKED = "apply_mask_to_padding_states(hidden_states, attention_mask)"
REMARK = (MASKED, f"{MASKED}  # of left padding")  # changes the source of forward, and nothing else


class Drift(NamedTuple):
    """A change to upstream's source; `complaint`: what the refusal says."""

    name: str
    old: str
    new: str
    complaint: str = ""


HARMLESS = {
    "a comment": Drift(LAYER, *REMARK),
    "a renamed local": Drift(LAYER, "mixed_qkv", "projected"),
    "the same formula": Drift("l2norm", "return x * inv_norm", "return inv_norm * x"),
    "a renamed norm": Drift(LAYER, NORM, "RenamedRMSNormGated"),
}
KEEPS_MORE = """if cache_params is not None:
            cache_params.seen = getattr(cache_params, "seen", 0) + seq_len
            output = output * (1 + (cache_params.seen == 9))
        return output"""
OUTPUT = "in float32 these differ from upstream's: output by"
DRIFTS = {
    "an altered forward": Drift(
        LAYER, "beta = b.sigmoid()", "beta = 2 * b.sigmoid()", rf"{OUTPUT} \d\.\de-01, .*1e-05 is allowed"
    ),
    "a renamed projection": Drift(LAYER, "in_proj_z", "in_proj_gate", "it has no in_proj_z"),
    "a renamed parameter": Drift(LAYER, "dt_bias", "time_bias", "it has no dt_bias"),
    "a renamed size": Drift(LAYER, "self.num_k_heads", "self.n_k_heads", "its parts cannot be read: AttributeError"),
    "another activation": Drift(LAYER, "= config.hidden_act", "= 'gelu'", "convolution's activation is 'gelu'"),
    "another decode rule": Drift(RULE, "(v_t - kv_mem) * beta_t", "v_t * beta_t - kv_mem", OUTPUT),
    "another state": Drift(
        RULE,
        "core_attn_out = core_attn_out.t",
        "last_recurrent_state *= 1.001\n    core_attn_out = core_attn_out.t",
        rf"{OUTPUT} \d\.\de-04, recurrent state by \d\.\de-03",
    ),
    "another epsilon": Drift("l2norm", "+ eps", "+ 2 * eps", OUTPUT),
    "another gated norm": Drift(NORM, "self.weight * hid", "(1 + self.weight) * hid", OUTPUT),
    "no gated norm": Drift(LAYER, NORM, "Qwen3_5RMSNorm", "its norm, Qwen3_5RMSNorm, is not a gated RMSNorm"),
    "another window": Drift(CONVOLUTION, "_new[:, :, -state_len:]", "_new[:, :, :state_len]", OUTPUT),
    "a new argument": Drift(
        LAYER,
        "attention_mask: torch.Tensor | None = None,",
        "attention_mask=None, scale=1.0,",
        "its forward takes arguments that the fast step does not know: scale",
    ),
    "a renamed argument": Drift(LAYER, "cache_params", "past", "arguments that the fast step does not know: past"),
    "an output of NaN": Drift(LAYER, "return output", "return output * float('nan')", rf"{OUTPUT} nan, "),
    "a state of NaN": Drift(
        RULE,
        "core_attn_out = core_attn_out.t",
        "last_recurrent_state = last_recurrent_state * float('nan')\n    core_attn_out = core_attn_out.t",
        "recurrent state by nan",
    ),
    "more in the cache": Drift(LAYER, "return output", KEEPS_MORE, "upstream's own output after fast steps by"),
    "a constructor that fails": Drift(
        LAYER, "super().__init__()", "super().__init__(config)", "a small layer cannot be built: TypeError"
    ),
    "a forward that fails": Drift(
        LAYER, "beta = b.s", "beta = 1 / 0 * b.s", "upstream's prefill cannot run: ZeroDivisionError"
    ),
    "a decode step that fails": Drift(
        RULE,
        "delta = (v",
        "assert False, 'unsupported'\n        delta = (v",
        "upstream's decode step cannot run: AssertionError: unsupported",
    ),
}


def apply(monkeypatch: pytest.MonkeyPatch, change: Drift) -> Any:
    monkeypatch.setattr(MODULE, "RenamedRMSNormGated", getattr(MODULE, NORM), raising=False)
    remark = [REMARK] if change.name == LAYER and change[1:3] != REMARK else []
    return drift(monkeypatch, MODULE, change.name, *remark, (change.old, change.new))


@pytest.mark.parametrize("kind", HARMLESS)
def test_harmless_drift_is_patched_and_said_to_be_verified(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    apply(monkeypatch, HARMLESS[kind])
    model = build()
    expected = generate(model, NEW)
    report = qf.patch(model)
    assert report.covered == LINEAR
    (note,) = report.notes
    changed = "l2norm" if HARMLESS[kind].name == "l2norm" else f"{LAYER}.forward"
    assert f"Transformers {transformers.__version__} is not a version that was reviewed: {changed} differs" in note
    assert "It was verified at run time: 3 decode steps give upstream's output and states" in note
    assert note in str(qf.status(model))
    assert torch.equal(generate(model, NEW), expected)
    assert qf.status(model).fast_steps == LINEAR * (NEW - 1)
    assert note in qf.patch().notes


@pytest.mark.parametrize("kind", DRIFTS)
def test_drift_is_refused_and_what_differs_is_named(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    theirs = apply(monkeypatch, DRIFTS[kind])
    forward = vars(getattr(MODULE, LAYER))["forward"]
    with pytest.raises(qf.UnknownUpstream) as refusal:
        qf.patch()
    message = str(refusal.value)
    assert f"{MODULE.__name__} of Transformers {transformers.__version__} is not a version that was reviewed" in message
    assert refusal.match(f"the self-test failed: .*{DRIFTS[kind].complaint}")
    assert "Upgrade qwen-fastdecode, or install a reviewed release of Transformers" in message
    assert getattr(MODULE, DRIFTS[kind].name) is theirs
    assert vars(getattr(MODULE, LAYER))["forward"] is forward


@pytest.mark.parametrize("family", sorted({name.split()[0].rstrip(",") for name in FAMILIES}))
def test_every_family_passes_the_self_test_and_can_fail_it(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    module, name = modeling(family), type(linear_layers(build(family))[0]).__name__
    drift(monkeypatch, module, name, REMARK)
    model = build(family)
    assert "verified at run time" in "".join(qf.patch(model).notes)
    assert "verified at run time" in "".join(qf.status().notes)
    qf.unpatch()
    drift(monkeypatch, module, "l2norm", ("+ eps", "+ 2 * eps"))
    with pytest.raises(qf.UnknownUpstream, match=rf"model\.layers\.0\.linear_attn: .*{name}\.forward, l2norm differs"):
        qf.patch(model)


class OtherCache(transformers.DynamicCache):
    def update_recurrent_state(self, recurrent_states: Any, *args: Any, **kwargs: Any) -> Any:
        return super().update_recurrent_state(recurrent_states, *args, **kwargs)


def test_a_swapped_cache_class_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "DynamicCache", OtherCache)
    drift(monkeypatch, MODULE, LAYER, REMARK)
    model = build()
    expected = generate(model, NEW)
    with pytest.raises(
        qf.UnknownUpstream, match="self-test failed: its cache, OtherCache, cannot be served: a cache of unknown type"
    ):
        qf.patch(model)
    report = qf.patch(model, strict=False)
    assert report.covered == 0
    assert "its cache, OtherCache, cannot be served" in str(report)
    assert torch.equal(generate(model, NEW), expected)


def counted(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> Counter[str]:
    calls: Counter[str] = Counter()
    function: Callable[..., Any] = getattr(owner, name)

    def count(*args: Any, **kwargs: Any) -> Any:
        calls[name] += 1
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, count)
    return calls


def test_the_self_test_runs_once_a_process_whether_the_code_was_reviewed_or_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    judged: list[type] = []

    def judge(upstream: Any, forward: Any) -> Any:
        judged.append(upstream.layer_class)
        return self_test(upstream, forward)

    monkeypatch.setattr(guard, "self_test", judge)
    monkeypatch.setattr(guard, "_verdicts", {})
    for family in ("qwen3_next", "qwen3_5"):
        if family == "qwen3_5":
            drift(monkeypatch, MODULE, LAYER, REMARK)
        model = build(family)
        for _ in range(2):
            qf.patch(model)
            qf.status(model)
            qf.unpatch(model)
            qf.patch()
            generate(build(family), NEW)
            qf.unpatch()
    assert len(judged) == len({id(layer_class) for layer_class in judged})
    assert {type(layer) for layer in linear_layers(model)} <= set(judged)
    drift(monkeypatch, MODULE, "l2norm", ("+ eps", "+ 1 * eps"))
    judged.clear()
    qf.patch(model)
    assert judged == [type(linear_layers(model)[0])]  # it is other code now


@pytest.mark.parametrize(
    "switched_on", ["default dtype", "default device", "autocast", "inference mode", "kill switch"]
)
def test_the_self_test_leaves_no_trace(monkeypatch: pytest.MonkeyPatch, switched_on: str) -> None:
    layer_class = drift(monkeypatch, MODULE, LAYER, REMARK)
    upstream = guard.Upstream("qwen3_5", layer_class)
    forward = vars(layer_class)["forward"]
    before = torch.get_rng_state()
    contexts: dict[str, Any] = {
        "default device": lambda: torch.device("meta"),
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
        "inference mode": torch.inference_mode,
    }
    try:
        if switched_on == "default dtype":
            torch.set_default_dtype(torch.float64)
        if switched_on == "kill switch":
            monkeypatch.setenv("QWEN_FASTDECODE", "0")
        with contexts.get(switched_on, torch.enable_grad)():
            modes = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_default_dtype()
            assert self_test(upstream, forward).failure is None
            assert modes == (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_default_dtype())
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), before)
    assert vars(layer_class)["forward"] is forward
    assert not [thing for thing in gc.get_objects() if type(thing) is layer_class]
