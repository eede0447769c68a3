"""What the host spends in one eager call, beside the least that a Triton launch costs.

host.json: microseconds a call at batch 1, of a patched and of an unpatched layer among them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
import triton

import qwen_fastdecode
from benchmarks.checks.gpu_report import write_section
from benchmarks.op.gpu_clock import host_us
from benchmarks.op.gpu_layers import Stack, Workload, installed_kernels, pytorch_functions
from qwen_fastdecode.ops import gated_delta_decode
from qwen_fastdecode.ops.triton.gpu import INTERPRETED
from qwen_fastdecode.ops.triton.launch import decode_triton

FEW = 20  # calls of upstream, which launches dozens of kernels each: no more than the launch queue takes


@triton.jit(do_not_specialize=["n0", "n1", "n2", "n3", "n4", "n5", "n6", "n7", "n8", "n9", "n10"])
def _nothing(
    q, k, v, z, b, a, conv, state, weight, A, dt, norm, lengths, out, n0, n1, n2, n3, n4, n5, n6, n7, n8, n9, n10
):  # fmt: skip
    """As many arguments as the decode kernel has, and no work."""


@torch.no_grad()
def host_times(device: torch.device) -> dict[str, float]:
    """Microseconds of host time a call at batch 1, 16 key heads and 32 value heads (2 and 4 on a CPU).

    Raises RuntimeError where a call of the patched layer was not a fast step.
    """
    w = Workload(1, 32) if device.type == "cuda" else Workload(1, 4, HK=2, D=16)
    stack = Stack(w, 1, device)
    step, layer = stack.step(0), stack.calls()[0]
    times = {
        "empty Triton kernel, launched as usual": _time(_empty_launch(step.tensors), device),
        "empty Triton kernel, compiled before": _time(_empty_compiled(step.tensors), device),
        "torch.empty": _time(lambda: torch.empty(1, 4096, dtype=w.dtype, device=device), device),
        "a backend (what the patch calls)": _time(lambda: step.run(decode_triton), device),
        "op, checked (gated_delta_decode)": _time(lambda: gated_delta_decode(*step.tensors, **step.options), device),
    }
    with qwen_fastdecode.patched(stack, backend="triton"):
        times["patched layer, without projections"] = _time(layer, device)
        status = qwen_fastdecode.status(stack)
    if not status.fast_steps or status.fallbacks:
        raise RuntimeError(f"the patched layer's time is not that of fast steps:\n{status}")
    with pytorch_functions(stack.source):
        times["upstream layer, PyTorch, without projections"] = _time(layer, device, FEW)
    if installed_kernels(stack.source):
        times["upstream layer, installed kernels, without projections"] = _time(layer, device, FEW)
    return times


def _time(call: Callable[[], Any], device: torch.device, calls: int = 200) -> float:
    for _ in range(3):
        call()  # compiles
    return host_us(call, device, calls if device.type == "cuda" else 2)


def _empty_launch(tensors: tuple[torch.Tensor, ...]) -> Callable[[], Any]:
    return lambda: _nothing[(16, 1, 1)](*tensors, None, tensors[0], *range(11))


def _empty_compiled(tensors: tuple[torch.Tensor, ...]) -> Callable[[], Any]:
    if INTERPRETED:
        return _empty_launch(tensors)
    run = _nothing.warmup(*tensors, None, tensors[0], *range(11), grid=(16, 1, 1))[(16, 1, 1)]
    addresses = [x.data_ptr() for x in tensors]
    return lambda: run(*addresses, None, addresses[0], *range(11))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="benchmarks/results/latest", help="folder for the JSON")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU, in Triton's interpreter")
    arguments = parser.parse_args()
    times = host_times(torch.device("cpu" if arguments.dry_run else "cuda"))
    write_section(arguments.out, "host", times)
    for name, us in times.items():
        print(f"{us:8.1f} us  {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
