"""What compute-sanitizer looks at: one small step of each kind, with a program a key head and as the table says."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch

from benchmarks.op.gpu_step import Shape, check, random_step
from qwen_fastdecode.ops.triton.launch import decode_triton
from qwen_fastdecode.ops.triton.tiles import Tile

SMALL: dict[str, Any] = {"HK": 2, "B": 3}
SHAPES = (
    Shape(**SMALL),
    Shape(**SMALL, R=3, layout="grouped", guard=3),
    Shape(**SMALL, lengths=(2, 0, 3)),
    Shape(**SMALL, DK=96, DV=80, W=3, heads=(2, 2), state_dtype=torch.bfloat16),
)


def main() -> None:
    device = "cpu" if "--dry-run" in sys.argv else "cuda"
    for shape in SHAPES:
        check(random_step(shape, device), decode_triton)
        if shape.lengths == 1:
            check(random_step(shape, device), partial(decode_triton, tile=Tile(64, 4)))


if __name__ == "__main__":
    main()
