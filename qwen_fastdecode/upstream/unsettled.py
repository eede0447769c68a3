"""Cache layers whose tensors are not the whole truth now, and how everybody who reads them sees the truth all the same.

A step may leave work undone on a cache layer: heads that other ranks have, or updates that wait. It leaves a `Debt`
there (`owe`), and `settle` has the debt make the tensors true. While a layer owes, its class is a subclass of its own
in which reading `conv_states` or `recurrent_states`, pickling and resetting settle first; a settled layer is of its own
class again, and costs nothing. So upstream, a user's code, a copy and `torch.save` see settled states without knowing
of this. What somebody took out of the layer and kept is his snapshot.

Where a CUDA graph holds the step, its replays add to the debt without a word to Python: a debt that `lasts` stays, and
is settled at every read.
"""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Protocol

from torch import Tensor

from ..ops.step import States
from .caches import SETTLES, stored_states
from .protocols import CacheLayer

_DEBT = "_qwen_fastdecode_debt"  # the attribute of a layer that owes
# By id: a layer may not be hashable.
_owing: weakref.WeakValueDictionary[int, CacheLayer] = weakref.WeakValueDictionary()


class Debt(Protocol):
    """What has to be done before a layer's tensors are true.

    lasts: the layer goes on owing once it is settled.
    """

    lasts: bool

    def hold(self) -> None:
        """A CUDA graph has recorded the step, and every replay adds to the debt: it lasts."""

    def release(self) -> None:
        """That graph is gone."""

    def settle(self, states: States, *, by_reader: bool) -> None:
        """Makes the states true, in place. `by_reader`: somebody reads them who may be alone, outside a step."""

    def drop(self) -> None:
        """Nothing of what the layer's tensors were is read again."""

    def tensors(self) -> Iterable[Tensor]:
        """What a step reads and writes beside the states."""

    def of_copy(self) -> Debt | None:
        """The debt of a copy of a layer that owes; None where a copy is to be made of a settled layer."""

    def check_pickle(self) -> None:
        """Raises PatchError where the states cannot be settled to be pickled."""


class Unsettled:
    """What a cache layer's class is while it owes, beside itself: that has these attributes."""

    conv_states: Any
    recurrent_states: Any
    has_previous_state: bool | dict[int, bool]

    def __reduce_ex__(self, protocol: Any) -> Any:
        debt = debt_of(self)
        if debt is not None:
            debt.check_pickle()
            settle(self, by_reader=True)
        with _of_its_own_class(self):
            if debt is None or not debt.lasts:
                return self.__reduce_ex__(protocol)
            # The debt comes back to the layer, and is none of the copy's: the attributes as they are now, and the form
            # of protocol 0, as from 2 on pickle compares the layer's class with that of the form.
            return tuple(dict(part) if part is vars(self) else part for part in self.__reduce_ex__(0))

    def __getstate__(self) -> Any:
        settle(self, by_reader=True)
        with _of_its_own_class(self):
            state = self.__getstate__()
            return dict(state) if state is vars(self) else state

    def __setattr__(self, name: str, value: Any) -> None:
        """Who gives the layer another class takes this one away: it owes nothing then, also where a graph holds it."""
        own: Any = own_class(self)
        if name == "__class__":
            settle(self, by_reader=True)
            settled_by(self)
        own.__setattr__(self, name, value)

    def __copy__(self) -> Any:
        return _copy(self, copy.copy)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _copy(self, lambda x: copy.deepcopy(x, memo))

    def reset(self, *args: Any, **kwargs: Any) -> Any:
        debt = debt_of(self)
        if debt is not None:
            debt.drop()
        with _of_its_own_class(self):
            return self.reset(*args, **kwargs)

    def reorder_cache(self, *args: Any, **kwargs: Any) -> Any:
        """Picks whole sequences: what was true of a state's part stays so, where a copy of the debt may be kept."""
        debt = debt_of(self)
        kept = None if debt is None else debt.of_copy()
        if kept is None:
            settle(self, by_reader=True)
        with _of_its_own_class(self, owing=kept is not None):
            return self.reorder_cache(*args, **kwargs)


def owe(layer: CacheLayer, debt: Debt) -> None:
    """The layer's tensors are not true until `debt` is settled; a debt that is there already is replaced."""
    vars(layer)[_DEBT] = debt
    if not isinstance(layer, Unsettled):
        own: Any = type(layer)
        layer.__class__ = _unsettled(own)
    _owing[id(layer)] = layer


def debt_of(layer: CacheLayer) -> Debt | None:
    """What the layer owes."""
    return vars(layer).get(_DEBT)


def settle(layer: CacheLayer | None, *, by_reader: bool = False) -> None:
    """Makes the layer's tensors true, where there is a layer. Where that fails it goes on owing."""
    if not isinstance(layer, Unsettled):
        return
    debt = debt_of(layer)
    states = stored_states(layer)
    if debt is not None and states is None:
        debt.drop()
    elif debt is not None and states is not None:
        debt.settle(states, by_reader=by_reader)
    if debt is None or not debt.lasts:
        _forget(layer)


def owed_tensors(layer: CacheLayer) -> list[Tensor]:
    """What the layer's debt holds beside the states."""
    debt = debt_of(layer)
    return [] if debt is None else [*debt.tensors()]


def own_class(layer: CacheLayer) -> type:
    """The class of a cache layer, whether or not it owes."""
    kind: type = type(layer)
    return kind.__mro__[1] if isinstance(layer, Unsettled) else kind  # after the subclass, its own class


def settled_by(layer: CacheLayer) -> None:
    """Somebody made the layer's tensors true, or gave them up: it owes nothing any more."""
    _forget(layer)


def owing_layers() -> Iterator[tuple[CacheLayer, Debt]]:
    """Every living cache layer that owes."""
    for layer in list(_owing.values()):
        debt = debt_of(layer)
        if debt is not None:
            yield layer, debt


def _forget(layer: CacheLayer) -> None:
    vars(layer).pop(_DEBT, None)
    _owing.pop(id(layer), None)
    if isinstance(layer, Unsettled):
        object.__setattr__(layer, "__class__", own_class(layer))


@contextmanager
def _of_its_own_class(layer: CacheLayer, *, owing: bool = False) -> Iterator[None]:
    """For the length of a block. Afterwards, also where it raised, the layer owes again what lasts, or as it did."""
    debt = debt_of(layer)
    _forget(layer)
    try:
        yield
    finally:
        if debt is not None and (owing or debt.lasts):
            owe(layer, debt)


@cache
def _unsettled(own: type) -> type:
    """The subclass of a cache layer's class for the time that it owes."""
    names = {"conv_states": _settling("conv_states"), "recurrent_states": _settling("recurrent_states")}
    called = {"__module__": own.__module__, "__qualname__": own.__qualname__}
    # Its own class comes first, as Python asks where an object changes its class: ours are given by name.
    ours = {name: value for name, value in vars(Unsettled).items() if inspect.isfunction(value)}
    return type(own.__name__, (own, Unsettled), {**ours, **names, **called, SETTLES: True})


def _settling(name: str) -> property:
    """Reads and writes the attribute of that name of a settled layer."""

    def get(self: Any) -> Any:
        settle(self, by_reader=True)
        return vars(self)[name]

    def put(self: Any, value: Any) -> None:
        settle(self, by_reader=True)
        vars(self)[name] = value

    return property(get, put)


def _copy(layer: CacheLayer, how: Any) -> Any:
    """A copy that owes as well, where the debt says so, else one of the settled layer."""
    debt = debt_of(layer)
    kept = None if debt is None else debt.of_copy()
    if kept is None:
        settle(layer, by_reader=True)
        with _of_its_own_class(layer):
            return how(layer)
    own: Any = own_class(layer)
    copied = own.__new__(own)
    vars(copied).update((name, how(value)) for name, value in vars(layer).items() if name != _DEBT)
    owe(copied, kept)
    return copied
