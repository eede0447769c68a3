"""What we touch in Transformers and which of its releases were reviewed: the data in `patches/*.toml`, and its check.

A seam names a layer class and the SHA-256 of the source of everything that a fast decode step stands in for. Source
text is stable over Python versions (bytecode and `ast.dump` are not). `python -m qwen_fastdecode.seams` prints the
entries for the installed Transformers, for review.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import transformers

from .errors import UnknownUpstream

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
    here = Path(__file__).parent
    folder = here / "patches" if (here / "patches").is_dir() else here.parent / "patches"
    seams = []
    for path in sorted(folder.glob("*.toml")):
        data = tomllib.loads(path.read_text(encoding="utf-8"))
        common = {key: data[key] for key in ("family", "module", "layer")}
        seams += [Seam(**common, **seam) for seam in data["seam"]]
    if not seams:
        raise FileNotFoundError(f"no reviewed seams (*.toml) in {folder}: the installation is incomplete")
    return tuple(seams)


def upstream_classes(*, import_missing: bool) -> Iterator[Upstream]:
    """The gated DeltaNet classes that the installed Transformers has; only those already imported, unless asked."""
    for family, module, layer in sorted({(seam.family, seam.module, seam.layer) for seam in load_seams()}):
        if import_missing and module not in sys.modules and _exists(module):
            importlib.import_module(module)
        # Not import_module: it would wait for another thread that imports it, and that may wait for our lock.
        layer_class = getattr(sys.modules.get(module), layer, None)
        if layer_class is not None:
            yield Upstream(family, layer_class)


def _exists(module: str) -> bool:
    parent = module.rpartition(".")[0]
    return importlib.util.find_spec(parent) is not None and importlib.util.find_spec(module) is not None


def check_reviewed(upstream: Upstream, forward: Any) -> None:
    """Raises UnknownUpstream unless `forward` and all that a decode step stands in for are code that was reviewed.

    `forward` is upstream's function, as it was before we patched the class.
    """
    module = sys.modules[upstream.layer_class.__module__]
    names = module.__name__, upstream.layer_class.__name__
    seams = [seam for seam in load_seams() if (seam.module, seam.layer) == names]
    nearest = min(seams, key=lambda seam: len(_differing(seam, module, forward)))
    for name, function in _current(nearest, module, forward).items():
        foreign = None if function is None else _foreign_patch(function)
        if foreign is not None:
            raise UnknownUpstream(
                f"{module.__name__}.{name} is patched by somebody else: {foreign}. Undo that patch first"
            )
    changed = _differing(nearest, module, forward)
    if changed:
        raise UnknownUpstream(
            f"{module.__name__} of Transformers {transformers.__version__} is not a version that was reviewed: "
            f"{', '.join(changed)} differs from every reviewed release "
            f"({', '.join(seam.transformers for seam in seams)}). "
            "Upgrade qwen-fastdecode, or install a reviewed release of Transformers"
        )


def _differing(seam: Seam, module: ModuleType, forward: Any) -> list[str]:
    current = _current(seam, module, forward)
    return [name for name, reviewed in seam.sources.items() if _source_hash(current[name]) != reviewed]


def _current(seam: Seam, module: ModuleType, forward: Any) -> dict[str, Any]:
    """What the installed Transformers has under the names of a seam."""
    return {name: _find(module, name) for name in seam.sources} | {f"{seam.layer}.forward": forward}


def _find(module: ModuleType, dotted: str) -> Any:
    value: Any = module
    for name in dotted.split("."):
        value = getattr(value, name, None)
    if type(value).__module__.startswith("kernels."):  # where installed, `kernels` makes functions into modules
        (value,) = inspect.getclosurevars(type(value).forward).nonlocals.values()
    return value


@cache
def _source_hash(function: Any) -> str:
    if function is None:
        return "missing"
    try:
        source = inspect.getsource(function)
    except (OSError, TypeError):  # built in a session or compiled: nothing to review
        return "no source"
    return hashlib.sha256(source.encode()).hexdigest()


def _foreign_patch(forward: Any) -> str | None:
    """Who put a function of theirs over upstream's; `functools.wraps` hides it from the source, not from here."""
    root = str(Path(transformers.__file__).parent)
    function = forward
    while function is not None:
        code = getattr(function, "__code__", None)
        if code is None:
            return f"it is a {type(function).__name__}, not a function"
        if not code.co_filename.startswith(root):
            return f"{code.co_qualname if sys.version_info >= (3, 11) else code.co_name} in {code.co_filename}"
        function = getattr(function, "__wrapped__", None)
    return None


def _reviewable(upstream: Upstream) -> Iterator[str]:
    """Names of what a decode step of this class stands in for, whatever the release calls it."""
    module = sys.modules[upstream.layer_class.__module__]
    layer = upstream.layer_class.__name__
    norm = layer.replace("GatedDeltaNet", "RMSNormGated")
    for name in (
        f"{layer}.forward",
        f"{layer}.fix_query_key_value_ordering",
        f"{norm}.forward",
        "causal_conv1d_update",
        "torch_causal_conv1d_update",
        "torch_recurrent_gated_delta_rule",
        "l2norm",
    ):
        if _find(module, name) is not None:
            yield name


def main() -> None:
    """Prints the installed release's entries, to be reviewed and added to `patches/`."""
    for upstream in upstream_classes(import_missing=True):
        module = sys.modules[upstream.layer_class.__module__]
        print(f"# patches/{upstream.family}.toml")
        print(f'[[seam]]\ntransformers = "{transformers.__version__}"\n\n[seam.sources]')
        for name in _reviewable(upstream):
            print(f'"{name}" = "{_source_hash(_find(module, name))}"')
        print()


if __name__ == "__main__":
    main()
