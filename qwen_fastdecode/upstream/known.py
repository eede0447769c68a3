"""A layer that was looked at in full is known again by identity, in a fraction of the time.

`nn.Module.__getattr__` takes ten times as long as a dictionary, and a step needs a dozen of a layer's parts. So they
are looked for where modules ordinarily have them; a layer that has one elsewhere (a property of a parametrization, an
attribute over a parameter) is looked at in full on every call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from operator import is_, itemgetter
from typing import Any

from torch import nn

from .families import KEPT_FUNCTIONS, Family, Parts
from .protocols import GatedDeltaNet, Module

_PARAMETERS = ("A_log", "dt_bias")
_WEIGHTS = ("weight", "bias")  # of conv1d and of the norm
# What `Family.facts` reads of a layer and of its norm, besides.
_OF_LAYER = (
    "activation",
    "key_dim",
    "value_dim",
    "num_k_heads",
    "num_v_heads",
    "head_k_dim",
    "head_v_dim",
    "conv_kernel_size",
    *KEPT_FUNCTIONS,
)
_OF_NORM = ("variance_epsilon", "eps", "activation")


class Known:
    """A layer as it was: its parts, and each object that `Family.facts` and `Family.parts` read."""

    def __init__(self, layer: GatedDeltaNet, family: Family):
        """Of an ordinary layer, see `of`."""
        self._parts: Parts = family.parts(layer)
        modules, read = _names(family)
        held, of_norm = vars(layer), vars(self._parts.norm)
        self._modules, self._parameters = _getter(modules), _getter(_PARAMETERS)
        self._values = _getter(name for name in read if name in held)
        self._values_of_norm = _getter(name for name in _OF_NORM if name in of_norm)
        self._absent = {*modules, *_PARAMETERS, *read, family.reordering} - held.keys()
        self._absent_in_norm = {*_WEIGHTS, *_OF_NORM} - of_norm.keys()
        self._reordering = family.reordering or ""
        kinds = type(layer), type(self._parts.conv1d), type(self._parts.norm)
        self._namespaces = [vars(base) for base in dict.fromkeys(base for kind in kinds for base in kind.__mro__)]
        self._sizes = [*map(len, self._namespaces)]
        self._seen = self._look(layer)

    @classmethod
    def of(cls, layer: GatedDeltaNet, family: Family) -> Known | None:
        """The layer as it is now; None where something that a step reads is not where modules ordinarily have it."""
        return cls(layer, family) if _is_ordinary(layer, family) else None

    def parts_of(self, layer: GatedDeltaNet) -> Parts | None:
        """The parts that it had, if they are its parts still and all else is as it was.

        Of tensors that says: the same objects. What may change in an object (its data, shape, dtype, device) is not
        looked at here.
        """
        try:
            now = self._look(layer)
        except KeyError:  # something is gone
            return None
        return self._parts if all(map(is_, self._seen, now)) else None

    def _look(self, layer: GatedDeltaNet) -> tuple[Any, ...]:
        held, kind, (_, _, conv1d, norm, weights) = layer.__dict__, type(layer), self._parts
        of_conv1d, of_norm = conv1d.__dict__, norm.__dict__
        return (
            kind,
            type(conv1d),
            type(norm),
            *map(type, weights),  # `torch.utils.swap_tensors` gives an object another class
            *self._modules(held["_modules"]),
            *self._parameters(held["_parameters"]),
            *self._values(held),
            *map(of_conv1d["_parameters"].get, _WEIGHTS),
            *map(of_norm["_parameters"].get, _WEIGHTS),
            *self._values_of_norm(of_norm),
            getattr(kind, self._reordering, None),
            # Nothing lies over any of it, nor a property: the classes have got no attribute more.
            held.keys().isdisjoint(self._absent),
            of_conv1d.keys().isdisjoint(_WEIGHTS),
            of_norm.keys().isdisjoint(self._absent_in_norm),
            [*map(len, self._namespaces)] == self._sizes,
        )


def _names(family: Family) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Of a layer's modules that a step takes, in the order of `Parts`, and of its attributes that are read."""
    modules = (*family.projections, family.out_proj, "conv1d", family.norm)
    return modules, (*_OF_LAYER, family.doubles_beta) if family.doubles_beta else _OF_LAYER


def _is_ordinary(layer: GatedDeltaNet, family: Family) -> bool:
    """Whether each part of the layer is a module or parameter of it as such, and what else is read an attribute."""
    modules, read = _names(family)
    projections, out_proj, conv1d, norm, weights = family.parts(layer)
    if not all(isinstance(module, nn.Module) for module in (conv1d, norm)):
        return False
    found = (
        *map(layer._modules.get, modules),
        conv1d._parameters.get("weight"),
        *map(layer._parameters.get, _PARAMETERS),
        norm._parameters.get("weight"),
    )
    if not all(map(is_, found, (*projections, out_proj, conv1d, norm, *weights))):
        return False
    owners: tuple[tuple[Module, set[str], set[str]], ...] = (
        (layer, {*modules, *_PARAMETERS}, {*read}),
        (conv1d, {*_WEIGHTS}, set()),
        (norm, {*_WEIGHTS}, {*_OF_NORM}),
    )
    return all(_is_plain(owner, held, values) for owner, held, values in owners)


def _is_plain(module: Any, held: set[str], values: set[str]) -> bool:
    """Whether a module has what its dictionaries say: submodules and parameters that it holds, and other values."""
    kind = type(module)
    if kind.__getattribute__ is not object.__getattribute__ or kind.__getattr__ is not nn.Module.__getattr__:
        return False
    over_it = vars(module).keys() & held
    return not over_it and not any(vars(base).keys() & (held | values) for base in kind.__mro__)


def _getter(names: Iterable[str]) -> Callable[[Any], tuple[Any, ...]]:
    """The values under these names in a dictionary; raises KeyError where one is missing."""
    names = (*names,)
    if len(names) > 1:
        return itemgetter(*names)
    return lambda held: tuple([held[name] for name in names])
