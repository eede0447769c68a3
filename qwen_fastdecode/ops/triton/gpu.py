"""What the kernels run on: a GPU, or Triton's interpreter on the CPU."""

from __future__ import annotations

import torch
import triton

from . import parts

INTERPRETED = not isinstance(parts.load, triton.JITFunction)  # TRITON_INTERPRET=1: runs on the CPU, for tests
PROGRAMS_PER_SM = 32  # a few waves; past them, a program takes several items
INTERPRETED_PROGRAMS = 8  # few, so that the interpreter takes several items too
OLDEST = (8, 0)  # compute capability with bfloat16, which Triton supports


def unavailable_reason(device: torch.device) -> str | None:
    """Why this backend cannot run on a device; None if it can."""
    if INTERPRETED:
        return None if device.type == "cpu" else "Triton runs in its interpreter (TRITON_INTERPRET=1), on the CPU only"
    if device.type != "cuda":
        return f"Triton needs a CUDA or ROCm device, not {device.type!r}"
    if not torch.cuda.is_available():
        return "PyTorch finds no GPU that it can use"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < OLDEST:
        return f"Triton needs compute capability {OLDEST[0]}.{OLDEST[1]}"
    return None


def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def max_programs_on(device: torch.device) -> int:
    """How many programs, or clusters of them, a launch has at most."""
    return INTERPRETED_PROGRAMS if INTERPRETED else PROGRAMS_PER_SM * multiprocessors(device)


def architecture(device: torch.device) -> str:
    """As the tile table calls it: sm_90, gfx942."""
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def compile_options(num_warps: int, max_registers: int) -> dict[str, int]:
    """Triton's own. Stages are the kernels' affair: Triton has no loop to pipeline in them."""
    options = {"num_warps": num_warps, "num_stages": 1, "enable_fp_fusion": True}
    if max_registers and torch.version.hip is None:  # a CUDA option
        options["maxnreg"] = max_registers
    return options
