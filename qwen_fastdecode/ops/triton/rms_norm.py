"""RMSNorm with a zero-centred weight, x * rsqrt(mean(x^2) + eps) * (1 + weight), to the bits of upstream's operators.

Everything but the mean has one right result in float32, as long as nothing is contracted to a fused multiply-add. A sum
has as many as there are orders of adding. Either one kernel adds in the order that PyTorch's reduction has on NVIDIA
GPUs, or PyTorch itself takes the mean, between two kernels; whoever asks for the first has seen that it is the same.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WARP, MOST_THREADS, VECTOR = 32, 512, 4  # of PyTorch's reduction of float32 numbers
WIDEST = 8192  # from here on PyTorch gives a row to several warps or blocks
EXACT = {"enable_fp_fusion": False, "num_warps": 4}


def _power_below(n: int) -> int:
    return 1 << (n.bit_length() - 1)


def order(rows: int, width: int) -> tuple[int, bool]:
    """How PyTorch 2.11 to 2.13 adds up contiguous rows of float32 (ATen/native/cuda/Reduce.cuh): the threads of a row,
    and whether each of them reads four neighbours at a time or four numbers as far apart as there are threads."""
    vectors = width >= 128
    across = min(_power_below(width // VECTOR if vectors else width), MOST_THREADS)
    down = min(_power_below(rows), MOST_THREADS // min(across, WARP))
    return min(across, MOST_THREADS // down), vectors


@triton.jit
def _squares(x, k: tl.constexpr, i: tl.constexpr, width, THREADS: tl.constexpr, VECTORS: tl.constexpr):
    """What each thread adds to its i-th sum in its k-th turn."""
    thread = tl.arange(0, THREADS)
    if VECTORS:
        column = (k * THREADS + thread) * 4 + i
    else:
        column = (k * 4 + i) * THREADS + thread
    numbers = tl.load(x + column, mask=column < width, other=0.0).to(tl.float32)
    return numbers * numbers


@triton.jit(do_not_specialize=["x_row"])
def _norm(
    x,
    weight,
    out,
    x_row,
    width,
    eps,
    factor,
    THREADS: tl.constexpr,
    VECTORS: tl.constexpr,
    TURNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row. Four sums a thread, added up; then halves of the threads are added until one is left."""
    row = tl.program_id(0).to(tl.int64)
    x += row * x_row
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    numbers = tl.load(x + columns, mask=inside, other=0.0).to(tl.float32)  # before the sums: their latencies overlap
    factors = 1.0 + tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    sum0 = _squares(x, 0, 0, width, THREADS, VECTORS)
    sum1 = _squares(x, 0, 1, width, THREADS, VECTORS)
    sum2 = _squares(x, 0, 2, width, THREADS, VECTORS)
    sum3 = _squares(x, 0, 3, width, THREADS, VECTORS)
    for k in tl.static_range(1, TURNS):
        sum0 += _squares(x, k, 0, width, THREADS, VECTORS)
        sum1 += _squares(x, k, 1, width, THREADS, VECTORS)
        sum2 += _squares(x, k, 2, width, THREADS, VECTORS)
        sum3 += _squares(x, k, 3, width, THREADS, VECTORS)
    total = ((sum0 + sum1) + sum2) + sum3
    for i in tl.static_range(0, 9):  # 512 threads at most
        if (THREADS >> i) > 1:
            total = tl.sum(tl.reshape(total, [2, (THREADS >> i) // 2]), 0)  # of two numbers: in one order only
    mean = tl.sum(total, 0) * factor
    y = numbers * tl.rsqrt(mean + eps) * factors
    tl.store(out + row * width + columns, y.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["x_row"])
def _square(x, squares, x_row, width, BLOCK: tl.constexpr):
    """One program a row: its squares in float32."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    numbers = tl.load(x + row * x_row + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(squares + row * width + columns, numbers * numbers, mask=inside)


@triton.jit(do_not_specialize=["x_row"])
def _scale(x, means, weight, out, x_row, width, eps, BLOCK: tl.constexpr):
    """One program a row: x * rsqrt(mean + eps) * (1 + weight), rounded once."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    numbers = tl.load(x + row * x_row + columns, mask=inside, other=0.0).to(tl.float32)
    factors = 1.0 + tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    y = numbers * tl.rsqrt(tl.load(means + row) + eps) * factors
    tl.store(out + row * width + columns, y.to(out.dtype.element_ty), mask=inside)


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether `rms_norm` can have these: rows of the weight's width that lie at equal distances, on one device."""
    fits = x.dtype in DTYPES and weight.dtype in DTYPES and x.device == weight.device and x.numel() > 0
    return fits and x.shape[-1] == weight.numel() and weight.is_contiguous() and _row_stride(x) is not None


def rms_norm(x: Tensor, weight: Tensor, eps: float, in_one: bool) -> Tensor:
    """x [..., width], weight [width] of dtypes in DTYPES -> [..., width], contiguous, in the dtype of x.

    in_one: one kernel, which adds in `order`; else three. Raises ValueError for what `takes` refuses.
    """
    stride = _row_stride(x)
    if stride is None or not takes(x, weight):
        raise ValueError(
            f"x: got {x.dtype} {tuple(x.shape)} with strides {x.stride()}, weight: {weight.dtype} "
            f"{tuple(weight.shape)}; expected rows as wide as the weight, at equal distances"
        )
    width, rows = x.shape[-1], x.numel() // x.shape[-1]
    block = triton.next_power_of_2(width)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if in_one:
        threads, vectors = order(rows, width)
        sizes = {"THREADS": threads, "VECTORS": vectors, "TURNS": triton.cdiv(width, VECTOR * threads), "BLOCK": block}
        _norm[(rows,)](x, weight, out, stride, width, eps, 1.0 / width, **sizes, **EXACT)
        return out
    squares = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    _square[(rows,)](x, squares, stride, width, BLOCK=block, **EXACT)
    _scale[(rows,)](x, squares.mean(-1, keepdim=True), weight, out, stride, width, eps, BLOCK=block, **EXACT)
    return out


def _row_stride(x: Tensor) -> int | None:
    """How far rows [..., :] are from one another; None if the distances differ or numbers of a row are apart."""
    if x.dim() == 0 or (x.stride(-1) != 1 and x.shape[-1] > 1):
        return None
    outer = [(size, stride) for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size != 1]
    if any(before != size * stride for (_, before), (size, stride) in pairwise(outer)):
        return None
    return outer[-1][1] if outer else x.shape[-1]
