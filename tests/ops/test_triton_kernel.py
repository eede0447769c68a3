"""The Triton kernel against the float64 reference, by Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from triton_step import Step, as_op

from qwen_fastdecode.ops.triton import launch
from qwen_fastdecode.ops.triton.tiles import Tile

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


@pytest.mark.parametrize("R", [1, 2, 3, 4])
@pytest.mark.parametrize("grouped", [True, False], ids=["grouped", "split"])
def test_families_and_head_ratios(R: int, grouped: bool) -> None:
    Step(R=R, grouped=grouped).check()


@pytest.mark.parametrize(
    "sizes",
    [
        {"DK": 16, "DV": 32},
        {"DK": 32, "DV": 16},
        {"DK": 24, "DV": 40, "R": 3},  # no powers of two: the blocks are masked
        {"DK": 17, "DV": 16},
        {"DK": 16, "DV": 9},
        {"B": 3, "HK": 3, "R": 1},
        {"B": 1, "HK": 1, "R": 1, "DK": 1, "DV": 1},
    ],
    ids=str,
)
def test_sizes(sizes: dict) -> None:
    Step(**sizes).check()


@pytest.mark.parametrize("W", [2, 3, 4])
@pytest.mark.parametrize("channel_last", [False, True], ids=["taps-inner", "channel-last"])
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_convolution_state_strides(W: int, channel_last: bool, dtype: torch.dtype) -> None:
    Step(W=W, channel_last=channel_last, dtype=dtype).check()


@pytest.mark.parametrize("margin", [4, 5, 16], ids=["8-byte", "unaligned", "32-byte"])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_packed_taps_and_alignment(margin: int, dtype: torch.dtype) -> None:
    """Four 16-bit taps move as one word where they are aligned; b and a, two heads wide, never are."""
    Step(margin=margin, dtype=dtype, DV=12).check()


@pytest.mark.parametrize(
    "dtypes",
    [
        {"dtype": F16},
        {"dtype": F32},
        {"dtype": BF16, "state_dtype": BF16},
        {"dtype": BF16, "weight_dtype": F32},
        {"dtype": F32, "state_dtype": BF16, "weight_dtype": BF16},
    ],
    ids=str,
)
def test_dtypes(dtypes: dict) -> None:
    Step(**dtypes).check()


@pytest.mark.parametrize("gate", ["silu", "sigmoid"])
def test_gate(gate: str) -> None:
    Step(gate=gate, dtype=F32).check()


@pytest.mark.parametrize("tile", [Tile(16, 4), Tile(16, 4, 2), Tile(32, 8), Tile(64, 8, 2)], ids=str)
@pytest.mark.parametrize("DV", [40, 64])
def test_tiles(tile: Tile, DV: int) -> None:
    """A value head in one tile or several, the next one loaded early or not."""
    Step(B=1, DV=DV, dtype=F32).check(tile)


@pytest.mark.parametrize("heads", [(0, 3), (6, 3), (3, 6), (0, 6), (3, 3)], ids=str)
@pytest.mark.parametrize("T", [1, 2])
def test_head_range(heads: tuple[int, int], T: int) -> None:
    Step(HK=3, R=3, heads=heads, T=T, dtype=F32).check()


@pytest.mark.parametrize("heads", [(3, 3), (0, 3), (6, 3), (3, 6)], ids=str)
@pytest.mark.parametrize("T", [1, 2])
def test_views_of_the_range_alone(heads: tuple[int, int], T: int) -> None:
    """A rank's own projections: the key heads that its value heads read, and no others."""
    step = Step(HK=3, R=3, heads=heads, T=T, dtype=F32)
    for name in "qkvzba":
        setattr(step, name, getattr(step, name)[:, heads[0] // 3 : (sum(heads) - 1) // 3 + 1])
    step.check()


@pytest.mark.parametrize("T", [2, 5])
@pytest.mark.parametrize("W", [2, 4])
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_several_tokens(T: int, W: int, dtype: torch.dtype) -> None:
    Step(T=T, W=W, dtype=dtype, channel_last=dtype == F32, DK=12, DV=20).check()


@pytest.mark.parametrize("lengths", [[1, 1, 1], [2, 0, 3], [0, 0, 1], [4, 1, 2]], ids=str)
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_ragged_sequences(lengths: list[int], index: torch.dtype) -> None:
    """A sequence without a token keeps its states bit for bit."""
    step = Step(B=3, lengths=lengths, DK=24, R=3)
    step.cu_seqlens = step.cu_seqlens.to(index)
    before = step.conv_state.clone(), step.recurrent_state.clone()
    step.check()
    for i in range(3):
        same = [torch.equal(x[i], y[i]) for x, y in zip(before, (step.conv_state, step.recurrent_state), strict=True)]
        assert same == [lengths[i] == 0] * 2


def test_no_sequence() -> None:
    step = Step(B=2, lengths=[1, 1])
    for name in ("conv_state", "recurrent_state", *"qkvzba"):
        setattr(step, name, getattr(step, name)[:0])
    step.cu_seqlens = torch.zeros(1, dtype=torch.int32)
    assert step.run().shape == (0, 4 * 16)


def test_tokens_one_by_one_or_together() -> None:
    together, alone = Step(T=3, dtype=F32), Step(T=3, dtype=F32)
    y = together.run().unflatten(0, (2, 3))
    for t in range(3):
        tensors = [x[t::3] for x in alone.tensors[:6]]
        alone_t = Step(dtype=F32)
        alone_t.q, alone_t.k, alone_t.v, alone_t.z, alone_t.b, alone_t.a = tensors
        alone_t.conv_state, alone_t.recurrent_state = alone.conv_state, alone.recurrent_state
        alone_t.conv_weight, alone_t.A_log, alone_t.dt_bias, alone_t.norm_weight = alone.tensors[8:]
        torch.testing.assert_close(alone_t.run(), y[:, t])
    torch.testing.assert_close(alone.recurrent_state, together.recurrent_state)
    assert torch.equal(alone.conv_state, together.conv_state)


@pytest.mark.parametrize("sizes", [{}, {"DK": 24, "DV": 40, "R": 3}, {"DV": 9}, {"B": 7}], ids=str)
@pytest.mark.parametrize("tile", [Tile(16, 4), Tile(16, 4, 2)], ids=str)
def test_bfloat16_states(sizes: dict, tile: Tile) -> None:
    """In pairs, but for an odd DV, where a row may begin in the middle of a word."""
    Step(state_dtype=BF16, dtype=F32, **sizes).check(tile)


def test_only_aligned_bfloat16_states_are_taken_in_pairs() -> None:
    def pairs(step: Step) -> bool:
        return launch.describe(*as_op(step.tensors, step.options), tile=None, max_programs=8).layout.pairs

    step = Step(state_dtype=BF16)
    assert pairs(step)
    assert not pairs(Step(state_dtype=F32))
    assert not pairs(Step(state_dtype=BF16, DV=9))
    whole = torch.empty(step.recurrent_state.numel() + 1, dtype=BF16)
    step.recurrent_state = whole[1:].view(step.recurrent_state.shape)  # begins in the middle of a word
    assert not pairs(step)


def test_launch_takes_the_tile_of_the_states_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(launch, "table_tile", lambda *arguments: asked.append(arguments[3]) or Tile(16, 4))
    step = Step(state_dtype=BF16)
    launch.describe(*as_op(step.tensors, step.options), tile=None, max_programs=8)
    assert asked == [BF16]
