"""What `gated_delta_decode` refuses: the message names the argument, what came and what was expected."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from op_cases import NAMES, Case

from qwen_fastdecode import BackendUnavailable
from qwen_fastdecode.ops import gated_delta_decode
from qwen_fastdecode.ops.backends import select_backend
from qwen_fastdecode.ops.triton import gpu

# B 3, HK 2, R 2, DK 16, DV 16, W 4: C is 128.
WRONG_SHAPES = {
    "q": ((3, 2, 2, 8), "q: got shape (3, 2, 2, 8), expected [N, HK, DK]"),
    "k": ((3, 2, 8), "k: got shape (3, 2, 8), expected (3, 2, 16)"),
    "v": ((3, 2, 32), "v: got shape (3, 2, 32), expected [N, HK, R, DV]"),
    "z": ((3, 2, 1, 16), "z: got shape (3, 2, 1, 16), expected (3, 2, 2, 16)"),
    "b": ((3, 4), "b: got shape (3, 4), expected (3, 2, 2)"),
    "a": ((4, 2, 2), "a: got shape (4, 2, 2), expected (3, 2, 2)"),
    "conv_state": ((3, 512), "conv_state: got shape (3, 512), expected [B, C, W]"),
    "recurrent_state": ((3, 4, 16, 8), "recurrent_state: got shape (3, 4, 16, 8), expected (3, 4, 16, 16)"),
    "conv_weight": ((128, 2, 4), "conv_weight: got shape (128, 2, 4), expected (128, 1, 4)"),
    "A_log": ((2,), "A_log: got shape (2,), expected (4,)"),
    "dt_bias": ((4, 1), "dt_bias: got shape (4, 1), expected (4,)"),
    "norm_weight": ((64,), "norm_weight: got shape (64,), expected (16,)"),
}


def refuse(message: str, *, case: Case | None = None, change: dict[str, Any] | None = None, **options: Any) -> None:
    """The call raises ValueError with `message`, and the states are as they were."""
    case = case or Case()
    states = [case[name].clone() for name in ("conv_state", "recurrent_state")]
    tensors = case.tensors | (change or {})
    with pytest.raises(ValueError, match=re.escape(message)):
        gated_delta_decode(*tensors.values(), **case.options() | {"backend": "torch"} | options)
    assert torch.equal(states[0], case["conv_state"])
    assert torch.equal(states[1], case["recurrent_state"])


@pytest.mark.parametrize("name", NAMES)
def test_shape(name: str) -> None:
    shape, message = WRONG_SHAPES[name]
    refuse(message, change={name: torch.zeros(shape)})


def test_channels_of_conv_state_follow_from_the_heads() -> None:
    """Such a message says what the expected shape was derived from."""
    message = "conv_state: got shape (3, 127, 4), expected (3, 128, 4) (from q, v and conv_state: StepShapes(N=3, B=3,"
    refuse(message, change={"conv_state": torch.zeros(3, 127, 4)})


@pytest.mark.parametrize("name", NAMES)
def test_dtype(name: str) -> None:
    case = Case()
    refuse(f"{name}: got dtype torch.int8, expected one of torch.float32,", case=case, change={name: case[name].char()})


@pytest.mark.parametrize("name", NAMES[1:])
def test_device(name: str) -> None:
    case = Case()
    refuse(f"{name}: got device meta, expected cpu, where q is", case=case, change={name: case[name].to("meta")})


@pytest.mark.parametrize("name", ["q", "k", "v", "z", "norm_weight"])
def test_inner_stride(name: str) -> None:
    case = Case()
    apart = torch.stack((case[name], case[name]), dim=-1)[..., 0]
    message = f"{name}: got strides {apart.stride()}, expected the last one to be 1"
    refuse(message, case=case, change={name: apart})


@pytest.mark.parametrize("W", [1, 5])
def test_taps(W: int) -> None:
    refuse(f"conv_state: got {W} taps, expected 2 to 4", case=Case(W=W))


def test_gate() -> None:
    refuse("gate: got 'gelu', expected one of 'silu', 'sigmoid'", gate="gelu")


@pytest.mark.parametrize("beta_scale", [0.0, -1.0, 2.5, float("nan")])
def test_beta_scale(beta_scale: float) -> None:
    refuse(f"beta_scale: got {beta_scale}, expected more than 0 and at most 2", beta_scale=beta_scale)


@pytest.mark.parametrize("heads", [(-1, 2), (0, 0), (3, 2), (4, 1)], ids=str)
def test_heads(heads: tuple[int, int]) -> None:
    refuse(f"heads: got (first, count) = {heads}, expected a range inside the 4 value heads", heads=heads)


def test_tokens_that_do_not_divide_evenly() -> None:
    message = "q: got 3 tokens for the 2 sequences of conv_state, expected the same number for each; pass cu_seqlens"
    states = {"conv_state": torch.zeros(2, 128, 4), "recurrent_state": torch.zeros(2, 4, 16, 16)}
    refuse(message, change=states)


def test_no_sequence() -> None:
    states = {"conv_state": torch.zeros(0, 128, 4), "recurrent_state": torch.zeros(0, 4, 16, 16)}
    refuse("q: got 3 tokens for the 0 sequences of conv_state", change=states)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.tensor([0, 1, 3]), "torch.int64 of shape (3,), expected int32 or int64 of shape (4,)"),
        (lambda: torch.zeros(4), "torch.float32 of shape (4,), expected int32 or int64 of shape (4,)"),
        (lambda: torch.zeros(4, dtype=torch.int32, device="meta"), "device meta, expected cpu, where q is"),
    ],
    ids=["length", "dtype", "device"],
)
def test_cu_seqlens(make: Callable[[], torch.Tensor], message: str) -> None:
    refuse(f"cu_seqlens: got {message}", cu_seqlens=make())


def test_unknown_backend() -> None:
    refuse("backend: got 'cuda', expected one of 'auto', 'triton', 'torch'", backend="cuda")


def test_triton_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "INTERPRETED", False)
    case = Case()
    message = re.escape("backend='triton' cannot run on cpu: Triton needs a CUDA or ROCm device, not 'cpu'.")
    with pytest.raises(BackendUnavailable, match=message):
        gated_delta_decode(*case.tensors.values(), **case.options(), backend="triton")


@pytest.mark.parametrize("interpreted", [False, True])
def test_auto_on_the_cpu_is_pytorch(monkeypatch: pytest.MonkeyPatch, interpreted: bool) -> None:
    """Also under Triton's interpreter, which is for tests."""
    monkeypatch.setattr(gpu, "INTERPRETED", interpreted)
    assert select_backend("auto", torch.device("cpu")).name == "torch"
    auto, asked = Case(), Case()
    assert torch.equal(auto.run(gated_delta_decode), gated_delta_decode(*asked.tensors.values(), backend="torch"))
