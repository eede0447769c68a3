"""Which implementation writes states every N-th step, with what N, and from how much work on."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from .ring import Ring
from .step import Recipe, Step


class Deferral(NamedTuple):
    """How a backend defers the states of one dtype."""

    N: int  # entries of a ring
    least_work: int  # sequences x key heads; with fewer, two passes over the states are faster
    decode: Callable[[Step, Recipe, Ring], Tensor]
    settle: Callable[[Tensor, Ring], None]
    together: Callable[[torch.device], int]  # how many of a launch's last programs fold at the same step


@cache
def deferral(backend: str, state: torch.dtype) -> Deferral | None:
    """For the backend of that name and states of a dtype; None where two passes are never slower.

    On a CPU they are not: a thread reads the state where it has just written it, in its cache, so that what is saved
    is cheap, and the ring's products are not.
    """
    if backend != "triton":
        return None
    from .triton.deferred_launch import decode_deferred_triton, settle_triton, together, tuned

    best = tuned(state)
    return Deferral(best.N, best.least_work, decode_deferred_triton, settle_triton, partial(together, state))
