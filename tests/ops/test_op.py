"""`gated_delta_decode` in PyTorch against the float64 reference, and the reference against upstream's own layers."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import Case, bits
from tolerances import FLOAT32_EXTREME_GATES

from qwen_fastdecode.ops import gated_delta_decode
from qwen_fastdecode.ops import torch_cpu as torch_backend
from qwen_fastdecode.ops.reference import decode_reference
from qwen_fastdecode.ops.step import Step

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
FAMILIES = ("qwen3_next", "qwen3_5")
decode = partial(gated_delta_decode, backend="torch")


@pytest.mark.parametrize("R", [1, 2, 3, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_and_head_ratios(family: str, R: int) -> None:
    Case(family=family, R=R).check(decode)


@pytest.mark.parametrize(
    "sizes",
    [
        {"DK": 16, "DV": 32},
        {"DK": 40, "DV": 24, "R": 3},
        {"DK": 17, "DV": 9, "HK": 3},
        {"DK": 1, "DV": 1, "HK": 1, "R": 1},
        {"HK": 5, "R": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", FAMILIES)
def test_sizes(family: str, sizes: dict[str, int]) -> None:
    Case(family=family, **sizes).check(decode)


@pytest.mark.parametrize("W", [2, 3, 4])
@pytest.mark.parametrize("conv", ["taps", "channels", "crop"])
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_conv_state_strides(conv: str, W: int, dtype: torch.dtype) -> None:
    Case(conv=conv, W=W, dtype=dtype).check(decode)


@pytest.mark.parametrize("state_dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("weight_dtype", [None, F32], ids=["weights-alike", "weights-float32"])
@pytest.mark.parametrize("dtype", [BF16, F16, F32, F64], ids=str)
def test_dtypes(dtype: torch.dtype, weight_dtype: torch.dtype | None, state_dtype: torch.dtype) -> None:
    Case(dtype=dtype, weight_dtype=weight_dtype, state_dtype=state_dtype, DK=24).check(decode)


@pytest.mark.parametrize("B", [1, 3, 8, 3000])
def test_batch(B: int) -> None:
    Case(B=B, HK=1, DK=4, DV=3).check(decode)


@pytest.mark.parametrize("guards", [(0,), (1,), (0, 1)], ids=["dense", "heads-apart", "both-apart"])
@pytest.mark.parametrize("state_dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("chunk", [1, 2])
def test_state_in_chunks(
    monkeypatch: pytest.MonkeyPatch, chunk: int, state_dtype: torch.dtype, guards: tuple[int, ...]
) -> None:
    """Five sequences in chunks of one or two, whether or not other memory lies between their states."""
    case = Case(B=5, guards=guards, state_dtype=state_dtype)
    monkeypatch.setattr(torch_backend, "CHUNK_ELEMENTS", chunk * case["recurrent_state"][0].numel())
    case.check(decode)


@pytest.mark.parametrize("B", [1, 3])
def test_heads_of_the_state_apart(B: int) -> None:
    """Every other head of a larger state: no sequence's heads form one block of memory."""
    case = Case(B=B)
    wide = torch.full((B, 8, 16, 16), torch.nan)
    case.buffers.append(wide)
    case.tensors["recurrent_state"] = wide[:, ::2].copy_(case["recurrent_state"])
    case.check(decode)


@pytest.mark.parametrize("gate", ["silu", "sigmoid"])
@pytest.mark.parametrize("eps", [1e-6, 1e-1])
def test_gate_and_epsilon(gate: str, eps: float) -> None:
    Case(gate=gate, eps=eps).check(decode)


@pytest.mark.parametrize("beta_scale", [0.5, 2.0])
@pytest.mark.parametrize("T", [1, 3])
def test_beta_scale(T: int, beta_scale: float) -> None:
    """At 2 the state's transition along k has eigenvalues down to -1."""
    Case(T=T, beta_scale=beta_scale, heads=(2, 2)).check(decode)
    steep = Case(T=T, beta_scale=beta_scale)
    steep["b"].fill_(30)  # beta is the scale itself
    steep.check(decode)


@pytest.mark.parametrize("T", [2, 5])
@pytest.mark.parametrize("W", [2, 4])
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_several_tokens(T: int, W: int, dtype: torch.dtype) -> None:
    Case(T=T, W=W, dtype=dtype, conv="channels" if W == 2 else "taps").check(decode)


@pytest.mark.parametrize("lengths", [(1, 1, 1), (2, 0, 3), (0, 0, 1), (4, 1, 2), (0, 0, 0)], ids=str)
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_ragged_sequences(lengths: tuple[int, ...], index: torch.dtype) -> None:
    """A sequence without a token keeps its states bit for bit, a NaN's payload included."""
    case = Case(lengths=lengths, state_dtype=BF16)
    case.cu_seqlens = case.cu_seqlens.to(index)
    bits(case["recurrent_state"])[[n == 0 for n in lengths]] = 0x7FA5  # a NaN that a conversion would alter
    before = [bits(case[name]).clone() for name in ("conv_state", "recurrent_state")]
    case.run(decode)
    for name, old in zip(("conv_state", "recurrent_state"), before, strict=True):
        same = [torch.equal(bits(case[name][i]), old[i]) for i in range(3)]
        assert same == [n == 0 for n in lengths]
    Case(lengths=lengths, state_dtype=BF16).check(decode)


def test_state_is_rounded_once_a_call() -> None:
    rounded, exact = Case(T=6, state_dtype=BF16), Case(T=6, state_dtype=F32)
    exact["recurrent_state"].copy_(rounded["recurrent_state"])
    assert torch.equal(rounded.run(decode), exact.run(decode))
    assert torch.equal(rounded["recurrent_state"], exact["recurrent_state"].to(BF16))


def test_tokens_one_by_one_or_together() -> None:
    together, alone = Case(T=3), Case(T=3)
    y = together.run(decode).unflatten(0, (3, 3))
    tokens, rest = list(alone.tensors.values())[:6], list(alone.tensors.values())[6:]
    for t in range(3):
        torch.testing.assert_close(decode(*(x[t::3] for x in tokens), *rest), y[:, t])
    torch.testing.assert_close(alone["recurrent_state"], together["recurrent_state"])
    assert torch.equal(alone["conv_state"], together["conv_state"])


@pytest.mark.parametrize("heads", [(0, 3), (3, 3), (6, 3), (3, 6), (0, 6), (0, 9)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("T", [1, 2])
def test_head_range(T: int, family: str, heads: tuple[int, int]) -> None:
    """One key head, some in the middle, all."""
    Case(HK=3, R=3, heads=heads, T=T, family=family, state_dtype=BF16).check(decode)


@pytest.mark.parametrize("heads", [(3, 3), (0, 3), (6, 3), (3, 6)], ids=str)
@pytest.mark.parametrize("T", [1, 2])
@pytest.mark.parametrize("side", ["torch", "reference"])
def test_views_of_the_range_alone(side: str, T: int, heads: tuple[int, int]) -> None:
    """A rank's own projections: the key heads that its value heads read, and no others."""
    whole, own = (Case(HK=3, R=3, heads=heads, T=T) for _ in range(2))
    low, high = heads[0] // 3, (sum(heads) - 1) // 3 + 1
    tensors = [x[:, low:high] if name in "qkvzba" else x for name, x in own.tensors.items()]
    if side == "torch":
        assert torch.equal(decode(*tensors, **own.options()), whole.run(decode))
    else:
        expected = decode_reference(Step.from_tensors([*whole.tensors.values()]), whole.recipe)
        assert torch.equal(decode_reference(Step.from_tensors(tensors), own.recipe), expected)
    for state in ("conv_state", "recurrent_state"):
        assert torch.equal(own[state], whole[state])


def test_head_ranges_side_by_side_are_the_whole() -> None:
    """As on two tensor-parallel ranks, each with one key head."""
    whole, parts = Case(), Case()
    y = whole.run(decode)
    options = parts.options()
    outs = [decode(*parts.tensors.values(), **options | {"heads": (first, 2)}) for first in (0, 2)]
    torch.testing.assert_close(torch.cat(outs, dim=1), y)
    torch.testing.assert_close(parts["recurrent_state"], whole["recurrent_state"])
    assert torch.equal(parts["conv_state"], whole["conv_state"])


def _fill(**values: float) -> Any:
    def change(case: Case) -> None:
        for name, value in values.items():
            case[name].fill_(value)

    return change


def _scale(factor: float, *names: str) -> Any:
    def change(case: Case) -> None:
        for name in names:
            case[name].mul_(factor)

    return change


@pytest.mark.parametrize(
    "change",
    [
        _fill(q=0, k=0, conv_state=0),  # the l2-norm of nothing
        _fill(q=0, k=0, v=0, conv_state=0, recurrent_state=0),  # the gated norm of nothing
        _fill(a=100),
        _fill(a=-100),
        _fill(A_log=90, a=-100),  # exp(A_log) overflows, softplus(a) underflows, their product is e^-10
        _fill(A_log=90, a=-90, dt_bias=0),
        _fill(A_log=90, a=100),
        _fill(A_log=120, a=-120, dt_bias=0),
        _fill(A_log=-90, a=100),
        _fill(A_log=-4, a=-14.9, dt_bias=0),  # both sides of where log(softplus(x)) turns into x
        _fill(A_log=14, a=-14.9, dt_bias=0),
        _fill(A_log=14, a=-15.1, dt_bias=0),
        _fill(A_log=-4, a=0, dt_bias=19.9),  # both sides of where softplus turns into the identity
        _fill(A_log=-4, a=0, dt_bias=20.1),
        _fill(b=100),
        _fill(b=-100),
        _scale(2e-3, "q", "k", "conv_state"),  # sums of squares around the l2-norm's epsilon
        _scale(1e-3, "v", "recurrent_state"),  # mean squares around the gated norm's epsilon
        _scale(1e-18, "q", "k", "v", "conv_state", "recurrent_state"),
        _scale(1e4, "q", "k", "v", "conv_state", "recurrent_state"),
    ],
)
def test_adversarial_values(change: Any) -> None:
    case = Case()
    change(case)
    assert case.expect()[0].isfinite().all()
    case.check(decode, FLOAT32_EXTREME_GATES)


@pytest.mark.parametrize("name", ["q", "k", "v", "z", "b", "a", "conv_state", "recurrent_state"])
@pytest.mark.parametrize("T", [1, 2])
def test_nan_stays_in_its_sequence(T: int, name: str) -> None:
    clean, poisoned = Case(T=T), Case(T=T)
    sequence = slice(T, 2 * T) if clean[name].shape[0] > 3 or T == 1 else slice(1, 2)
    poisoned[name][sequence] = torch.nan
    x, y = clean.run(decode).unflatten(0, (3, T)), poisoned.run(decode).unflatten(0, (3, T))
    assert y[1].isnan().any()
    for i in (0, 2):
        assert torch.equal(x[i], y[i])
        for state in ("conv_state", "recurrent_state"):
            assert torch.equal(clean[state][i], poisoned[state][i])


def test_two_runs_are_equal() -> None:
    one, two = Case(dtype=BF16, T=2), Case(dtype=BF16, T=2)
    assert torch.equal(one.run(decode), two.run(decode))
    assert torch.equal(one["recurrent_state"], two["recurrent_state"])


@pytest.mark.parametrize("name", [*Case().tensors])
def test_a_gradient_is_refused_not_lost(name: str) -> None:
    case = Case()
    case.tensors[name] = case[name].detach().requires_grad_()
    before = case["recurrent_state"].detach().clone()
    with pytest.raises(ValueError, match="a decode step has no gradient"):
        case.run(decode)
    assert torch.equal(case["recurrent_state"], before)


def test_no_gradient_and_an_ordinary_result() -> None:
    """Under no_grad weights may ask for one: a graph kept in the states would grow with every token."""
    case = Case()
    for name in ("conv_weight", "A_log", "dt_bias", "norm_weight", "q"):
        case.tensors[name] = case[name].detach().requires_grad_()
    with torch.no_grad():
        out = case.run(decode)
    assert not any(x.requires_grad for x in (out, case["conv_state"], case["recurrent_state"]))
    (out * torch.ones((), requires_grad=True)).sum().backward()  # an inference tensor could not be saved for this
    out += 1


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_any_shape(data: st.DataObject) -> None:
    draw = data.draw
    sizes = {name: draw(st.integers(1, high), name) for name, high in {"HK": 3, "R": 4, "DK": 20, "DV": 20}.items()}
    HK, R = sizes["HK"], sizes["R"]
    first = draw(st.integers(0, HK - 1), "first")
    lengths = draw(st.none() | st.lists(st.integers(0, 3), min_size=1, max_size=4), "lengths")
    Case(
        B=draw(st.integers(1, 4), "B") if lengths is None else len(lengths),
        T=draw(st.integers(1, 3), "T"),
        lengths=lengths,
        W=draw(st.integers(2, 4), "W"),
        family=draw(st.sampled_from(FAMILIES), "family"),
        conv=draw(st.sampled_from(["taps", "channels", "crop"]), "conv"),
        guards=draw(st.sampled_from([(0,), (1,), (0, 1)]), "guards"),
        dtype=draw(st.sampled_from([F32, BF16, F16]), "dtype"),
        state_dtype=draw(st.sampled_from([F32, BF16]), "state dtype"),
        heads=(first * R, draw(st.integers(1, HK - first), "key heads") * R),
        beta_scale=draw(st.sampled_from([1.0, 2.0]), "beta scale"),
        seed=draw(st.integers(0, 9), "seed"),
        **sizes,
    ).check(decode)
