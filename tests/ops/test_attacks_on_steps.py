"""Arguments of the op that are unusual, or wrong: computed as the reference does, or refused by name."""

from __future__ import annotations

import pytest
import torch
from op_cases import Case
from torch import Tensor
from triton_step import Step

from qwen_fastdecode.errors import UnsupportedStep
from qwen_fastdecode.ops import gated_delta_decode

BACKENDS = ("torch", "triton")


def decode(backend: str, *tensors: Tensor, **options: object) -> Tensor:
    return gated_delta_decode(*tensors, **options, backend=backend)


def apart(x: Tensor, dim: int, stride: int) -> Tensor:
    """x with neighbours along `dim` so far apart; memory is reserved, and touched only where x lies."""
    strides = [*x.contiguous().stride()]
    strides[dim] = stride
    last = sum((size - 1) * step for size, step in zip(x.shape, strides, strict=True))
    storage = torch.UntypedStorage((last + 1) * x.element_size())
    return torch.empty(0, dtype=x.dtype).set_(storage).as_strided(x.shape, strides).copy_(x)


@pytest.mark.parametrize(
    ("name", "stride"), [("conv_state", 2**25), ("recurrent_state", 2**30), ("q", 2**31 - 64), ("v", 2**31 - 64)]
)
@pytest.mark.parametrize("T", [1, 2])
def test_offsets_within_a_sequence_past_two_to_the_31(name: str, stride: int, T: int) -> None:
    """Channels of a conv state cropped out of a long past; heads batch by batch; wide projections."""
    sizes = {"B": 1, "HK": 2, "R": 2, "T": T, "state_dtype": torch.bfloat16, "margin": 4}
    near, far = Step(**sizes), Step(**sizes)
    setattr(far, name, apart(getattr(far, name), 1, stride))
    assert torch.equal(far.run(), near.run())
    assert torch.equal(far.conv_state, near.conv_state)
    assert torch.equal(far.recurrent_state, near.recurrent_state)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "bounds", [[0, 1, 2], [1, 2, 4], [0, 3, 2], [0, 2, 5], [-1, 2, 4], [0, 0, 3]], ids=str
)  # of four tokens: left out, repeated, past the end
def test_every_token_is_dealt_out_once(backend: str, bounds: list[int]) -> None:
    case = Case(B=2, T=2)
    case.cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    before = case["recurrent_state"].clone()
    with pytest.raises(ValueError, match=r"cu_seqlens: got .*, expected 0 to 4"):
        decode(backend, *case.tensors.values(), **case.options())
    assert torch.equal(case["recurrent_state"], before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["conv_state", "recurrent_state"])
def test_sequences_in_one_place_are_refused(backend: str, name: str) -> None:
    case = Case()
    case.tensors[name] = case[name][:1].expand_as(case[name])
    with pytest.raises(UnsupportedStep, match=f"{name}: got strides .*, expected no two elements in the same place"):
        decode(backend, *case.tensors.values(), **case.options())


@pytest.mark.parametrize("backend", BACKENDS)
def test_halves_of_a_key_head_are_refused(backend: str) -> None:
    """Each of two such calls would shift the key head's taps."""
    case = Case()
    with pytest.raises(UnsupportedStep, match=r"heads: got \(first, count\) = \(0, 1\), expected multiples of 2"):
        decode(backend, *case.tensors.values(), **case.options() | {"heads": (0, 1)})


def test_taps_are_rounded_once_in_a_call_of_several_tokens() -> None:
    """bfloat16 taps under float32 tokens, in PyTorch: the convolution reads the tokens that came, not their roundings.

    (Triton's interpreter rounds to bfloat16 otherwise than a GPU; the kernel keeps its taps in registers.)
    """
    case = Case(T=4, dtype=torch.float32)
    case.tensors["conv_state"] = case["conv_state"].to(torch.bfloat16)
    case.buffers.clear()
    case.check(lambda *tensors, **options: decode("torch", *tensors, **options))
