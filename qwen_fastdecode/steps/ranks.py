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
    """Every rank's message (of JSON), in their order. Raises RanksDisagree where a rank does not come."""
    store, deadline = ranks.group.get_group_store(), time.monotonic() + TIMEOUT
    key = f"qwen_fastdecode/{_rounds[ranks.group.group_name]}/"
    _rounds[ranks.group.group_name] += 1
    store.set(f"{key}{ranks.rank}", json.dumps(message))
    missing = []
    for rank in range(ranks.size):
        try:
            store.wait([f"{key}{rank}"], timedelta(seconds=max(0.1, deadline - time.monotonic())))
        except RuntimeError:  # DistStoreError, the store's timeout
            missing.append(rank)
    if missing:
        error = f"rank {ranks.rank} waited {TIMEOUT:.0f} s for ranks {missing}, and gave up"
        store.set(f"{key}{ranks.rank}", json.dumps({"error": error}))
        raise RanksDisagree(
            f"{what}: ranks {missing} of {ranks.size} did not call it within {TIMEOUT:.0f} s of rank {ranks.rank}. "
            "Every rank of a tensor-parallel model must call it; torch.distributed.barrier() before it waits for ranks "
            "that are merely late"
        )
    answers = [json.loads(store.get(f"{key}{rank}")) for rank in range(ranks.size)]
    for rank, answer in enumerate(answers):
        if isinstance(answer, dict) and "error" in answer:  # it gave up, or failed, before this rank came
            raise RanksDisagree(f"{what} failed on rank {rank} of {ranks.size}: {answer['error']}")
    return answers


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
