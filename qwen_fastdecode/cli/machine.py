"""What a number depends on that is not the model: versions, devices, the CPU's name."""

from __future__ import annotations

import platform
from importlib.metadata import distributions, version
from pathlib import Path

import torch


def device_name(device: torch.device) -> str:
    """The device, and on a GPU which one."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def cpu_name() -> str:
    """As the system calls it; the architecture where it does not say."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Of everything installed whose version a number may depend on."""
    names = ("torch", "triton", "transformers", "flash-linear-attention", "causal-conv1d", "kernels")
    installed = {name: version(name) for name in names if any(distributions(name=name))}
    return {"python": platform.python_version(), **installed}
