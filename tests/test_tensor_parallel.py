"""Tensor parallelism on gloo processes: every rank's tokens are those of one process, and stale states are not read."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import tp_scenarios
from models import CHECKPOINTS, FAMILIES, TRAINED, build, load
from tp_ranks import on_ranks

import qwen_fastdecode as qf

BENCHMARKS = str(Path(__file__).parent.parent / "benchmarks")
FOUR = {"linear_num_key_heads": 4, "linear_num_value_heads": 8, "num_attention_heads": 4, "num_key_value_heads": 4}


def _all(rank: int, folders: list[Path]) -> dict[str, Any]:
    return {str(folder): tp_scenarios.on_a_rank(tp_scenarios.load_ranks(folder)) for folder in folders}


def compare(size: int, models: dict[Path, Any]) -> None:
    """Every scenario on `size` ranks against one process."""
    answers = on_ranks(size, _all, list(models))
    for folder, model in models.items():
        for name, expected in tp_scenarios.on_one_process(model).items():
            for rank, answer in enumerate(answers):
                assert torch.equal(answer[str(folder)][name], expected), f"{name}, {folder.name}, rank {rank} of {size}"


def test_two_ranks_with_trained_checkpoints() -> None:
    compare(2, {CHECKPOINTS / name: load(name) for name in TRAINED})


@pytest.mark.parametrize("size", [2, 4])
def test_tiny_models(size: int, tmp_path: Path) -> None:
    families = ["qwen3_next", "qwen3_5"] if size == 4 else [x for x in FAMILIES if x in ("qwen3_5_moe",)]
    models = {}
    for family in families:
        model = build(family, **FOUR)
        model.save_pretrained(tmp_path / family)
        models[tmp_path / family] = model
    compare(size, models)
