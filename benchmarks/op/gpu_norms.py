"""The norm of a captured step beside upstream's: the same bits in three dtypes, then microseconds by graph replay."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5RMSNorm

from benchmarks.checks.gpu_report import write_section
from benchmarks.op.gpu_clock import Replay, device_us
from qwen_fastdecode.ops.triton.rms_norm import rms_norm

WIDTHS = (96, 256, 2048, 2560)
ROWS = (1, 3, 8, 16, 32, 128, 512)
TIMED = {(rows, width) for rows in (1, 8, 32, 128) for width in (2560, 2048)} | {(16, 256), (512, 256)}
CALLS = 100  # in a graph
TINY_CALLS = 1


def rows_of(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> tuple[nn.Module, Tensor]:
    """A norm with random weights, and numbers of many magnitudes."""
    torch.manual_seed(rows + width)
    norm = Qwen3_5RMSNorm(width).to(device, dtype)
    nn.init.normal_(norm.weight)
    sizes = torch.logspace(-3, 3, rows, device=device)[:, None, None]
    return norm, (torch.randn(rows, 1, width, device=device) * sizes).to(dtype)


@torch.no_grad()
def measure(device: torch.device, tiny: bool) -> Iterator[dict[str, Any]]:
    """Rows: whether the bits are equal in each dtype, by one kernel and by three, and the time of what is timed."""
    calls = TINY_CALLS if tiny else CALLS
    for width in WIDTHS[:2] if tiny else WIDTHS:
        for rows in ROWS[:2] if tiny else ROWS:
            row: dict[str, Any] = {"rows": rows, "width": width, "equal": {"one": {}, "three": {}}}
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                norm, x = rows_of(rows, width, dtype, device)
                for name, in_one in (("one", True), ("three", False)):
                    found = rms_norm(x, norm.weight, norm.eps, in_one)
                    row["equal"][name][str(dtype).removeprefix("torch.")] = torch.equal(found, norm(x))
            if (rows, width) in TIMED or tiny:
                norm, x = rows_of(rows, width, torch.bfloat16, device)
                ways = {
                    "upstream": partial(norm, x),
                    "three": partial(rms_norm, x, norm.weight, norm.eps, False),
                    "one": partial(rms_norm, x, norm.weight, norm.eps, True),
                }
                row["us"] = {
                    name: device_us(Replay([way] * calls, device), device) / calls for name, way in ways.items()
                }
            print(row, flush=True)
            yield row


def main() -> None:
    """Writes norms.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True)
    parser.add_argument("--dry-run", action="store_true", help="tiny, on the CPU, in Triton's interpreter")
    options = parser.parse_args()
    device = torch.device("cpu" if options.dry_run else "cuda")
    rows = list(measure(device, options.dry_run))
    write_section(options.out, "norms", rows)
    wrong = [row for row in rows if not all(row["equal"]["one"].values())]
    print(f"{len(rows) - len(wrong)} of {len(rows)} with upstream's bits in one kernel", *wrong, sep="\n")


if __name__ == "__main__":
    main()
