"""`cuda_graph=True` on two tensor-parallel ranks, with a stand-in for the graph: they capture, replay and give up
together, and a rank that is alone with a change says so instead of leaving the other to wait.

Each rank runs all cases of a test, as starting ranks takes seconds.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import cuda_graph_stand_in
import pytest
import torch
import torch.distributed as dist
from models import LINEAR, generate
from test_tensor_parallel import FOUR, save
from tp_ranks import on_ranks
from tp_scenarios import FIRST, MORE, load_ranks
from transformers import StoppingCriteria, StoppingCriteriaList

import qwen_fastdecode as qf
from qwen_fastdecode import graph
from qwen_fastdecode.graph import call, capture, install
from qwen_fastdecode.steps import ranks
from qwen_fastdecode.upstream.sharding import local_part

STEPS = 20  # of a call: a first one, a capture, and replays
capturing = contextmanager(cuda_graph_stand_in.without_norms)
Change = Callable[[Any, pytest.MonkeyPatch], Any]


class After(StoppingCriteria):
    """Does something after these numbers of new tokens; it never stops."""

    def __init__(self, does: Callable[[], Any], *counts: int):
        self.does, self.lengths = does, [FIRST.shape[1] + count for count in counts]

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        if input_ids.shape[1] in self.lengths:
            self.does()
        return torch.zeros(len(input_ids), dtype=torch.bool)


def counts(model: Any) -> tuple[int, int, int, dict[str, int]]:
    found = graph.describe(model)
    return found.captures, found.compared, found.replays, found.reasons


def states_meanwhile(model: Any, prompt: torch.Tensor) -> list[torch.Tensor]:
    """A recurrent state, read twice while a graph is held, and replays in between."""
    held: list[Any] = []
    found: list[torch.Tensor] = []
    forward = type(model).forward

    def seen(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = forward(self, *args, **kwargs)
        held[:] = [out.past_key_values.layers[0]]
        return out

    reader = After(lambda: found.append(held[0].recurrent_states[0].clone()), 8, 14)
    type(model).forward = seen
    try:
        generate(model, STEPS, prompt, stopping_criteria=StoppingCriteriaList([reader]))
    finally:
        type(model).forward = forward
    return found


def then_more(model: Any) -> torch.Tensor:
    """A turn that may be captured, and a second one on the cache that it returned."""
    options = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    first = model.generate(FIRST, attention_mask=torch.ones_like(FIRST), pad_token_id=0, **options)
    text = torch.cat([first.sequences, MORE], dim=1)
    return generate(model, 4, text, past_key_values=first.past_key_values)


def _keys() -> int:
    """Of the store that ranks meet in."""
    dist.barrier()  # nobody is about to take one away,
    keys = dist.group.WORLD.get_group_store().num_keys()
    dist.barrier()  # nor to leave another
    return keys


def _replayed(rank: int, folder: Path) -> dict[str, Any]:
    model, said = load_ranks(folder), {}
    with pytest.MonkeyPatch.context() as patch, capturing(patch):
        for mode in ("on", "off"):
            qf.patch(model, backend="torch", head_parallel=mode, cuda_graph=True)
            said[mode] = generate(model, STEPS, FIRST), counts(model), qf.status(model).split_steps
            said[f"{mode}, states"] = states_meanwhile(model, FIRST), counts(model)[2]
            keys = _keys()
            said[f"{mode}, more"] = then_more(model)
            said[f"{mode}, keys"] = _keys() - keys
            qf.unpatch(model)
        said["left"] = len(install._installed), cuda_graph_stand_in.RecordedGraph.living
    return said


@pytest.mark.parametrize("family", ["qwen3_5", pytest.param("qwen3_next", marks=pytest.mark.slow)])
def test_the_same_tokens_from_replays(family: str, tmp_path: Path) -> None:
    folder, model = save(tmp_path / family, family, **FOUR)
    expected, more, states = generate(model, STEPS, FIRST), then_more(model), states_meanwhile(model, FIRST)
    for said in on_ranks(2, _replayed, folder):
        for mode in ("on", "off"):
            tokens, counted, split = said[mode]
            assert torch.equal(tokens, expected)
            assert counted == (1, 1, STEPS - 3, {})
            assert split == (LINEAR * (STEPS - 1) if mode == "on" else 0)
            read, replays = said[f"{mode}, states"]
            assert len(read) == 2
            torch.testing.assert_close(read, states)
            assert said[f"{mode}, keys"] == 0
            assert replays == 2 * (STEPS - 3)
            assert torch.equal(said[f"{mode}, more"], more)
        assert said["left"] == (0, 0)


def _hooked(model: Any, patch: pytest.MonkeyPatch) -> Any:
    return model.lm_head.register_forward_hook(lambda module, args, out: None).remove


def _without_memory(model: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(call, "fits", lambda cache, limit: False)


def _failing(model: Any, patch: pytest.MonkeyPatch) -> None:
    """In the middle of a step, where the other rank goes on recording."""

    class Failing(cuda_graph_stand_in.RecordedGraph):
        def record(self, step: Any) -> Any:
            hook = model.model.layers[2].register_forward_pre_hook(_out_of_memory)
            try:
                return super().record(step)
            finally:
                hook.remove()

    patch.setattr(capture, "recorder", Failing)


def _out_of_memory(module: Any, args: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def _short_of_memory(model: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(call, "free_bytes", lambda device: 0)


def _differing(model: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(call, "_distance", lambda found, expected: 0.5)


def _slow(model: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(call, "worth_it", lambda eager_ms, replay_ms: False)


# What is so on one rank: its own reason, captures, comparisons and replays of both.
ALONE: dict[str, tuple[Change, str, tuple[int, int, int]]] = {
    "a hook": (_hooked, "hooks on the model's modules", (0, 0, 0)),
    "no memory": (_without_memory, "too little memory for a cache with fixed addresses", (0, 0, 0)),
    "a failure": (_failing, "the step could not be captured (OutOfMemoryError: CUDA out of memory)", (0, 0, 0)),
    "no room to compare": (_short_of_memory, "", (1, 0, STEPS - 2)),
    "a difference": (_differing, "the first replay differed from the eager step (by 0.5, relatively)", (1, 1, 0)),
    "slow replays": (_slow, "replaying was no faster than the eager step", (1, 1, 1)),
}


def _alone(rank: int, folder: Path) -> dict[str, Any]:
    found = {}
    model = load_ranks(folder)
    for name, (change, _, _) in ALONE.items():
        with pytest.MonkeyPatch.context() as patch, capturing(patch):
            qf.patch(model, backend="torch", head_parallel="on", cuda_graph=True)
            undo = change(model, patch) if rank == 1 else None
            found[name] = generate(model, STEPS, FIRST), counts(model), graph.describe(model).details
            if undo is not None:
                undo()
    return found


@pytest.mark.filterwarnings("ignore:qwen_fastdecode, cuda_graph=True")
def test_what_one_rank_cannot_none_does(tmp_path: Path) -> None:
    folder, model = save(tmp_path / "model", "qwen3_5", **FOUR)
    expected = generate(model, STEPS, FIRST)
    for rank, found in enumerate(on_ranks(2, _alone, folder)):
        for name, (_, reason, counted) in ALONE.items():
            tokens, (*done, reasons), details = found[name]
            assert torch.equal(tokens, expected), name
            assert tuple(done) == counted, name
            if not reason:
                assert reasons == {}
            elif rank == 1:
                assert [*reasons] == [reason.partition(" (")[0]], name
            else:
                assert reasons == {"another rank of the model goes on eagerly": 1}, name
                assert details == {"another rank of the model goes on eagerly": f"rank 1: {reason}"}, name


def moved(model: Any) -> None:
    """A weight lies elsewhere; only the address of the rank's own part tells (before DTensors, that is the weight)."""
    weight = model.model.layers[0].linear_attn.out_proj.weight
    if local_part(weight) is weight:
        weight.data = weight.data.clone()
    else:
        weight._local_tensor = local_part(weight).clone()


# What one rank alone asks for, so that it makes no step in vain.
WATCHING: dict[str, Callable[[], dict[str, Any]]] = {
    "it looks at every step": lambda: {"stopping_criteria": StoppingCriteriaList([After(lambda: None)])},
    "it keeps the cache": lambda: {"return_dict_in_generate": True},
}


def _ended(model: Any, last: int, **alone: Any) -> torch.Tensor:
    """A text that ends by a token."""
    said = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": last, "pad_token_id": 0}
    result = model.generate(FIRST[:1], attention_mask=torch.ones_like(FIRST[:1]), **said, **alone)
    return result if isinstance(result, torch.Tensor) else result.sequences


def _switch_off() -> None:
    os.environ["QWEN_FASTDECODE"] = "0"


def _changed(rank: int, folder: Path) -> dict[str, Any]:
    ranks.TIMEOUT = 2.0
    model, found = load_ranks(folder), {}

    def said(change: Callable[[], Any], **options: Any) -> torch.Tensor:
        return generate(model, STEPS, FIRST, stopping_criteria=StoppingCriteriaList([After(change, 8)]), **options)

    with pytest.MonkeyPatch.context() as patch, capturing(patch):
        qf.patch(model, backend="torch", head_parallel="on", cuda_graph=True)
        found["all"] = said(lambda: moved(model)), counts(model)
        for name, options in WATCHING.items():
            qf.reset_counters(model)
            alone = options() if rank == 1 else {}
            found[name] = _ended(model, int(found["all"][0][0, -6]), **alone), counts(model)
        qf.patch(model, backend="torch", head_parallel="off", cuda_graph=True)  # what a rank alone can take off
        qf.reset_counters(model)
        found["each its own"] = said((lambda: moved(model), _switch_off)[rank]), counts(model)
        os.environ.pop("QWEN_FASTDECODE", None)
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=4), dist.group.WORLD)  # of the other rank's waiting
        with pytest.raises(RuntimeError) as raised:
            said((lambda: None, lambda: moved(model))[rank])
        found["alone"] = type(raised.value).__name__, str(raised.value)
    dist.destroy_process_group()  # its ranks are not at the same place any more
    store = f"file://{folder}/afterwards"
    dist.init_process_group("gloo", store, timedelta(seconds=20), rank=rank, world_size=2)
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:qwen_fastdecode, cuda_graph=True")
def test_what_changes_during_a_call(tmp_path: Path) -> None:
    """On all ranks: another capture. On one: an error that names it, within the timeout."""
    folder, model = save(tmp_path / "model", "qwen3_5", **FOUR)
    expected = generate(model, STEPS, FIRST)
    zero, one = on_ranks(2, _changed, folder)
    for found in (zero, one):
        tokens, counted = found["all"]
        assert torch.equal(tokens, expected)
        assert counted == (2, 2, STEPS - 5, {})
        tokens, (*done, _) = found["each its own"]
        assert torch.equal(tokens, expected)
        assert done == [1, 1, 5]
        for name in WATCHING:
            ended, counted = found[name]
            end = expected[0, : ended.shape[1]]
            assert torch.equal(ended[0], end), name
            assert end[-1] == expected[0, -6]
            assert FIRST.shape[1] + 5 < len(end) < expected.shape[1]
            assert counted == (1, 1, len(end) - FIRST.shape[1] - 3, {}), name
    assert zero["each its own"][1][-1] == {"another rank of the model goes on eagerly": 1}
    assert one["each its own"][1][-1] == {"switched off by QWEN_FASTDECODE=0": 1}
    kind, text = one["alone"]
    assert kind == "RanksDisagree"
    assert text.startswith("the place of a weight or buffer changed on rank 1 of 2 before position 13")
    assert zero["alone"][0] == "RuntimeError"
