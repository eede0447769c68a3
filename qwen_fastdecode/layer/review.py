"""The drift guard: every layer class is verified by the self-test before it is patched, whatever its source says.

What decides is what upstream's code computes here and now, its caches' code included. Whether the source is one that
was reviewed (patches/*.toml) is what the report says of it.
"""

from __future__ import annotations

import enum
from typing import Any, NamedTuple

import transformers

from ..errors import UnknownUpstream
from ..upstream.caches import cache_functions, replaced_functions
from ..upstream.seams import Upstream, current_sources, foreign_patch, stood_in_for, unreviewed
from . import install
from .selftest import STEPS, self_test


class State(enum.Enum):
    """What is known about upstream's code for a layer class. Each but the last has passed the self-test."""

    REVIEWED = "reviewed"  # its source is one in patches/*.toml
    VERIFIED = "verified at run time"  # it is not
    REFUSED = "refused"


class Review(NamedTuple):
    """The verdict on one layer class; `detail` says what was not reviewed and what became of it."""

    upstream: Upstream
    state: State
    detail: str = ""

    @property
    def error(self) -> UnknownUpstream | None:
        """A new error at each call: one that is kept would keep alive what its traceback has seen."""
        return UnknownUpstream(self.detail) if self.state is State.REFUSED else None


# Verdicts of this process, by all functions that were judged. What an accident may have caused (no memory) is not kept.
_verdicts: dict[Any, Review] = {}


def review(upstream: Upstream) -> Review:
    """The verdict on `upstream`; worked out once a process for the same functions."""
    sources = current_sources(upstream, install.original_forward(upstream.layer_class))
    called = {f"{getattr(owner, '__name__', owner)}.{name}": held for owner, name, held in stood_in_for(upstream)}
    judged = (upstream, *sources.items(), *called.items(), *cache_functions().items(), *replaced_functions())
    verdict = _verdicts.get(judged)
    if verdict is None:
        verdict, lasting = _judge(upstream, sources)
        if lasting:
            _verdicts[judged] = verdict
    return verdict


def _judge(upstream: Upstream, sources: dict[str, Any]) -> tuple[Review, bool]:
    """The verdict, and whether it will be the same the next time."""
    foreign = foreign_patch(sources | cache_functions())
    if foreign is None and replaced_functions():
        foreign = f"{replaced_functions()[0]} was replaced after qwen_fastdecode was imported"
    if foreign is not None:
        return _refused(upstream, f"{upstream.label} cannot be trusted: {foreign}. Undo that patch first"), True
    difference = unreviewed(upstream, sources)
    what = f"{upstream.layer_class.__module__} of Transformers {transformers.__version__}"
    if difference is not None:
        what = f"{what} is not a version that was reviewed: {difference}"
    test = self_test(upstream, sources[f"{upstream.layer_class.__name__}.forward"])
    if test.failure is not None:
        remedy = "Upgrade qwen-fastdecode, or install a reviewed release of Transformers"
        joined = ", and" if difference is not None else " is a version that was reviewed, but here"
        return _refused(upstream, f"{what}{joined} the self-test failed: {test.failure}. {remedy}"), not test.accident
    if difference is None:
        return Review(upstream, State.REVIEWED), True
    proof = f"{STEPS} decode steps give upstream's output and states (relative RMS at most {test.near})"
    return Review(upstream, State.VERIFIED, f"{what}. It was verified at run time: {proof}"), True


def _refused(upstream: Upstream, detail: str) -> Review:
    return Review(upstream, State.REFUSED, detail)
