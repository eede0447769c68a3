"""What compute-sanitizer looks at: one small step of each kind, with the shipped tile, checked against float64."""

from __future__ import annotations

import sys
from typing import Any

import torch

from benchmarks.op.gpu_step import Shape, check, random_step
from qwen_fastdecode.ops.triton.launch import decode_triton

SMALL: dict[str, Any] = {"HK": 2, "B": 3}
SHAPES = (
    Shape(**SMALL),
    Shape(**SMALL, R=3, layout="grouped", guard=3),
    Shape(**SMALL, lengths=(2, 0, 3)),
    Shape(**SMALL, DK=96, DV=80, W=3, heads=(1, 2), state_dtype=torch.bfloat16),
)


def main() -> None:
    device = "cpu" if "--dry-run" in sys.argv else "cuda"
    for shape in SHAPES:
        check(random_step(shape, device), decode_triton)


if __name__ == "__main__":
    main()
