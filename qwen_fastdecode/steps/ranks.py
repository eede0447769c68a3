"""Ranks tell each other what they are about to do, through their group's store, and do not wait for ever."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import transformers

from .. import __version__
from ..errors import PatchError, RanksDisagree
from ..upstream.sharding import Ranks

TIMEOUT = 30.0  # seconds that a rank waits for the others
_rounds: Counter[str] = Counter()  # exchanges so far, by group: every rank's n-th meets the others' n-th


def exchange(ranks: Ranks, what: str, message: Any) -> list[Any]:
    """Every rank's message (of JSON), in their order. Raises RanksDisagree where a rank does not come, or comes for
    something else."""
    store, deadline = ranks.group.get_group_store(), time.monotonic() + TIMEOUT
    count = _rounds[ranks.group.group_name]
    _rounds[ranks.group.group_name] += 1
    keys = [_key(count, rank) for rank in range(ranks.size)]
    own = keys[ranks.rank]
    store.set(own, json.dumps({"what": what, "message": message}))
    missing = []
    for rank, key in enumerate(keys):
        try:
            store.wait([key], timedelta(seconds=max(0.1, deadline - time.monotonic())))
        except RuntimeError:  # DistStoreError, the store's timeout
            missing.append(rank)
    if missing:
        error = f"rank {ranks.rank} waited {TIMEOUT:.0f} s for ranks {missing}, and gave up"
        store.set(own, json.dumps({"what": what, "message": {"error": error}}))
        raise RanksDisagree(
            f"{what}: ranks {missing} of {ranks.size} did not call it within {TIMEOUT:.0f} s of rank {ranks.rank}. "
            "Every rank of a tensor-parallel model must call it; torch.distributed.barrier() before it waits for ranks "
            "that are merely late"
        )
    said = [json.loads(store.get(key)) for key in keys]
    if count:  # a rank that has come to this round has read the last one
        store.delete_key(_key(count - 1, ranks.rank))
    return _of_one_kind(what, said)


def _key(count: int, rank: int) -> str:
    return f"qwen_fastdecode/{count}/{rank}"


def _of_one_kind(what: str, said: list[dict[str, Any]]) -> list[Any]:
    """The messages, if all ranks meant the same exchange and none of them has failed."""
    for rank, its in enumerate(said):
        message = its["message"]
        if isinstance(message, dict) and "error" in message:  # it gave up, or failed, before this rank came
            raise RanksDisagree(f"{what} failed on rank {rank} of {len(said)}: {message['error']}")
        if its["what"] != what:
            raise RanksDisagree(
                f"{what}: rank {rank} of {len(said)} was not there but at {its['what']}. Every rank of a "
                "tensor-parallel model must do the same things in the same order"
            )
    return [its["message"] for its in said]


@contextmanager
def agreement(groups: Iterable[Ranks], settings: dict[str, Any]) -> Iterator[None]:
    """The ranks of each group enter with the same settings and leave without an error, or all of them raise.

    An error inside is raised here as it is, and on the other ranks as RanksDisagree.
    """
    everything = {**versions(), **settings}
    groups = list(groups)
    try:
        yield
    except (PatchError, ValueError) as error:
        for ranks in groups:
            with suppress(RanksDisagree):  # this rank's own error, or that others did not come to hear of it
                exchange(ranks, "patch()", {"error": f"{type(error).__name__}: {error}"})
        raise
    for ranks in groups:
        _compare(ranks, exchange(ranks, "patch()", everything))


def _compare(ranks: Ranks, answers: list[dict[str, Any]]) -> None:
    """Raises what differs from this rank, naming the ranks."""
    mine = answers[ranks.rank]
    for name, value in mine.items():
        others = {rank: answer.get(name) for rank, answer in enumerate(answers) if answer.get(name) != value}
        if others:
            theirs = ", ".join(f"{other!r} on rank {rank}" for rank, other in others.items())
            raise RanksDisagree(f"patch(): {name} is {value!r} on rank {ranks.rank}, but {theirs}. Make them the same")


def versions() -> dict[str, str | None]:
    """What must be the same on every rank, whatever is patched."""
    return {
        "qwen-fastdecode's version": __version__,
        "transformers' version": transformers.__version__,
        "torch's version": str(torch.__version__),
        "QWEN_FASTDECODE": os.environ.get("QWEN_FASTDECODE"),
    }
