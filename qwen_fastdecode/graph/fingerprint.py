"""What must be as it was when a graph was captured, read before every replay, in C loops as far as Python has them.

A graph holds addresses and whatever Python decided while it was recorded. Values that are written in place (weights
that a trainer syncs) may change; where tensors are, which modules and hooks there are, the numbers and texts that these
and the configuration keep, their code and what it looks up by name, and which adapters are active may not. Compared are
addresses; the tensors seen are held, so that nothing new can come to lie where an old one was.
"""

from __future__ import annotations

from itertools import chain
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..layer.plan import plan_of
from ..names import PLAN
from ..upstream.lookups import lookups_of
from ..upstream.protocols import CausalLM, TextConfig
from ..upstream.sharding import local_part
from .norms import StandIn

_GLOBAL_HOOKS = ("_global_forward_pre_hooks", "_global_forward_hooks")
_PLAIN = (bool, int, float, str)
_READ = (  # what `Fingerprint._read` gives
    "the place of a weight or buffer",
    "a module's submodules",
    "a module's hooks",
    "a module's class",
    "a module's training mode",
    "a number or text of a module",
    "the configuration",
    "the attention function",
    "a module's forward",
    "a layer's patch",
    "a gated DeltaNet layer",
    "an adapter",
)
_ADAPTER = ("_active_adapter", "_disable_adapters", "merged_adapters", "scaling", "use_dora")


class Fingerprint:
    """Of a model: made at a capture, asked before each replay."""

    def __init__(self, model: CausalLM):
        modules = [*model.modules()]
        self._modules = modules
        self._config = model.config.get_text_config(decoder=True)
        classes, attention = tuple(dict.fromkeys(map(type, modules))), _attention_of(self._config)
        own_lookups = lookups_of(() if attention is None else (attention,), classes, ())
        own = [vars(module) for module in modules]
        self._held = [kept["_parameters"] for kept in own if kept["_parameters"]]
        self._held += [kept["_buffers"] for kept in own if kept["_buffers"]]
        self._children = [kept["_modules"] for kept in own if kept["_modules"]]
        hooks = [kept[name] for kept in own for name in ("_forward_pre_hooks", "_forward_hooks")]
        hooks += [vars(nn.modules.module)[name] for name in _GLOBAL_HOOKS]
        # Most tables of hooks are empty, and whether all of these still are is asked at once.
        self._no_hooks, self._hooks = [table for table in hooks if not table], [table for table in hooks if table]
        self._own = own
        names = [(kept, _values_of(module)) for module, kept in zip(modules, own, strict=True)]
        self._values = [(itemgetter(*values), kept) for kept, values in names if values]
        self._layers = [(module, plan) for module in modules if (plan := plan_of(module)) is not None]
        # Layers that are alike share theirs, which are asked for once.
        self._lookups = [*dict.fromkeys((own_lookups, *(plan.lookups for _, plan in self._layers)))]
        self._adapters = [kept for kept in own if "_disable_adapters" in kept]
        # Tensors that are plain attributes (the offsets of multimodal positions), which a prompt's pass replaces.
        self._attributes = [(kept, name) for kept in own for name, value in kept.items() if isinstance(value, Tensor)]
        weights = chain.from_iterable(map(dict.values, self._held))
        self._sharded = any(weight is not None and local_part(weight) is not weight for weight in weights)
        self._alive = self._tensors(), [*chain.from_iterable(map(dict.values, self._children))]
        self._expected = self._read()

    def holds(self) -> bool:
        """Whether nothing has changed."""
        try:
            return all(lookups.find_the_same() for lookups in self._lookups) and self._read() == self._expected
        except KeyError:  # an attribute is gone
            return False

    def difference(self) -> str:
        """What is not as it was, for an error."""
        try:
            now = self._read()
        except KeyError as error:
            return f"the attribute {error} of a module"
        named = zip(_READ, now, self._expected, strict=True)
        return next((name for name, value, before in named if value != before), "what a module's code looks up")

    def _tensors(self) -> list[Tensor]:
        held = [tensor for tensor in chain.from_iterable(map(dict.values, self._held)) if tensor is not None]
        if self._sharded:
            held = [*map(local_part, held)]
        return held + [kept[name] for kept, name in self._attributes if kept.get(name) is not None]

    def _read(self) -> tuple[Any, ...]:
        return (
            [*map(Tensor.data_ptr, self._tensors())],
            [*map(id, chain.from_iterable(map(dict.values, self._children)))],
            (any(self._no_hooks), [*map(tuple, self._hooks)]),
            [*map(type, self._modules)],
            [kept["training"] for kept in self._own],
            [read(kept) for read, kept in self._values],
            _settings(self._config),
            _attention_of(self._config),
            # One that stands there while another thread records a step of this model is no change.
            [None if type(own := kept.get("forward")) is StandIn else own for kept in self._own],
            [id(vars(layer).get(PLAN)) for layer, _ in self._layers],
            [plan.is_of(layer) for layer, plan in self._layers],
            [_adapter(kept) for kept in self._adapters],
        )


def _values_of(module: nn.Module) -> list[str]:
    """The names of a module's numbers and texts: a replay goes on with those that it was recorded with."""
    if type(module) is nn.Linear:  # nine modules of ten, whose forward reads none
        return []
    plain = [name for name, value in vars(module).items() if isinstance(value, _PLAIN) and not name.startswith("_")]
    return [name for name in plain if name != "training"]


def _settings(config: TextConfig) -> dict[str, Any]:
    """A configuration's own, and of lists what is in them now."""
    return {name: tuple(value) if type(value) is list else value for name, value in vars(config).items()}


def _attention_of(config: TextConfig) -> Any:
    """The function that attention layers find by its name in Transformers' table; None for their module's own."""
    return ALL_ATTENTION_FUNCTIONS.get(getattr(config, "_attn_implementation", None))


def _adapter(kept: dict[str, Any]) -> list[str]:
    """What an adapter layer (peft) decides by at each call."""
    return [repr(kept[name]) for name in _ADAPTER if name in kept]


class PythonState:
    """The attributes of modules, before a step is recorded: a replay would not change them again."""

    def __init__(self, model: nn.Module):
        self._before = [(module, dict(vars(module))) for module in model.modules()]

    def put_back(self) -> str | None:
        """The name of one that has changed, None for none. Numbers and texts are put back, as nothing has run; what
        else a step leaves on a module, the next eager one leaves anew."""
        changed = None
        for module, before in self._before:
            own = vars(module)
            for name in {*own, *before}:
                if own.get(name) is before.get(name):
                    continue
                if name == "forward" and StandIn in (type(own.get(name)), type(before.get(name))):
                    continue  # another thread records this model
                changed = f"{type(module).__qualname__}.{name}"
                if name in before and isinstance(before[name], _PLAIN):
                    own[name] = before[name]
        return changed


def switches() -> tuple[Any, ...]:
    """Settings of PyTorch that kernels are chosen by."""
    backends = torch.backends.cuda
    return (
        backends.flash_sdp_enabled(),
        backends.mem_efficient_sdp_enabled(),
        backends.math_sdp_enabled(),
        backends.cudnn_sdp_enabled(),
        backends.matmul.allow_tf32,
        torch.are_deterministic_algorithms_enabled(),
    )
