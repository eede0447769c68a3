"""Whom a layer asks for its past: upstream's answer is ours, in every release."""

from __future__ import annotations

import copy
from typing import Any

import torch
from models import LINEAR, PROMPT, build, cache_tensors, call_layer, forward, linear_layers

import qwen_fastdecode as qf
from qwen_fastdecode.layer.plan import plan_of


def forget_last(cache: Any) -> bool:
    """Takes the past from the last linear layer alone; whether the others ask that one for theirs (up to 5.4)."""
    if not hasattr(cache, "layers"):
        cache.conv_states[LINEAR - 1] = cache.recurrent_states[LINEAR - 1] = None
        return True
    layer = cache.layers[LINEAR - 1]
    layer.has_previous_state = {0: False} if isinstance(layer.has_previous_state, dict) else False
    return False


@torch.no_grad()
def test_a_layer_asks_whom_upstream_asks_for_a_past() -> None:
    model = build()
    layer, theirs = linear_layers(model)[0], forward(model, PROMPT)[1]
    asks_last = forget_last(theirs)
    ours = copy.deepcopy(theirs)
    token = torch.linspace(-1, 1, 2 * 32).view(2, 1, 32)  # hidden states [B, 1, hidden size]
    expected = call_layer(layer, token, theirs)
    qf.patch(model)
    torch.testing.assert_close(call_layer(layer, token, ours), expected)
    for a, b in zip(cache_tensors(ours), cache_tensors(theirs), strict=True):
        torch.testing.assert_close(a, b)
    assert plan_of(layer).fast_steps == (0 if asks_last else 1)
