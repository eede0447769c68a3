"""Bugs of other implementations of this step, and of launchers that are kept for the next call: not ours.

Each is a step for which the careless way gives another number, through the public function, on every backend.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from op_cases import Case
from tolerances import FLOAT16_ROUNDING, FLOAT32, relative_rms
from torch import Tensor

from qwen_fastdecode.ops import gated_delta_decode
from qwen_fastdecode.ops.reference import decode_reference
from qwen_fastdecode.ops.step import Recipe, Step

F16, BF16 = torch.float16, torch.bfloat16
BACKENDS = ("torch", "triton")
Result = tuple[Tensor, Tensor, Tensor]  # output, conv state, recurrent state


def run(case: Case, backend: str, **changes: Any) -> Result:
    """What a backend makes of the step: on the case's own memory, whose states are put back."""
    states = case["conv_state"], case["recurrent_state"]
    before = [state.clone() for state in states]
    out = gated_delta_decode(*case.tensors.values(), **case.options() | changes, backend=backend)
    after = [state.clone() for state in states]
    for state, old in zip(states, before, strict=True):
        state.copy_(old)
    return out, *after


def expect(case: Case, **changes: Any) -> Result:
    """What the reference makes of it, the recurrent state in float64."""
    copies = case.tensors | {"conv_state": case["conv_state"].clone()}
    copies["recurrent_state"] = case["recurrent_state"].to(torch.float64, copy=True)
    options = case.options() | changes
    step = Step.from_tensors([*copies.values()], options.pop("cu_seqlens"))
    out = decode_reference(step, Recipe(**options))
    return out, copies["conv_state"], copies["recurrent_state"]


def distances(actual: Result, expected: Result) -> list[float]:
    return [relative_rms(a, b) for a, b in zip(actual, expected, strict=True)]


# One rounding too many


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_beta_is_not_rounded_to_bfloat16(backend: str, T: int) -> None:
    """The activations are bfloat16, the state is not: it shows every rounding between the two."""
    case = Case(B=2, HK=1, dtype=BF16, T=T)
    case["b"].fill_(0.75)
    beta = torch.tensor(0.75).sigmoid()
    assert abs(beta.to(BF16) / beta - 1) > 100 * FLOAT32  # what rounding would change
    *_, state = run(case, backend)
    assert relative_rms(state, expect(case)[2]) < 2 * FLOAT32


def readout(case: Case) -> Tensor:
    """What the norm is given: o of the last token in float64, [B, HK, R, DV]."""
    _, taps, state = expect(case)
    q = F.silu((taps.double() * case["conv_weight"].double()).sum(2))[:, : case.HK * case.DK]
    q = q.unflatten(1, (case.HK, case.DK))
    q = q * torch.rsqrt(q.square().sum(-1, keepdim=True) + 1e-6) / case.DK**0.5
    return torch.einsum("bhrkv,bhk->bhrv", state.unflatten(1, (case.HK, case.R)), q)


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_readout_beyond_float16_is_normalised_before_it_is_rounded(backend: str, T: int) -> None:
    """A float16 model with a large state: o overflows in float16, what the norm makes of it does not."""
    case = Case(B=2, HK=1, dtype=F16, T=T)
    case["recurrent_state"].mul_(1e8)
    case["a"].sub_(5)  # hardly any decay
    assert (readout(case).abs() > torch.finfo(F16).max).float().mean() > 0.9
    out, _, state = run(case, backend)
    expected = expect(case)
    assert out.isfinite().all()
    assert relative_rms(out, expected[0]) < FLOAT16_ROUNDING + FLOAT32
    assert relative_rms(state, expected[2]) < 2 * FLOAT32


# A launcher that was prepared for another call


@pytest.mark.parametrize("backend", BACKENDS)
def test_calls_that_differ_in_eps_alone(backend: str) -> None:
    """The same memory, so that nothing but eps tells the calls apart."""
    case = Case(B=2, HK=1)
    steps = [{"eps": eps} for eps in (1e-6, 1.0, 1e-6)]
    assert relative_rms(expect(case, **steps[1])[0], expect(case, **steps[0])[0]) > 0.1
    for step in steps:
        assert max(distances(run(case, backend, **step), expect(case, **step))) < 2 * FLOAT32


@pytest.mark.parametrize(("N", "bounds"), [(2, [0, 0, 2]), (4, [0, 1, 4])], ids=["one token each", "two tokens each"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_calls_that_differ_in_cu_seqlens_alone(backend: str, N: int, bounds: list[int]) -> None:
    """The same memory with the tokens shared out evenly, by no lengths at all, and as the lengths say."""
    case = Case(B=2, HK=1, T=N // 2)
    steps = [{"cu_seqlens": lengths} for lengths in (None, torch.tensor(bounds, dtype=torch.int32), None)]
    assert relative_rms(expect(case, **steps[1])[0], expect(case, **steps[0])[0]) > 0.1
    for step in steps:
        assert max(distances(run(case, backend, **step), expect(case, **step))) < 2 * FLOAT32
