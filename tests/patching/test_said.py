"""What a user is told besides the report: the log, one warning, counters that begin anew, types."""

from __future__ import annotations

import logging
import warnings
from typing import get_args

import pytest
import torch
from models import LINEAR, PROMPT, build, generate

import qwen_fastdecode as qf
from qwen_fastdecode.layer import dispatch
from qwen_fastdecode.names import BACKENDS, HEAD_PARALLEL, Backend, HeadParallel
from qwen_fastdecode.report import GraphStatus


def test_counters_begin_anew() -> None:
    model, other = build(), build()
    for patched in (model, other):
        qf.patch(patched)
        generate(patched)
    qf.reset_counters(model)
    assert (qf.status(model).fast_steps, qf.status(model).fallbacks) == (0, {})
    assert qf.status(other).fast_steps == 7 * LINEAR
    generate(model)
    assert qf.status(model).fast_steps == 7 * LINEAR
    qf.reset_counters()
    assert qf.status().fast_steps == 0


def test_a_loop_by_hand_under_grad_is_warned_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    dispatch._say_that_gradients_cost_the_fast_path.cache_clear()
    model = build()
    qf.patch(model)

    def two_steps() -> None:
        cache = model(PROMPT, use_cache=True).past_key_values
        for _ in range(2):
            model(PROMPT[:, :1], past_key_values=cache)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.no_grad():
            two_steps()
        generate(model)
    with pytest.warns(UserWarning, match=r"gradients enabled, so Transformers served it.*torch\.no_grad\(\)") as said:
        two_steps()
    assert len(said) == 1
    assert qf.status(model).fallbacks["gradients are enabled"] == 2 * LINEAR


def test_the_log_says_what_was_patched_and_undone(caplog: pytest.LogCaptureFixture) -> None:
    model = build()
    with caplog.at_level(logging.INFO, logger="qwen_fastdecode"):
        qf.patch(model)
        qf.unpatch(model)
    name = type(model).__qualname__
    assert caplog.messages == [
        f"patched {name}: {LINEAR} of {LINEAR} layers covered",
        f"unpatched {name}: {LINEAR} layers",
    ]


def test_choices_are_types() -> None:
    assert get_args(Backend) == BACKENDS == ("auto", "triton", "torch")
    assert get_args(HeadParallel) == HEAD_PARALLEL == ("auto", "on", "off")


def test_a_model_that_was_never_captured_says_so_and_why() -> None:
    status = GraphStatus(reasons={"a reason": 2, "another": 1}, details={"another": "more"})
    assert str(status).splitlines() == [
        "cuda_graph: nothing was captured",
        "cuda_graph: eager: a reason: 2",
        "cuda_graph: eager: another: 1 (more)",
    ]
