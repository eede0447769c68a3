"""What upstream's decode step looks up by name when it runs: who puts something else there changes what it computes.

The names are read off the bytecode of upstream's functions, whatever the release: what a function loads from its module
(`l2norm`) and through it from others (`F.softplus`, `torch.rsqrt`), and the same of those of Transformers' functions
that it calls. Besides, activations are looked up in a table by their names, and modules are called through their class.
docs/extension-points.md says what is not looked up by name.
"""

from __future__ import annotations

import dis
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from operator import itemgetter
from types import CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from transformers.activations import ACT2FN

from .seams import called_by, unwrap

# Of a prompt's pass, which stays upstream's whatever is put there.
_OF_PROMPTS = frozenset(("causal_conv1d_fn", "chunk_gated_delta_rule", "torch_chunk_gated_delta_rule"))


class Lookup(NamedTuple):
    """A name, its owner (a module, a class, or ACT2FN) and what was found there: None for nothing."""

    owner: Any
    name: str
    found: Any


class _Names:
    """Has for attributes what is in a dictionary, now and later."""

    def __init__(self, names: dict[str, Any]):
        self.__dict__ = names


class Lookups:
    """What was found under the names that a decode step looks up, to be compared at each step."""

    def __init__(self, lookups: Iterable[Lookup]):
        self.all = tuple({(id(lookup.owner), lookup.name): lookup for lookup in lookups}.values())
        self._activations = [lookup for lookup in self.all if lookup.owner is ACT2FN]
        self._attributes = [lookup for lookup in self.all if lookup.owner is not ACT2FN]
        own: dict[Any, list[str]] = {}
        for owner, name, _ in self._attributes:
            if name in vars(owner):
                own.setdefault(owner, []).append(name)
        readers = [(itemgetter(*names, names[0]), vars(owner)) for owner, names in own.items()]  # of tuples, always
        self._own = [(read, names, read(names)) for read, names in readers]
        self._inherited = [lookup for lookup in self._attributes if lookup.name not in vars(lookup.owner)]

    def find_the_same(self) -> bool:
        """Whether everything is still there. All names of an owner are read at once: this is asked at every step."""
        try:
            for read, names, found in self._own:
                if read(names) != found:  # tuples compare by identity first
                    return False
        except KeyError:  # a name is gone
            return False
        for owner, name, inherited in self._inherited:
            if getattr(owner, name, None) is not inherited:
                return False
        # Not by the table's own `[]`, which makes an instance.
        return all(dict.get(ACT2FN, name) is entry for _, name, entry in self._activations)

    def find_the_same_in_a_graph(self) -> bool:
        """As `find_the_same`, name by name: of a module's dictionary, Dynamo would guard the length."""
        for _, name, entry in self._activations:  # first: a class that it met elsewhere, Dynamo would not guard here
            if dict.get(ACT2FN, name) is not entry:
                return False
        return all(getattr(owner, name, None) is found for owner, name, found in self._attributes)


_made: dict[Any, Lookups] = {}


def lookups_of(functions: tuple[Any, ...], called: tuple[type, ...], activations: tuple[str, ...]) -> Lookups:
    """Of a decode step that is made of `functions` and calls modules of these classes, with these activations.

    The same object as before where that still finds the same.
    """
    step = functions, called, activations
    made = _made.get(step)
    if made is None or not made.find_the_same():
        made = _made[step] = Lookups(_of_step(*step))
    return made


def _of_step(functions: Sequence[Any], called: Sequence[type], activations: Sequence[str]) -> Iterator[Lookup]:
    seen: set[CodeType] = set()
    for function in functions:
        yield from _of_function(function, activations, seen)
    for kind in called:
        yield from _of_class(kind, activations, seen)


def _of_class(kind: Any, activations: Sequence[str], seen: set[CodeType]) -> Iterator[Lookup]:
    """Of a call of a module of this class, which looks up the module's parameters."""
    names = (kind, "forward"), (kind, "__call__"), (nn.Module, "_call_impl"), (nn.Module, "__getattr__")
    yield from (Lookup(owner, name, getattr(owner, name, None)) for owner, name in names)
    yield from _of_function(getattr(kind, "forward", None), activations, seen)


def _of_function(function: Any, activations: Sequence[str], seen: set[CodeType]) -> Iterator[Lookup]:
    function = None if function is None else unwrap(called_by(function))
    if not isinstance(function, FunctionType) or function.__code__ in seen:
        return
    seen.add(function.__code__)
    names = function.__globals__
    module: Any = sys.modules.get(names.get("__name__", ""))
    if module is None or vars(module) is not names:  # it was imported anew since
        module = _Names(names)
    for chain in _loaded(function.__code__):
        if chain[0] in names and chain[0] not in _OF_PROMPTS:
            yield from _of_chain(module, names[chain[0]], chain, activations, seen)


def _of_chain(
    owner: Any, found: Any, chain: tuple[str, ...], activations: Sequence[str], seen: set[CodeType]
) -> Iterator[Lookup]:
    """Of `torch.nn.functional.silu`, say: each part that is looked up in a module."""
    yield Lookup(owner, chain[0], found)
    for name in chain[1:]:
        if not isinstance(found, ModuleType):
            break
        owner, found = found, getattr(found, name, None)
        yield Lookup(owner, name, found)
    if found is ACT2FN:
        yield from _of_activations(activations, seen)
    elif isinstance(found, nn.Module):  # where installed, `kernels` makes functions into modules
        yield Lookup(_Names(vars(found)), "forward", vars(found).get("forward"))
        yield from _of_class(type(found), activations, seen)
    if str(getattr(found, "__module__", "")).startswith("transformers."):
        yield from _of_function(found, activations, seen)


def _of_activations(activations: Sequence[str], seen: set[CodeType]) -> Iterator[Lookup]:
    """Its entries are classes, or tuples of one and its arguments, of which `[]` makes instances."""
    yield Lookup(type(ACT2FN), "__getitem__", type(ACT2FN).__getitem__)
    for name in activations:
        entry = dict.get(ACT2FN, name)
        yield Lookup(ACT2FN, name, entry)
        yield from _of_class(entry[0] if isinstance(entry, tuple) else entry, activations, seen)


@torch.no_grad()
def is_activation(name: str, gate: str) -> bool:
    """Whether what upstream finds in ACT2FN computes "silu" or "sigmoid"."""
    with _disable_current_modes():  # the model may have fake tensors; these numbers are real
        x = torch.linspace(-9, 9, 19, dtype=torch.float64, device="cpu")
        exact = 1 / (1 + torch.exp(-x))
        found = ACT2FN[name](x)
        return isinstance(found, Tensor) and torch.allclose(found, x * exact if gate == "silu" else exact)


@cache
def _loaded(code: CodeType) -> tuple[tuple[str, ...], ...]:
    """The chains of names (`torch`, `rsqrt`) that a function loads, those of functions inside it too."""
    chains: list[tuple[str, ...]] = []
    goes_on = False
    for instruction in dis.get_instructions(code):
        if instruction.opname == "LOAD_GLOBAL":
            chains.append((instruction.argval,))
            goes_on = True
        elif goes_on and instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            chains[-1] += (instruction.argval,)
        elif instruction.opname != "EXTENDED_ARG":
            goes_on = False
    inner = [const for const in code.co_consts if isinstance(const, CodeType)]
    return (*chains, *(chain for each in inner for chain in _loaded(each)))
