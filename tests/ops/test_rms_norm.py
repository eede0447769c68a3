"""The norm that stands in for upstream's while a step is recorded: upstream's bits, in either way of adding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5RMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNorm

from qwen_fastdecode.ops.triton.rms_norm import order, rms_norm, takes

# bfloat16 is compared on a GPU: the interpreter cuts numbers off where PyTorch rounds them.
DTYPES = [torch.float32, torch.float16]


def norm_and_rows(kind: type, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.nn.Module, Tensor]:
    """A norm with weights of its own, and rows of many magnitudes that lie in wider ones."""
    torch.manual_seed(0)
    norm = kind(shape[-1]).to(dtype)
    torch.nn.init.normal_(norm.weight)
    sizes = torch.logspace(-4, 2, shape[0]).view(-1, *[1] * (len(shape) - 1))
    return norm, (torch.randn(*shape[:-1], 2 * shape[-1]) * sizes).to(dtype)[..., : shape[-1]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 2560), (3, 1, 96), (5, 1, 4, 33), (2, 3, 2, 128)])
@pytest.mark.parametrize("kind", [Qwen3_5RMSNorm, Qwen3NextRMSNorm])
def test_three_kernels_have_upstreams_bits(kind: type, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    norm, x = norm_and_rows(kind, shape, dtype)
    assert takes(x, norm.weight)
    assert torch.equal(rms_norm(x, norm.weight, norm.eps, in_one=False), norm(x))


def added_as_on_a_gpu(row: np.ndarray, threads: int, vectors: bool) -> np.float32:
    """ATen/native/cuda/Reduce.cuh, a thread at a time: each has four sums, threads are added by halves."""
    totals = []
    for thread in range(threads):
        sums = [np.float32(0)] * 4
        for k in range(-(-len(row) // (4 * threads))):
            for i in range(4):
                at = (k * threads + thread) * 4 + i if vectors else (k * 4 + i) * threads + thread
                if at < len(row):
                    sums[i] = np.float32(sums[i] + row[at])
        totals.append(np.float32(np.float32(np.float32(sums[0] + sums[1]) + sums[2]) + sums[3]))
    while len(totals) > 1:
        half = len(totals) // 2
        totals = [np.float32(totals[i] + totals[i + half]) for i in range(half)]
    return totals[0]


@pytest.mark.parametrize(("rows", "width"), [(1, 2560), (3, 512), (9, 256), (17, 128), (2, 96), (5, 33)])
def test_one_kernel_adds_in_the_order_of_a_gpu(rows: int, width: int) -> None:
    norm, x = norm_and_rows(Qwen3_5RMSNorm, (rows, 1, width), torch.float32)
    squares = (x * x).numpy()[:, 0]
    sums = [added_as_on_a_gpu(row, *order(rows, width)) for row in squares]
    means = torch.tensor(np.array(sums, np.float32) * np.float32(1 / width))[:, None, None]
    expected = x * torch.rsqrt(means + norm.eps) * (1.0 + norm.weight)
    assert torch.equal(rms_norm(x, norm.weight, norm.eps, in_one=True), expected)


def test_the_order_is_the_one_that_was_read_and_measured() -> None:
    """Threads of a row, four neighbours a time or not: seen to give PyTorch 2.11's bits on an H100."""
    assert [order(rows, 2560) for rows in (1, 2, 4, 8, 15, 16, 2048)] == [
        (512, True),
        (256, True),
        (128, True),
        (64, True),
        (64, True),
        (32, True),
        (32, True),
    ]
    assert [order(rows, 256) for rows in (1, 4, 8, 16)] == [(64, True), (64, True), (64, True), (32, True)]
    assert [order(rows, 96) for rows in (1, 8, 16)] == [(64, False), (64, False), (32, False)]


@pytest.mark.parametrize(
    "x",
    [
        torch.ones(2, 3, 8).transpose(1, 2),  # numbers of a row apart
        torch.ones(4, 3, 8)[:, :2],  # rows at two distances
        torch.ones(2, 7),
        torch.ones(2, 8, dtype=torch.float64),
        torch.ones(0, 8),
        torch.ones(2, 8, device="meta"),
    ],
    ids=["apart", "distances", "width", "dtype", "none", "device"],
)
def test_what_it_does_not_take_is_said(x: Tensor) -> None:
    weight = torch.ones(8)
    assert not takes(x, weight)
    with pytest.raises(ValueError, match="expected rows as wide as the weight"):
        rms_norm(x, weight, 1e-6, in_one=True)
