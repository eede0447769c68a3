"""The drift guard: whether upstream's code for a layer class was reviewed, was verified at run time, or is refused."""

from __future__ import annotations

import enum
from functools import cache
from typing import Any, NamedTuple

import transformers

from ..errors import UnknownUpstream
from ..upstream.caches import update_functions
from ..upstream.seams import Upstream, current_sources, foreign_patch, unreviewed
from . import install
from .selftest import STEPS, self_test


class State(enum.Enum):
    """What is known about upstream's code for a layer class."""

    REVIEWED = "reviewed"  # its source is one in patches/*.toml
    VERIFIED = "verified at run time"  # it is not, but the self-test passed
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


def review(upstream: Upstream) -> Review:
    """The verdict on `upstream`; worked out once a process for the same functions."""
    current = current_sources(upstream, install.original_forward(upstream.layer_class))
    return _review(upstream, tuple(current.items()), tuple(update_functions().items()))


@cache
def _review(upstream: Upstream, current: tuple[tuple[str, Any], ...], updates: tuple[tuple[str, Any], ...]) -> Review:
    module, sources = upstream.layer_class.__module__, dict(current)
    foreign = foreign_patch(sources | dict(updates))
    if foreign is not None:
        return Review(upstream, State.REFUSED, f"{upstream.label} cannot be trusted: {foreign}. Undo that patch first")
    difference = unreviewed(upstream, sources)
    if difference is None:
        return Review(upstream, State.REVIEWED)
    what = f"{module} of Transformers {transformers.__version__} is not a version that was reviewed: {difference}"
    test = self_test(upstream, sources[f"{upstream.layer_class.__name__}.forward"])
    if test.failure is None:
        proof = f"{STEPS} decode steps give upstream's output and states (relative RMS at most {test.near})"
        return Review(upstream, State.VERIFIED, f"{what}. It was verified at run time: {proof}")
    remedy = "Upgrade qwen-fastdecode, or install a reviewed release of Transformers"
    return Review(upstream, State.REFUSED, f"{what}, and the self-test failed: {test.failure}. {remedy}")
