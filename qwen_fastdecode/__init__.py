"""Fast decoding of Qwen3-Next and Qwen3.5 in Transformers: `qwen_fastdecode.patch(model)` before `generate`."""

from .api import patch, patched, status, unpatch
from .errors import BackendUnavailable, LayerNotCovered, NothingToPatch, PatchError, RanksDisagree, UnknownUpstream
from .report import LayerStatus, PatchReport, Status

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
    "patch",
    "patched",
    "status",
    "unpatch",
]
