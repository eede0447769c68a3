"""Fast decoding of Qwen3-Next and Qwen3.5 in Transformers: `qwen_fastdecode.patch(model)` before `generate`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .errors import BackendUnavailable, LayerNotCovered, NothingToPatch, PatchError, RanksDisagree, UnknownUpstream
from .report import LayerStatus, PatchReport, Status

if TYPE_CHECKING:
    from . import ops
    from .api import patch, patched, reset_counters, status, unpatch

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailable",
    "LayerNotCovered",
    "LayerStatus",
    "NothingToPatch",
    "PatchError",
    "PatchReport",
    "RanksDisagree",
    "Status",
    "UnknownUpstream",
    "ops",
    "patch",
    "patched",
    "reset_counters",
    "status",
    "unpatch",
]


def __getattr__(name: str) -> Any:
    """`ops` and the functions of `api`, on first use: they bring torch, which not every program run by us needs."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "ops":
        return importlib.import_module(".ops", __name__)
    return getattr(importlib.import_module(".api", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
