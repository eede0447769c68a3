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
from ..upstream.lookups import lookups_of
from ..upstream.seams import Upstream, current_sources, foreign_patch, norm_classes, unreviewed
from . import install
from .selftest import STEPS, self_test


class State(enum.Enum):
    """What is known about upstream's code for a layer class. Each but the last has passed the self-test."""

    REVIEWED = "reviewed"  # its source is one in patches/*.toml
    VERIFIED = "verified at run time"  # it is not
    REFUSED = "refused"


class Review(NamedTuple):
    """The verdict on one layer class; `detail` says what was not reviewed and what became of it.

    near: the largest distance in the self-test, in words.
    """

    upstream: Upstream
    state: State
    detail: str = ""
    near: str = ""

    @property
    def error(self) -> UnknownUpstream | None:
        """A new error at each call: one that is kept would keep alive what its traceback has seen."""
        return UnknownUpstream(self.detail) if self.state is State.REFUSED else None


# Verdicts of this process, by all functions that were judged. A failed self-test is not kept: it may have been an
# accident (no memory), and is tried again.
_verdicts: dict[Any, Review] = {}


def review(upstream: Upstream) -> Review:
    """The verdict on `upstream`; worked out once a process for the same functions, if they pass."""
    forward = install.original_forward(upstream.layer_class)
    sources = current_sources(upstream, forward)
    called = lookups_of((forward,), norm_classes(upstream), ("silu",))
    judged = (upstream, called, *sources.items(), *cache_functions().items(), *replaced_functions())
    verdict = _verdicts.get(judged)
    if verdict is None:
        verdict = _judge(upstream, sources)
        if verdict.state is not State.REFUSED:
            _verdicts[judged] = verdict
    return verdict


def _judge(upstream: Upstream, sources: dict[str, Any]) -> Review:
    foreign = foreign_patch(sources | cache_functions())
    if foreign is None and replaced_functions():
        foreign = f"{replaced_functions()[0]} was replaced after qwen_fastdecode was imported"
    if foreign is not None:
        return Review(upstream, State.REFUSED, f"{upstream.label} cannot be trusted: {foreign}. Undo that patch first")
    difference = unreviewed(upstream, sources)
    module = f"{upstream.layer_class.__module__} of Transformers {transformers.__version__}"
    unknown = f"{module} is not a version that was reviewed: {difference}"
    test = self_test(upstream, sources[f"{upstream.layer_class.__name__}.forward"])
    if test.failure is not None:
        what = f"{upstream.label} was reviewed, but" if difference is None else f"{unknown}, and"
        remedy = "Upgrade qwen-fastdecode, or install a reviewed release of Transformers"
        return Review(upstream, State.REFUSED, f"{what} the self-test failed: {test.failure}. {remedy}")
    if difference is None:
        return Review(upstream, State.REVIEWED, near=test.near)
    proof = f"{STEPS} decode steps give upstream's output and states (relative RMS at most {test.near})"
    return Review(upstream, State.VERIFIED, f"{unknown}. It was verified at run time: {proof}", test.near)
