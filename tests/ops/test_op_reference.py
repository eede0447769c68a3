"""The float64 reference against upstream's own layers in float64: the law that every backend is held to."""

from __future__ import annotations

import pytest
import torch
from models import FAMILIES as INSTALLED
from models import build, linear_layers
from tolerances import FLOAT32, relative_rms
from transformers import DynamicCache

from qwen_fastdecode.ops.reference import decode_reference
from qwen_fastdecode.ops.step import Recipe, States, Step
from qwen_fastdecode.upstream.caches import read_states
from qwen_fastdecode.upstream.families import FAMILIES, HeadSizes, read_norm, reader

TEXT = [family for family in INSTALLED if "vision" not in family]


@pytest.mark.parametrize("family", TEXT)
@torch.no_grad()
def test_reference_is_upstreams_law(family: str) -> None:
    """Three decode steps after a prompt. Upstream takes float64 to float32 for the rule and for the norm."""
    model = build(family).double()
    layer = linear_layers(model)[-1]  # olmo_hybrid up to 5.20 asks the last one whether there is a past
    cache = DynamicCache(config=model.config)
    hidden_states = torch.randn(2, 8, 32, dtype=torch.float64)
    layer(hidden_states[:, :5], cache_params=cache, attention_mask=None)
    known, sizes = FAMILIES[family.split(",")[0]], HeadSizes.of(layer)
    norm = read_norm(known.read_modules(layer)[1])
    for t in range(5, 8):
        x = hidden_states[:, t : t + 1]
        conv, recurrent = (state.clone() for state in read_states(cache, layer.layer_idx))
        expected = layer(x, cache_params=cache, attention_mask=None)
        parts = known.parts(layer)
        step = Step(parts.project(x), reader(known, sizes), States(conv, recurrent), parts.weights)
        out = decode_reference(step, Recipe((0, sizes.num_v_heads), norm.eps, norm.gate, known.beta_scale(layer)))
        states = read_states(cache, layer.layer_idx)
        assert isinstance(states, States)
        assert relative_rms(parts.project_out(out), expected) <= FLOAT32
        assert torch.equal(conv, states.conv)
        assert relative_rms(recurrent, states.recurrent) <= FLOAT32
