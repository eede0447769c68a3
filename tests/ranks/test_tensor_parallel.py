"""Tensor parallelism on gloo processes: every rank's tokens are those of one process, and stale states are not read.

Starting ranks takes seconds, so each test does much on the ranks that it has.
"""

from __future__ import annotations

import pickle
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import tp_scenarios
import transformers
from models import CHECKPOINTS, TRAINED, build, linear_layers, load
from torch import Tensor, nn
from tp_ranks import on_ranks
from tp_scenarios import load_ranks

import qwen_fastdecode as qf
from qwen_fastdecode.layer.plan import plan_of
from qwen_fastdecode.steps import ranks as agreement
from qwen_fastdecode.upstream.unsettled import owing_layers

FOUR = {"linear_num_key_heads": 4, "linear_num_value_heads": 8, "num_attention_heads": 4, "num_key_value_heads": 4}
Names = tuple[str, ...]


def _tokens(rank: int, models: dict[Path, Names]) -> dict[Path, dict[str, Tensor]]:
    return {folder: tp_scenarios.on_a_rank(load_ranks(folder), names) for folder, names in models.items()}


def compare(size: int, models: dict[Path, tuple[Any, Names]]) -> None:
    """Scenarios on `size` ranks against one process."""
    answers = on_ranks(size, _tokens, {folder: names for folder, (_, names) in models.items()})
    for folder, (model, names) in models.items():
        for name, expected in tp_scenarios.on_one_process(model, names).items():
            for rank, answer in enumerate(answers):
                assert torch.equal(answer[folder][name], expected), f"{name}, {folder.name}, rank {rank} of {size}"


def save(folder: Path, family: str, **changes: Any) -> tuple[Path, Any]:
    """A random model, saved for the ranks to load."""
    model = build(family, **changes)
    model.save_pretrained(folder)
    return folder, model


def test_tokens_on_two_ranks() -> None:
    """Trained checkpoints; everything that can happen to a cache with stale states."""
    compare(2, {CHECKPOINTS / name: (load(name), tuple(tp_scenarios.SCENARIOS)) for name in TRAINED})


@pytest.mark.slow
def test_tokens_on_four_ranks(tmp_path: Path) -> None:
    names = ("chat", "unpatched_in_between", "reorder")
    models = [save(tmp_path / family, family, **FOUR) for family in ("qwen3_next", "qwen3_5_moe")]
    compare(4, {folder: (model, names) for folder, model in models})


class Wrapped(nn.Module):
    """Stands where an adapter would: a module of another class around upstream's."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)

    @property
    def weight(self) -> Tensor:
        return self.inner.weight


def _interrupted(model: Any) -> tuple[bool, bool, int]:
    """Whether a marked cache refuses to be pickled, this rank's heads are whole after an exception, marks left."""
    cache = tp_scenarios.fresh(model)

    def interrupted() -> None:
        with qf.patched(model, head_parallel="on"):
            tp_scenarios.say(model, cache, tp_scenarios.FIRST)
            pickle.dumps(cache)

    with pytest.raises(qf.PatchError, match="this rank holds only some"):
        interrupted()
    rank = torch.distributed.get_rank()
    own, other = cache.layers[0].recurrent_states[0].chunk(2, dim=1)[:: 1 - 2 * rank]
    return not own.isnan().any(), bool(other.isnan().all()), sum(1 for _ in owing_layers())


def _deferred(model: Any) -> tuple[bool, bool]:
    """Whether a ring is refused to split heads, and left to a rank that keeps all heads; nothing is patched after."""
    with pytest.raises(qf.LayerNotCovered, match="deferred_state=True is not for heads split over ranks"):
        qf.patch(model, head_parallel="on", deferred_state=True)
    refused = all(plan_of(layer) is None for layer in linear_layers(model))
    qf.patch(model, head_parallel="off", deferred_state=True)
    kept = all(plan is not None and plan.strategy.defers for plan in map(plan_of, linear_layers(model)))
    qf.unpatch(model)
    return refused, kept


def _counts(rank: int, divided: Path, undivided: Path) -> dict[str, Any]:
    """Collectives and bytes of one layer's step, by what was done to the model."""
    from benchmarks.ranks.tp_counts import of_a_layer

    found: dict[str, Any] = {}

    def count(name: str, model: Any, mode: str | None, new_tokens: int = 1) -> None:
        if mode is not None:
            qf.patch(model, head_parallel=mode)
        seen = of_a_layer(model, 2, new_tokens)
        found[name] = (dict(seen.calls), seen.bytes, qf.status(model).split_steps)
        qf.unpatch(model)

    model = load_ranks(divided)
    found["spoilt"] = _interrupted(model)
    found["deferred"] = _deferred(model)
    for mode in (None, "off", "on", "auto"):
        count(f"{mode}", model, mode)
    count("prefill", model, "on", new_tokens=3)
    for layer in linear_layers(model):
        layer.in_proj_qkvz = Wrapped(layer.in_proj_qkvz)
        layer.in_proj_ba = Wrapped(layer.in_proj_ba)
    count("adapted, auto", model, "auto")
    count("adapted, on", model, "on")
    qf.patch(model, head_parallel="on")
    found["tokens"] = tp_scenarios.chat(model, lambda mode: None)
    qf.unpatch(model)
    model = load_ranks(undivided)
    found["undivided"] = qf.patch(model, head_parallel="on").layers[0].reason
    found["undivided tokens"] = tp_scenarios.chat(model, lambda mode: None)
    found["undivided steps"] = (qf.status(model).fast_steps > 0, qf.status(model).split_steps)
    qf.unpatch(model)
    return found


def test_collectives_and_what_keeps_heads_together(tmp_path: Path) -> None:
    """qwen3_next on two ranks: a gather less a layer than upstream; one more where its gathers must stay."""
    folder, model = save(tmp_path / "divided", "qwen3_next", **FOUR)
    odd, odd_model = save(tmp_path / "odd", "qwen3_next", **FOUR | {"linear_num_key_heads": 1})
    B, hidden, key, value, HV = 2, 32, 4 * 16, 8 * 16, 8
    projections, heads, out = 2 * key + 2 * value + 2 * HV, value, hidden  # features, half of them from the other rank
    states = 2 * key * 4 + value * 4 + HV * 16 * 16  # of the taps and of the recurrent state
    prefill = 3 * (projections + out)
    for found in on_ranks(2, _counts, folder, odd):
        assert found["spoilt"] == (True, True, 0)
        assert found["deferred"] == (True, True)
        for name, gathers, features, split in (
            ("None", 3, projections + out, 0),
            ("off", 3, projections + out, 0),
            ("on", 2, heads + out, 2),
            ("auto", 2, heads + out, 2),
            ("prefill", 5, prefill + states, 1),
            ("adapted, auto", 3, projections + out, 0),
            ("adapted, on", 4, projections + heads + out, 2),
        ):
            assert found[name] == ({"all_gather": gathers}, features * B * 4 // 2, split), name
        assert torch.equal(found["tokens"], tp_scenarios.chat(model, lambda mode: None))
        assert found["undivided"] == "all heads on every rank: 1 key heads do not divide by 2 ranks"
        assert torch.equal(found["undivided tokens"], tp_scenarios.chat(odd_model, lambda mode: None))
        assert found["undivided steps"] == (True, 0)


def _disagreements(rank: int, folder: Path) -> dict[str, str]:
    """What each rank is told where the other does not do the same."""
    agreement.TIMEOUT = 3.0
    model, told = load_ranks(folder), {}

    def tell(name: str, act: Any) -> None:
        start = time.monotonic()
        try:
            act()
            told[name] = "nothing"
        except qf.RanksDisagree as error:
            told[name] = str(error)
        assert time.monotonic() - start < 20  # a bound on a hang, not a measure
        torch.distributed.barrier()

    tell("mode", lambda: qf.patch(model, head_parallel=("on", "off")[rank]))
    tell("backend", lambda: qf.patch(model, backend=("torch", "auto")[rank]))
    own, transformers.__version__ = transformers.__version__, ("5.23.0", "5.0.0")[rank]
    tell("version", lambda: qf.patch(model))
    transformers.__version__ = own
    tell("one does not patch", lambda: qf.patch(model) if rank == 0 else None)
    tell("it patches too late", lambda: qf.patch(model) if rank == 1 else None)
    group = agreement.Ranks(torch.distributed.group.WORLD, rank, 2)
    what = ("a call", "another call")[rank]
    tell("not the same thing", lambda: agreement.exchange(group, what, None))
    activation, linear_layers(model)[0].activation = linear_layers(model)[0].activation, ("silu", "gelu")[rank]
    try:
        tell("one fails", lambda: qf.patch(model))
    except qf.LayerNotCovered as error:
        told["one fails"] = f"itself: {error}"
        torch.distributed.barrier()
    linear_layers(model)[0].activation = activation
    told["patched by then"] = str(qf.status(model).covered)
    qf.patch(model, head_parallel="on")
    cache = tp_scenarios.fresh(model)
    tp_scenarios.say(model, cache, tp_scenarios.FIRST)
    tell("one does not unpatch", lambda: qf.unpatch(model) if rank == 0 else None)
    told["marks left"] = str(sum(1 for _ in owing_layers()))
    return told


@pytest.mark.slow
def test_ranks_that_disagree_are_told_so_within_seconds(tmp_path: Path) -> None:
    folder, _ = save(tmp_path / "model", "qwen3_5", **FOUR)
    zero, one = on_ranks(2, _disagreements, folder)
    assert zero["mode"] == "patch(): head_parallel is 'on' on rank 0, but 'off' on rank 1. Make them the same"
    assert one["mode"] == "patch(): head_parallel is 'off' on rank 1, but 'on' on rank 0. Make them the same"
    assert "backend is 'torch' on rank 0, but 'auto' on rank 1" in zero["backend"]
    assert "transformers' version is '5.0.0' on rank 1, but '5.23.0' on rank 0" in one["version"]
    assert "ranks [1] of 2 did not call it within 3 s of rank 0" in zero["one does not patch"]
    assert "patch() failed on rank 0 of 2: rank 0 waited 3 s for ranks [1], and gave up" in one["it patches too late"]
    assert zero["not the same thing"].startswith("a call: rank 1 of 2 was not there but at another call")
    assert one["not the same thing"].startswith("another call: rank 0 of 2 was not there but at a call")
    assert zero["one fails"].startswith("patch() failed on rank 1 of 2: LayerNotCovered: model.layers.0.linear_attn")
    assert one["one fails"].startswith("itself: model.layers.0.linear_attn")
    assert Counter(told["patched by then"] for told in (zero, one)) == {"0": 2}
    assert zero["one does not unpatch"].startswith("unpatch(): ranks [1] of 2 did not call it within 3 s of rank 0")


def test_only_known_names_of_head_parallel() -> None:
    with pytest.raises(ValueError, match="head_parallel: got 'yes', expected one of 'auto', 'on', 'off'"):
        qf.patch(build(), head_parallel="yes")


def test_without_ranks_nothing_is_split() -> None:
    model = build()
    assert qf.patch(model, head_parallel="on").layers[0].reason == ""
    tp_scenarios.chat(model, lambda mode: None)
    assert (qf.status(model).fast_steps > 0, qf.status(model).split_steps) == (True, 0)
