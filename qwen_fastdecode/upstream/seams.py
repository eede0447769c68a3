"""What we touch in Transformers and which of its releases were reviewed: the data in `patches/*.toml`, and its check.

A seam names a layer class and the SHA-256 of the source of everything that a fast decode step stands in for. Source
text is stable over Python versions (bytecode and `ast.dump` are not). What becomes of code that was not reviewed is
the affair of `guard.py`.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import transformers

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True)
class Seam:
    """A reviewed range of releases of one family's gated DeltaNet layer."""

    family: str
    module: str
    layer: str
    transformers: str
    sources: dict[str, str]  # attribute of the module, dotted -> SHA-256 of its source
    needs: str | None = None  # an attribute of the module: releases without it have another layer by the same name


@dataclass(frozen=True)
class Upstream:
    """A gated DeltaNet class of the installed Transformers."""

    family: str
    layer_class: type

    @property
    def label(self) -> str:
        return f"{self.layer_class.__module__}.{self.layer_class.__qualname__}"


@cache
def load_seams() -> tuple[Seam, ...]:
    """Every reviewed seam, from the TOML files shipped with the package."""
    here = Path(__file__).parent.parent
    folder = here / "patches" if (here / "patches").is_dir() else here.parent / "patches"
    seams = []
    for path in sorted(folder.glob("*.toml")):
        data = tomllib.loads(path.read_text(encoding="utf-8"))
        common = {key: value for key, value in data.items() if key != "seam"}
        seams += [Seam(**common, **seam) for seam in data["seam"]]
    if not seams:
        raise FileNotFoundError(f"no reviewed seams (*.toml) in {folder}: the installation is incomplete")
    return tuple(seams)


def _layers() -> dict[tuple[str, str], tuple[str, str | None]]:
    """(module, class) of every layer that was reviewed in some release -> its family, and what its module `needs`."""
    return {(seam.module, seam.layer): (seam.family, seam.needs) for seam in load_seams()}


def upstream_of(kind: type) -> Upstream | None:
    """The gated DeltaNet class that `kind` is or inherits from.

    By the name that it was made with: its module may meanwhile hold another object by that name (a reload, a patch).
    """
    for base in kind.__mro__:
        found = _layers().get((str(base.__module__), base.__qualname__))
        if found is not None and _has(base.__module__, found[1]):
            return Upstream(found[0], base)
    return None


def _has(module: str, needs: str | None) -> bool:
    return needs is None or hasattr(sys.modules.get(module), needs)


def upstream_classes(*, import_missing: bool) -> Iterator[Upstream]:
    """The gated DeltaNet classes that the installed Transformers has; only those already imported, unless asked."""
    for (module, layer), (family, needs) in sorted(_layers().items()):
        if import_missing and module not in sys.modules and _exists(module):
            importlib.import_module(module)
        # Not import_module: it would wait for another thread that imports it, and that may wait for our lock.
        imported = sys.modules.get(module)
        if not _has(module, needs):
            continue
        # While `transformers.monkey_patching` is at work the name may stand for a subclass of somebody else's.
        held = getattr(imported, layer, None)
        for base in getattr(held, "__mro__", ()):
            if (base.__module__, base.__qualname__) == (module, layer):
                yield Upstream(family, base)


def _exists(module: str) -> bool:
    parent = module.rpartition(".")[0]
    return importlib.util.find_spec(parent) is not None and importlib.util.find_spec(module) is not None


def current_sources(upstream: Upstream, forward: Any) -> dict[str, Any]:
    """What a decode step of this class stands in for, by its dotted name in the module; None where it is missing.

    `forward` is upstream's function, as it was before we patched the class.
    """
    module = sys.modules[upstream.layer_class.__module__]
    known = dict.fromkeys(name for seam in _seams_of(upstream) for name in seam.sources)
    found = {name: _find(module, name) for name in dict.fromkeys(_names(upstream)) | known}
    found[f"{upstream.layer_class.__name__}.forward"] = forward
    return {name: function for name, function in found.items() if name in known or function is not None}


def norm_classes(upstream: Upstream) -> tuple[type, ...]:
    """The classes of gated norms that its module has: its own, and up to 5.14 flash-linear-attention's."""
    module, name = sys.modules[upstream.layer_class.__module__], upstream.layer_class.__name__
    names = name.replace("GatedDeltaNet", "RMSNormGated"), "FusedRMSNormGated"
    return tuple([held for held in map(vars(module).get, names) if isinstance(held, type)])


def foreign_patch(current: dict[str, Any]) -> str | None:
    """Whose function lies over one of upstream's, and where; None if nobody's does."""
    for name, function in current.items():
        foreign = None if function is None else _foreign(function)
        if foreign is not None:
            return f"{name} is patched by somebody else: {foreign}"
    return None


def unreviewed(upstream: Upstream, current: dict[str, Any]) -> str | None:
    """What differs from the nearest reviewed release, and which those are; None if one of them is the installed one."""
    seams = _seams_of(upstream)
    changed = min(([name for name in seam.sources if _differs(seam, name, current)] for seam in seams), key=len)
    if not changed:
        return None
    return f"{', '.join(changed)} differs from every reviewed release ({_joined(seams)})"


def toml_lines(upstream: Upstream, current: dict[str, Any]) -> str:
    """The entry of the installed release, to be reviewed and added to `patches/<family>.toml`."""
    major, minor = transformers.__version__.split(".")[:2]
    releases = f">={major}.{minor},<{major}.{int(minor) + 1}"
    lines = ["[[seam]]", f'transformers = "{releases}"', "", "[seam.sources]"]
    for name, function in current.items():
        if function is not None:
            key = f'"{name}"' if "." in name else name
            lines.append(f'{key} = "{_source_hash(function)}"')
    return "\n".join(lines)


def _joined(seams: list[Seam]) -> str:
    """Their ranges of releases, those that follow each other as one."""
    spans: list[list[str]] = []
    for seam in seams:
        low, _, high = seam.transformers.partition(",")
        if spans and low.removeprefix(">=") == spans[-1][1].removeprefix("<"):
            spans[-1][1] = high
        else:
            spans.append([low, high])
    return ", ".join(",".join(filter(None, span)) for span in spans)


def _seams_of(upstream: Upstream) -> list[Seam]:
    names = upstream.layer_class.__module__, upstream.layer_class.__name__
    return [seam for seam in load_seams() if (seam.module, seam.layer) == names]


def _differs(seam: Seam, name: str, current: dict[str, Any]) -> bool:
    return _source_hash(current[name]) != seam.sources[name]


def _find(module: ModuleType, dotted: str) -> Any:
    value: Any = module
    for name in dotted.split("."):
        value = getattr(value, name, None)
    return called_by(value)


@cache
def _source_hash(function: Any) -> str:
    if function is None:
        return "missing"
    try:
        source = inspect.getsource(unwrap(function))
    except (OSError, TypeError):  # built in a session or compiled: nothing to review
        return "no source"
    return hashlib.sha256(source.encode()).hexdigest()


def _foreign(forward: Any) -> str | None:
    """Who put a function of theirs over upstream's; `functools.wraps` hides it from the source, not from here."""
    root = str(Path(transformers.__file__).parent) + os.sep
    for function in _layers_of(forward):
        code = getattr(function, "__code__", None)
        if code is None:
            return f"it is a {type(function).__name__}, not a function"
        if not code.co_filename.startswith(root):
            return f"{code.co_qualname if sys.version_info >= (3, 11) else code.co_name} in {code.co_filename}"
    return None


def called_by(value: Any) -> Any:
    """The function that a call of `value` calls: where installed, `kernels` makes functions into modules."""
    if type(value).__module__.startswith("kernels."):
        (value,) = inspect.getclosurevars(type(value).forward).nonlocals.values()
    return value


def unwrap(function: Any) -> Any:
    """Upstream's function under its decorators; up to 5.15 `force_accelerate_hooks` left no `__wrapped__`."""
    *_, innermost = _layers_of(function)
    return innermost


def _layers_of(function: Any) -> Iterator[Any]:
    while function is not None:
        yield function
        closed = inspect.getclosurevars(function).nonlocals if inspect.isfunction(function) else {}
        function = getattr(function, "__wrapped__", None) or closed.get("forward_func")


def _names(upstream: Upstream) -> tuple[str, ...]:
    """Names of what a decode step of this class stands in for, in whichever release."""
    layer = upstream.layer_class.__name__
    return (
        f"{layer}.forward",
        f"{layer}.fix_query_key_value_ordering",
        f"{layer.replace('GatedDeltaNet', 'RMSNormGated')}.forward",
        "causal_conv1d_update",
        "torch_causal_conv1d_update",
        "torch_recurrent_gated_delta_rule",
        "l2norm",
    )
