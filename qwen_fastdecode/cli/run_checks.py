"""What `qwen-fastdecode run` can say before its program starts, without importing torch or Transformers."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from importlib.metadata import PackageNotFoundError, version

OLDEST = (4, 57)  # release of Transformers; pyproject.toml tells pip the same


def refusal(backend: str, *, strict: bool) -> str | None:
    """Why no model of the program could be patched, in one line; None where one could.

    A program without Transformers may start: it may need none.
    """
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "--backend triton: triton is not installed"
        if _no_gpu() and not os.environ.get("TRITON_INTERPRET"):
            return "--backend triton: this machine has no GPU, or no driver of one; use --backend auto or torch"
    release = _transformers()
    if strict and release is not None and tuple(map(int, release.split(".")[:2])) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        return f"Transformers {release} is too old, {oldest} is needed; --no-strict runs the program without the patch"
    return None


def _no_gpu() -> bool:
    """Whether the libraries and devices are missing without which PyTorch finds none; asks no driver."""
    if sys.platform != "linux" or os.path.exists("/dev/kfd"):  # ROCm's, whose libraries PyTorch brings itself
        return False
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return True
    return False


def _transformers() -> str | None:
    try:
        return version("transformers")
    except PackageNotFoundError:
        return None
