"""Which implementation of the decode step runs where."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import BackendUnavailable
from ..names import BACKENDS
from .step import Recipe, Step
from .torch_cpu import decode_torch


class Backend(NamedTuple):
    """A name, and the function that checks and computes a step; it raises UnsupportedStep for what it does not take."""

    name: str
    decode: Callable[[Step, Recipe], Tensor]


class Backends:
    """The implementation that serves a layer, by device: models move after they were patched."""

    def __init__(self, name: str):
        self.name = name
        self._by_device: dict[torch.device, Backend] = {}

    def on(self, device: torch.device) -> Backend:
        """That on `device`; raises BackendUnavailable as `select_backend` does."""
        backend = self._by_device.get(device)
        if backend is None:
            backend = self._by_device[device] = select_backend(self.name, device)
        return backend

    @property
    def last(self) -> str:
        """The name of the backend on the device that was met last; before that, the one that was asked for."""
        return list(self._by_device.values())[-1].name if self._by_device else self.name


def triton_unavailable(device: torch.device) -> str | None:
    """Why the Triton kernel cannot run on `device`; None when it can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed (torch's builds for CUDA and ROCm bring it)"
    from .triton.gpu import unavailable_reason

    return unavailable_reason(device)


def select_backend(name: str, device: torch.device) -> Backend:
    """The backend called `name` on `device`; "auto" is Triton on a GPU that can run it, else PyTorch.

    Raises BackendUnavailable, with the reason, when `name` cannot run there, and ValueError when there is no such name.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend: got {name!r}, expected one of {', '.join(map(repr, BACKENDS))}")
    if name == "torch" or (name == "auto" and device.type in ("cpu", "meta")):
        return Backend("torch", decode_torch)
    reason = triton_unavailable(device)
    if reason is None:
        from .triton.launch import decode_triton

        return Backend("triton", decode_triton)
    if name == "auto":
        return Backend("torch", decode_torch)
    raise BackendUnavailable(f"backend='triton' cannot run on {device}: {reason}. Use backend='auto' or 'torch'.")
