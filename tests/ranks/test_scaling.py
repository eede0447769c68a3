"""benchmarks/ranks/scaling.py against what ranks really touch and send: 1, 2 and 4 of them."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import build, linear_layers
from test_tensor_parallel import FOUR, save
from torch import nn
from tp_ranks import on_ranks
from tp_scenarios import load_ranks
from transformers import DynamicCache

import qwen_fastdecode as qf
from qwen_fastdecode.upstream.families import FAMILIES, HeadSizes

BATCH, HIDDEN, FAMILY_NAMES = 2, 32, ("qwen3_next", "qwen3_5")


@torch.no_grad()
def touched(layer: nn.Module, model: Any) -> int:
    """Bytes of both states that a step changes: those that it writes, and so those that it reads."""
    cache = DynamicCache(config=model.config)
    for tokens in (6, 1, 1):
        states = [cache.layers[0].conv_states[0], cache.layers[0].recurrent_states[0]] if tokens == 1 else []
        before = [state.clone() for state in states]
        layer(torch.randn(BATCH, tokens, HIDDEN), cache_params=cache)
    changed = [state != old for state, old in zip(states, before, strict=True)]
    return sum(int(x.sum()) * 4 for x in changed)


def _measure(rank: int, folders: dict[str, Path]) -> dict[tuple[str, str], tuple[int, int, int]]:
    """(bytes of state written, collectives, bytes received) by family and side."""
    from benchmarks.ranks.tp_counts import of_a_layer

    found = {}
    for family, folder in folders.items():
        model = load_ranks(folder)
        for side in ("off", "on"):
            with qf.patched(model, head_parallel=side):
                seen = of_a_layer(model, BATCH)
                found[family, side] = (touched(linear_layers(model)[0], model), seen.count, seen.bytes)
    return found


@pytest.mark.parametrize("size", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_counts(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scaling = importlib.import_module("benchmarks.ranks.scaling")
    folders = {family: save(tmp_path / family, family, **FOUR)[0] for family in FAMILY_NAMES}
    for found in on_ranks(size, _measure, folders):
        for (family, side), measured in found.items():
            sizes = HeadSizes.of(linear_layers(build(family, **FOUR))[0])
            cost = scaling.Step(FAMILIES[family], sizes, HIDDEN, itemsize=4).cost(BATCH, size, side)
            assert measured == (cost.state_moved // 2, cost.collectives, cost.received), (family, side, size)
            assert cost.operations == 7 * BATCH * 8 * 16 * sizes.head_v_dim // (size if side == "on" else 1)


def test_the_plot_and_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    scaling = importlib.import_module("benchmarks.ranks.scaling")
    monkeypatch.setattr(sys, "argv", ["scaling.py", "--plot", str(tmp_path / "x" / "scaling.png")])
    scaling.main()
    assert (tmp_path / "x" / "scaling.png").stat().st_size > 10_000
    page = (Path(__file__).parents[2] / "docs" / "tensor-parallel.md").read_text(encoding="utf-8")
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| 8 ")]
    assert len(rows) == 6
    assert "\n".join(rows) in page
    with pytest.raises(ValueError, match="ranks: got 3, expected a divisor of the 16 key heads"):
        scaling.Step(FAMILIES["qwen3_5"], HeadSizes(16, 32, 128, 128, 4), 8).cost(1, 3, "on")
