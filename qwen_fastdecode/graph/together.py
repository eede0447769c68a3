"""What the ranks of a tensor-parallel model decide together in one call of `generate`.

NCCL takes a collective into a graph on every rank or on none, and a graph that holds one is launched by all of them.
So whatever decides between a captured and an eager step is either the same on every rank by nature (shapes, and how
many steps were made), or the ranks tell each other, through their group's store and within its timeout: once at the
beginning of a call, thrice around a capture, and where memory is asked for. Never before a replay: a rank whose graph
no longer holds asks the others whether theirs does, and raises where they do not come.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.distributed as dist
from torch import nn

from ..errors import RanksDisagree
from ..steps.ranks import exchange
from ..upstream.families import FAMILIES
from ..upstream.seams import upstream_of
from ..upstream.sharding import Ranks, ranks_of
from .reasons import Eager


class Verdict(NamedTuple):
    """What a rank, or all of them, say of going on with a graph.

    reason: why not; None for yes. able: to do what belongs to it but can be left out, too.
    """

    reason: Eager | None = None
    detail: str = ""
    able: bool = True


def ranks_of_model(model: nn.Module) -> Ranks | None:
    """The ranks over which upstream's style shards a model's gated DeltaNet layers; None for a model of one process,
    or one whose layers are not sharded alike. Asked at every call of `generate`."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    modules = [*model.modules()]
    upstreams = {kind: upstream_of(kind) for kind in {*map(type, modules)}}
    layers = [(module, upstream) for module in modules if (upstream := upstreams[type(module)]) is not None]
    found = {ranks_of(module, FAMILIES[upstream.family].projections) for module, upstream in layers}
    return found.pop() if len(found) == 1 else None


class Together:
    """The ranks that run a model; None for a process that is alone, and agrees with itself."""

    def __init__(self, ranks: Ranks | None):
        self.ranks = ranks

    def agreed(self, what: str, own: Verdict) -> Verdict:
        """The verdict that all ranks have come to: this rank's own reason, else another's by number, and only what all
        are able to. Raises RanksDisagree where a rank does not come for the same thing."""
        if self.ranks is None:
            return own
        message = None if own.reason is None else _said(own), own.able
        answers = exchange(self.ranks, f"cuda_graph=True, {what}", message)
        able = all(others_able for _, others_able in answers)
        if own.reason is not None:
            return own._replace(able=able)
        refused = [f"rank {rank}: {reason}" for rank, (reason, _) in enumerate(answers) if reason is not None]
        return Verdict(Eager.ANOTHER_RANK, "; ".join(refused), able) if refused else Verdict(able=able)

    def changed(self, what: str, at: int, own: Verdict) -> Verdict:
        """Something that a graph depends on is not as it was before the step at position `at`: the verdict that all
        ranks have come to of capturing again. Raises RanksDisagree where it is not so on all of them: they would wait
        for this one inside their graph."""
        try:
            return self.agreed(f"a change before position {at}", own)
        except RanksDisagree as error:
            assert self.ranks is not None
            raise RanksDisagree(
                f"{what} changed on rank {self.ranks.rank} of {self.ranks.size} before position {at}, and the other "
                "ranks still replay the graph that this rank's collectives are a part of. Change it on every rank "
                f"between the same two steps, or between calls of generate ({error})"
            ) from error


def _said(own: Verdict) -> str:
    return f"{own.reason} ({own.detail})" if own.detail else str(own.reason)
