"""Upstream's layers on prepared projections, and what one of their decode steps computes, allocates and dispatches."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet
from transformers.utils import logging

import qwen_fastdecode
from qwen_fastdecode.cli.compare.memory import peak_within
from qwen_fastdecode.ops.reference import decode_reference
from qwen_fastdecode.ops.step import Recipe, States, Step
from qwen_fastdecode.upstream.caches import read_states
from qwen_fastdecode.upstream.families import FAMILIES, HeadSizes, reader

HK, HV, D, HIDDEN, PROMPT = 16, 32, 128, 64, 8
MAX_DISTANCE = 1e-2  # relative RMS from upstream in bfloat16, which rounds at every step

logging.set_verbosity_error()  # which implementation upstream falls back to is part of the report


class Prepared(nn.Module):
    """A projection whose output is there already: [B, tokens, features]."""

    def __init__(self, features: int):
        super().__init__()
        self.features = features

    def prepare(self, B: int, tokens: int) -> None:
        self.output = torch.randn(B, tokens, self.features, dtype=torch.bfloat16)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.output


class Setup:
    """Layers with states after a prompt, ready for a decode step."""

    def __init__(self, B: int, layers: int, *, projections: bool = False):
        torch.manual_seed(0)
        config = Qwen3NextConfig(
            hidden_size=HIDDEN,
            num_hidden_layers=layers,
            layer_types=["linear_attention"] * layers,
            linear_num_key_heads=HK,
            linear_num_value_heads=HV,
            linear_key_head_dim=D,
            linear_value_head_dim=D,
        )
        self.B = B
        self.cache = DynamicCache(config=config)
        self.layers: Any = nn.ModuleList(_layer(config, i, projections) for i in range(layers)).to(torch.bfloat16)
        for tokens in (PROMPT, 1):  # the second one is the decode step that `step` repeats
            self.hidden_states = torch.randn(B, tokens, HIDDEN, dtype=torch.bfloat16)
            for layer in self.layers:
                for module in layer.modules():
                    if isinstance(module, Prepared):
                        module.prepare(B, tokens)
                self.step(layer)

    def step(self, layer: Any) -> Tensor:
        return layer(self.hidden_states, cache_params=self.cache)

    def states(self, layer: Any) -> States:
        states = read_states(self.cache, layer.layer_idx)
        assert isinstance(states, States), states
        return states


def _layer(config: Qwen3NextConfig, index: int, projections: bool) -> Qwen3NextGatedDeltaNet:
    layer = Qwen3NextGatedDeltaNet(config, index).eval()
    nn.init.uniform_(layer.dt_bias, -6, 1)  # memories of all lengths, as after training
    if not projections:
        layer.in_proj_qkvz, layer.in_proj_ba = Prepared(2 * (HK + HV) * D), Prepared(2 * HV)
        layer.out_proj = nn.Identity()
    return layer


Side = Callable[[Setup], AbstractContextManager]
SIDES: dict[str, Side] = {
    "upstream": lambda _: nullcontext(),
    "qwen_fastdecode": lambda setup: qwen_fastdecode.patched(setup.layers, backend="torch"),
}


class WrongResult(Exception):
    """Ours is further from float64 than upstream, or too far from upstream."""


def check(setup: Setup) -> dict[str, float]:
    """Relative RMS error of each side's output against float64; raises WrongResult if ours is wrong."""
    layer = setup.layers[0]
    saved = [state.clone() for state in setup.states(layer)]
    results: dict[str, list[Tensor]] = {}
    for side in SIDES:
        for state, copy in zip(setup.states(layer), saved, strict=True):
            state.copy_(copy)
        with SIDES[side](setup):
            out = setup.step(layer)
        results[side] = [out.view(setup.B, -1), *(state.clone() for state in setup.states(layer))]
    expected = _reference(layer, setup.hidden_states, saved)
    errors = {
        side: [_distance(x, y) for x, y in zip(result, expected, strict=True)] for side, result in results.items()
    }
    upstream, ours = errors.values()
    apart = [_distance(x, y) for x, y in zip(*results.values(), strict=True)]
    if any(o > u for o, u in zip(ours, upstream, strict=True)) or max(apart) > MAX_DISTANCE:
        raise WrongResult(f"wrong result at batch {setup.B}, no times: errors {errors}, apart by {apart}")
    return {side: error[0] for side, error in errors.items()}


def _reference(layer: Any, hidden_states: Tensor, states: list[Tensor]) -> list[Tensor]:
    """Output and both states after the step, in float64 but for the states' own rounding."""
    family = FAMILIES["qwen3_next"]
    own = States(states[0].clone(), states[1].clone())
    parts = family.parts(layer)
    step = Step(parts.project(hidden_states), reader(family, HeadSizes.of(layer)), own, parts.weights)
    return [decode_reference(step, Recipe((0, HV), layer.layer_norm_epsilon)), *own]


def _distance(x: Tensor, y: Tensor) -> float:
    return ((x.double() - y.double()).norm() / y.double().norm()).item()


def extra_memory(setup: Setup, side: str) -> float:
    """Peak of what one step allocates, in % of its recurrent state."""
    layer = setup.layers[0]
    with SIDES[side](setup):
        setup.step(layer)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled, record_function("step"):
            setup.step(layer)
    with TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiled.export_chrome_trace(str(trace))
        peak = peak_within(json.loads(trace.read_text())["traceEvents"], "step")
    return 100 * peak / setup.states(layer).recurrent.nbytes


class CountOperators(TorchDispatchMode):
    """Counts operators that compute; views, which only describe memory anew, apart."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()
        self.views: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        with self:  # what is made of other operators is counted as these
            result = func.decompose(*args, **kwargs or {})
        if result is not NotImplemented:
            return result
        view = func.is_view or func is torch.ops.aten._unsafe_view.default
        (self.views if view else self.operators)[str(func)] += 1
        return func(*args, **kwargs or {})


def count_operators(side: str) -> CountOperators:
    """Operators of one step of a whole layer, its three projections included."""
    setup = Setup(1, 1, projections=True)
    with SIDES[side](setup):
        setup.step(setup.layers[0])
        with CountOperators() as counted:
            setup.step(setup.layers[0])
    return counted
