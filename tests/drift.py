"""Upstream code as another release or a fork might have it, for tests of the drift guard."""

from __future__ import annotations

import inspect
import linecache
import sys
import textwrap
from types import ModuleType
from typing import Any

import pytest
from models import build, linear_layers
from transformers import PreTrainedModel


def modeling(family: str) -> ModuleType:
    """The module with the family's classes."""
    return sys.modules[layer_class(build(family)).__module__]


def layer_class(model: PreTrainedModel) -> Any:
    return type(linear_layers(model)[0])


def drift(monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str, *changes: tuple[str, str]) -> Any:
    """Puts `name` of `module`, with these changes to its source, where upstream's was, as if its file said so."""
    source = textwrap.dedent(inspect.getsource(getattr(module, name)))
    for old, new in changes:
        assert old in source, f"{name} of this release has no {old!r}"
        source = source.replace(old, new)
    file = f"{module.__file__}.{name}.{abs(hash(source))}.py"  # in Transformers' folder, but not on the disk
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    made: dict[str, Any] = {}
    exec(compile(source, file, "exec", dont_inherit=True), vars(module), made)
    monkeypatch.setattr(module, name, made[name])
    return made[name]
