"""States deferred for small batches and on both backends: by PyTorch's ring, which is fast here, and by the kernels."""

from __future__ import annotations

import pytest
import torch

from qwen_fastdecode.ops.deferral import Deferral
from qwen_fastdecode.ops.ring import decode_deferred_torch, settle
from qwen_fastdecode.ops.triton.deferred_launch import decode_deferred_triton, settle_triton
from qwen_fastdecode.steps import deferred

N = 4
TOGETHER = 3  # key heads that fold at the same step, and so do not at the others


def _together(device: torch.device) -> int:
    return TOGETHER


SMALL = {
    "torch": Deferral(N, 1, decode_deferred_torch, settle, _together),
    "triton": Deferral(N, 1, decode_deferred_triton, settle_triton, _together),
}


@pytest.fixture
def small_rings(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ring has four entries, and one sequence is enough."""

    def find(backend: str, state: torch.dtype) -> Deferral:
        return SMALL[backend]

    monkeypatch.setattr(deferred, "deferral", find)
