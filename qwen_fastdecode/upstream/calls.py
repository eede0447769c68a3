"""What a call of upstream's forward passes: by position or by name, under whatever name the release has for it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from .protocols import Forward, ModelCache
from .seams import unwrap

# Every parameter that upstream's forward names in a supported release; what else it is given is in its **kwargs.
KNOWN = ("self", "hidden_states", "cache_params", "cache", "cache_position", "attention_mask")


class Call(NamedTuple):
    """The arguments after hidden_states."""

    cache: ModelCache | None
    attention_mask: Tensor | None
    without_position: bool  # up to 5.3 upstream takes a call that has no cache_position for a prompt
    others: dict[str, Any]  # by name; of these, seq_idx and cu_seq_lens_q mean something to upstream


def cache_name(given: dict[str, Any]) -> str:
    """The keyword of the cache in a call: 5.24 renamed it, still takes the old one, and prefers the new one."""
    return "cache" if "cache" in given else "cache_params"


def call_reader(forward: Forward) -> Callable[[tuple[Any, ...], dict[str, Any]], Call | None]:
    """Reads (args, kwargs) of a call of `forward`, hidden_states aside; None for a call that it does not accept."""
    parameters = list(inspect.signature(unwrap(forward)).parameters.values()) if callable(forward) else []
    by_name = tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)
    names = by_name[2:]  # after self and hidden_states
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    asks_position = "cache_position" in names

    def read(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        given = kwargs
        if args:
            given = dict(zip(names, args, strict=False)) | kwargs
            if len(given) != len(args) + len(kwargs):  # more than it takes, or one of them twice
                return None
        if not takes_any and not given.keys() <= set(names):
            return None
        without_position = asks_position and given.get("cache_position") is None
        return Call(given.get(cache_name(given)), given.get("attention_mask"), without_position, given)

    return read
