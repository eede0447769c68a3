"""A decode step that writes the recurrent states every N-th time: `patch(model, deferred_state=True)`.

The last updates wait in a ring beside the states (`ops.ring`), one ring a cache layer, allocated at its first such step
and gone with it. The cache layer owes what waits (`RingDebt`), so that whoever else reads or changes a state finds it
settled. In a ring whose cache layer does not owe it nothing waits, as its cursor says, which lies on the device.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ..errors import PatchError
from ..ops.deferral import Deferral, deferral
from ..ops.ring import Ring, forget, new_ring
from ..ops.step import States, Step
from ..upstream.families import Parts
from ..upstream.protocols import CacheLayer
from ..upstream.unsettled import debt_of, owe, settle
from .full import FullStep

HASTY = 3  # times in a row that a cache layer is settled before a period is over, after which it takes two passes


class DeferredStep:
    """All heads of a layer, where there are enough sequences; `full`, in two passes over the states, where not."""

    splits_heads, defers = False, True

    def __init__(self, full: FullStep, key_heads: int, layer: int):
        self.full = full
        self.backends = full.backends
        self.key_heads = key_heads
        self.layer = layer  # its number in the model
        self._debts: Any = WeakIdKeyDictionary()  # by cache layer
        self._note = ""

    def choose(self, states: States, cache_layer: CacheLayer | None) -> DeferredStep | FullStep:
        """The strategy for a step on these states, kept in `cache_layer`."""
        if torch.compiler.is_compiling():
            return self.full
        assert cache_layer is not None  # caches of lists are not deferred
        own = debt_of(cache_layer)
        if isinstance(own, RingDebt) and own.step is self and own.fits(states):
            return self
        self._note = self._two_passes(states, cache_layer)
        return self.full if self._note else self

    def run(self, parts: Parts, hidden_states: Tensor, cache_layer: CacheLayer | None, states: States) -> Tensor:
        """As `FullStep.run`; an N-th of the heads' states is written."""
        assert cache_layer is not None  # `choose` has seen it
        debt = self._owed(cache_layer, states)
        step = Step(parts.project(hidden_states), self.full.read, states, parts.weights)
        out = debt.deferral.decode(step, self.full.recipe, debt.ring)
        debt.steps += 1
        if captured(states):
            debt.hold()
        return parts.project_out(out)

    @property
    def ring_bytes(self) -> int:
        """Memory that the rings of living caches take."""
        return sum(debt.ring.nbytes for debt in self._debts.values())

    def note_on(self, backend: str) -> str:
        """Why the last step was made in two passes, or every step will be."""
        return _NOT_ON.format(backend) if deferral(backend, torch.float32) is None else self._note

    def settle_all(self) -> None:
        """Settles every cache that owes, and gives the rings' memory back."""
        for cache_layer, debt in list(self._debts.items()):
            debt.release()
            if debt_of(cache_layer) is debt:
                settle(cache_layer)
        self._debts.clear()

    def _two_passes(self, states: States, cache_layer: CacheLayer) -> str:
        """Why this step is made in two passes over the states; "" where it is not."""
        recurrent = states.recurrent
        backend = self.backends.on(recurrent.device).name
        found = deferral(backend, recurrent.dtype)
        if found is None:
            return _NOT_ON.format(backend)
        least = -(-found.least_work // self.key_heads)
        if recurrent.shape[0] < least:
            return f"deferred_state: two passes below {least} sequences"
        debt = self._debts.get(cache_layer)
        if debt is not None and debt.hasty >= HASTY:
            return "deferred_state: two passes, as somebody reads or reorders the states between steps"
        return ""

    def _owed(self, cache_layer: CacheLayer, states: States) -> RingDebt:
        """The debt that the cache layer owes from now on, if it did not before."""
        owed = debt_of(cache_layer)
        if isinstance(owed, RingDebt) and owed.step is self and owed.fits(states):
            return owed
        debt = self._debts.get(cache_layer)
        fits = debt is not None and debt.fits(states)
        if not fits and captured(states):
            raise PatchError(
                "deferred_state=True: a ring cannot be allocated or emptied inside a CUDA graph, whose replays would "
                "empty it again: make one decode step with this cache before capturing"
            )
        settle(cache_layer)
        if debt is None or not fits:
            debt = self._debts[cache_layer] = self._begun(states, debt)
        owe(cache_layer, debt)
        return debt

    def _begun(self, states: States, before: RingDebt | None) -> RingDebt:
        """A debt on states that have none: with the ring of the one before, where that suits them."""
        recurrent = states.recurrent
        found = deferral(self.backends.on(recurrent.device).name, recurrent.dtype)
        assert found is not None  # `choose` asked
        if before is not None and before.suits(recurrent):
            return RingDebt(self, found, before.ring, recurrent, before)
        with torch.inference_mode(False):  # the next step, or the copy of a ring, may be made without that mode
            together = found.together(recurrent.device)
            ring = new_ring(recurrent, self.key_heads, found.N, together=together, layer=self.layer)
            return RingDebt(self, found, ring, recurrent, before)


def captured(states: States) -> bool:
    """Whether a CUDA graph records what is done to these states."""
    return states.recurrent.is_cuda and torch.cuda.is_current_stream_capturing()


_NOT_ON = "deferred_state: two passes on the {} backend, which gains nothing"


class RingDebt:
    """What waits in a ring is missing in the recurrent states.

    recurrent: the tensor that it is missing in. hasty: how often in a row it was settled before N steps were over.
    """

    def __init__(self, step: DeferredStep, found: Deferral, ring: Ring, recurrent: Tensor, before: RingDebt | None):
        self.step = step
        self.deferral = found
        self.ring = ring
        self.lasts = False
        self.steps = 0  # since it was settled; those of replayed graphs are not counted
        self.hasty: int = 0 if before is None else before.hasty
        self._recurrent = weakref.ref(recurrent)
        self._kind = recurrent.shape, recurrent.dtype, recurrent.device

    def hold(self) -> None:
        """A CUDA graph has recorded a step: its replays leave more in the ring, and nothing is counted."""
        self.lasts = True
        self.steps = self.ring.N  # whoever settles it does not do so hastily

    def release(self) -> None:
        """That graph is gone."""
        self.lasts = False

    def fits(self, states: States) -> bool:
        """Whether these are the states that it is about."""
        return self._recurrent() is states.recurrent and self.suits(states.recurrent)

    def suits(self, recurrent: Tensor) -> bool:
        """Whether the ring can serve such states."""
        return self._kind == (recurrent.shape, recurrent.dtype, recurrent.device)

    def settle(self, states: States, *, by_reader: bool) -> None:
        """Folds what waits into the states; into none, where somebody has put others in their place."""
        if not self.fits(states):
            self.drop()
            return
        if self.steps:
            self.hasty = self.hasty + 1 if self.steps < self.ring.N else 0
        self.steps = 0
        with torch.inference_mode():
            self.deferral.settle(states.recurrent, self.ring)

    def drop(self) -> None:
        """Nothing waits any more."""
        self.steps = 0
        with torch.inference_mode():
            forget(self.ring)

    def tensors(self) -> Ring:
        return self.ring

    def of_copy(self) -> None:
        """A copy is made of settled states."""

    def check_pickle(self) -> None:
        """Settled states can be pickled."""
