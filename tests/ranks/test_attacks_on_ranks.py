"""Two ranks that do not do the same, or share only a sharding: nobody's text may be wrong, nobody may hang."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import tp_scenarios
from models import build, generate
from test_tensor_parallel import FOUR, save
from torch.distributed.fsdp import fully_shard
from tp_ranks import on_ranks
from tp_scenarios import load_ranks

import qwen_fastdecode as qf
from qwen_fastdecode.steps import ranks
from qwen_fastdecode.upstream.unsettled import owing_layers

SEQUENCES = 512  # x 8 value heads: from 2,048 on a tensor-parallel step would be split


def _sharded(rank: int) -> dict[str, Any]:
    """Each rank has its own prompts, and the weights are sharded over both."""
    expected = _said(build("qwen3_5", **FOUR), rank)
    model = build("qwen3_5", **FOUR)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    qf.patch(model)
    said = _said(model, rank)
    status = qf.status(model)
    return {"equal": torch.equal(said, expected), "split": status.split_steps, "fast": status.fast_steps > 0}


def _said(model: Any, rank: int) -> torch.Tensor:
    prompt = torch.randint(1, 64, (SEQUENCES, 3), generator=torch.Generator().manual_seed(rank))
    return generate(model, 3, prompt)


@pytest.mark.slow
def test_weights_that_are_sharded_for_another_reason_are_not_tensor_parallel() -> None:
    assert on_ranks(2, _sharded) == [{"equal": True, "split": 0, "fast": True}] * 2


def _one_rank_copies(rank: int, folder: Path) -> dict[str, Any]:
    ranks.TIMEOUT = 3.0
    model = load_ranks(folder)
    qf.patch(model, head_parallel="on")
    cache, later = tp_scenarios.fresh(model), tp_scenarios.fresh(model)
    found = {"first": tp_scenarios.say(model, cache, tp_scenarios.FIRST)}
    kept = copy.deepcopy(cache) if rank == 0 else None
    found["later"] = tp_scenarios.say(model, later, tp_scenarios.MORE)
    qf.unpatch(model)
    found["owing"] = sum(1 for _ in owing_layers())
    found["nan"] = any(layer.recurrent_states[0].isnan().any() for layer in (cache.layers[0], later.layers[0]))
    found["spoilt copy"] = None if kept is None else bool(kept.layers[0].recurrent_states[0].isnan().any())
    found["on"] = tp_scenarios.say(model, later, tp_scenarios.FIRST)
    found["and on"] = tp_scenarios.say(model, cache, tp_scenarios.MORE)
    return found


def test_a_copy_that_one_rank_makes_alone(tmp_path: Path) -> None:
    """What both have goes on as if nothing had been; the copy, whose other half nobody sends, says so by NaN."""
    folder, model = save(tmp_path / "model", "qwen3_next", **FOUR)
    cache, later = tp_scenarios.fresh(model), tp_scenarios.fresh(model)
    expected = {
        "first": tp_scenarios.say(model, cache, tp_scenarios.FIRST),
        "later": tp_scenarios.say(model, later, tp_scenarios.MORE),
        "on": tp_scenarios.say(model, later, tp_scenarios.FIRST),
        "and on": tp_scenarios.say(model, cache, tp_scenarios.MORE),
    }
    for rank, found in enumerate(on_ranks(2, _one_rank_copies, folder)):
        for name, text in expected.items():
            assert torch.equal(found[name], text), name
        assert (found["owing"], found["nan"], found["spoilt copy"]) == (0, False, None if rank else True)


def _late(rank: int, folder: Path) -> dict[str, Any]:
    ranks.TIMEOUT = 2.0
    model = load_ranks(folder)
    qf.patch(model, head_parallel="on")
    cache = tp_scenarios.fresh(model)
    tp_scenarios.say(model, cache, tp_scenarios.FIRST)
    if rank == 1:
        dist.barrier()  # rank 0 has given up by now
    error = ""
    try:
        qf.unpatch(model)
    except qf.RanksDisagree as refused:
        error = str(refused)
    if rank == 0:
        dist.barrier()
    owing = sum(1 for _ in owing_layers())
    reads = ""
    if rank == 0:  # a reader who is alone is told so
        try:
            _ = cache.layers[0].recurrent_states
        except qf.RanksDisagree as refused:
            reads = str(refused)
    dist.barrier()
    return {"error": error, "owing": owing, "covered": qf.status(model).covered, "reads": reads}


def test_a_rank_that_unpatches_late_is_told(tmp_path: Path) -> None:
    """It gets no stale states, and stays patched."""
    folder, _ = save(tmp_path / "model", "qwen3_next", **FOUR)
    zero, one = on_ranks(2, _late, folder)
    assert "did not call it within 2 s" in zero["error"]
    assert "unpatch() failed on rank 0 of 2" in one["error"]
    assert zero["owing"] == one["owing"] > 0
    assert zero["covered"] == one["covered"] > 0
    assert zero["reads"].startswith("reading a cache decoded with split heads: ranks [1] of 2 did not call it")
