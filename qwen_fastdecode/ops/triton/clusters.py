"""Launches a kernel's programs in thread block clusters: the only place that knows how Triton's launcher is told.

Triton launches in clusters what it compiles with `num_ctas`, and then spreads each tile over the programs of a cluster.
A kernel whose programs keep their tiles to themselves and only meet at a barrier (`value_head`, `deferred`) is compiled
for one, and the launcher told of several: all that it reads of them is their number, in the metadata of the compiled
kernel.
"""

from __future__ import annotations

import copy
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
import triton

OLDEST = (9, 0)  # compute capability with clusters


def clusters_reason(device: torch.device) -> str | None:
    """Why programs cannot be launched in clusters on a device; None if they can."""
    return device_reason(device) or launcher_reason()


def device_reason(device: torch.device) -> str | None:
    """Why a device has no clusters; None if it has."""
    if device.type != "cuda":
        return f"a device {device.type!r} has no clusters"
    if torch.version.hip is not None:
        return "AMD's GPUs have no clusters"
    if torch.cuda.get_device_capability(device) < OLDEST:
        return f"clusters need compute capability {OLDEST[0]}.{OLDEST[1]}"
    return None


@cache
def launcher_reason() -> str | None:
    """Why the launcher of this Triton cannot be told of clusters; None if it takes its numbers as it did when reviewed.

    One that took no notice would launch programs alone, which the barrier makes trap.
    """
    from triton.backends.nvidia.compiler import CUDABackend  # builds for AMD alone may have none

    numbers = SimpleNamespace(num_warps=4, num_ctas=2, shared=8)
    try:
        told: Any = CUDABackend.pack_metadata(None, numbers)
    except (AttributeError, TypeError) as error:
        told = error
    if told != (4, 2, 8):
        return f"the launcher of Triton {triton.__version__} was not reviewed: it takes {told!r}, expected (4, 2, 8)"
    return None


def in_clusters(compiled: Any, size: int) -> Any:
    """The same compiled kernel, each of whose programs on the grid becomes a cluster of `size` along x."""
    if size == 1:
        return compiled
    compiled._init_handles()  # before it is copied: the GPU loads a kernel once
    clustered = copy.copy(compiled)
    clustered.packed_metadata = compiled.metadata.num_warps, size, compiled.metadata.shared
    return clustered
