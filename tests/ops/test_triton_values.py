"""Values that break a careless kernel: extreme gates, vectors of zeros, NaN, runs that must repeat bit for bit."""

from __future__ import annotations

import pytest
import torch
from tolerances import FLOAT32_EXTREME_GATES
from triton_step import Step

from qwen_fastdecode.ops.triton.tiles import Tile

F32 = torch.float32

# The interpreter computes with numpy, which warns of overflows that are meant to happen.
pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|invalid value|overflow) encountered:RuntimeWarning")


@pytest.mark.parametrize(
    "gates",
    [
        {"a": 100.0},
        {"a": -100.0},
        {"a": -100.0, "A_log": 90.0},  # exp(A_log) overflows, softplus underflows: inf * 0
        {"a": 100.0, "A_log": 90.0},
        {"a": -16.0, "A_log": 15.0},  # softplus is exp there, and decay not 1
        {"a": -14.0, "A_log": 14.0},  # log1p of a number far below float32's eps times a large rate
        {"a": 0.0, "dt_bias": 19.9, "A_log": -3.0},
        {"a": 0.0, "dt_bias": 20.1, "A_log": -3.0},
        {"A_log": -90.0},
        {"b": 100.0},
        {"b": -100.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("T", [1, 2])
def test_extreme_gates(gates: dict[str, float], T: int) -> None:
    step = Step(dtype=F32, T=T, HK=1)
    for name, value in gates.items():
        getattr(step, name).fill_(value)
    step.check(tolerance=FLOAT32_EXTREME_GATES)
    assert step.recurrent_state.isfinite().all()


@pytest.mark.parametrize("b", [None, 30.0], ids=["random-b", "beta-is-the-scale"])
@pytest.mark.parametrize("T", [1, 2])
def test_beta_scale(T: int, b: float | None) -> None:
    step = Step(dtype=F32, T=T, beta_scale=2.0)
    if b is not None:
        step.b.fill_(b)
    step.check()


def test_one_launch_is_prepared_for_each_beta_scale() -> None:
    """The scale is compiled in: the next call, of another scale, must not get this one's kernel."""
    for beta_scale in (1.0, 2.0, 1.0):
        Step(dtype=F32, margin=4, beta_scale=beta_scale).check()  # aligned alike: nothing else tells them apart


@pytest.mark.parametrize("vanish", ["q", "k", "v", "z", "all"])
def test_zero_vectors(vanish: str) -> None:
    """Over a window of zeros q and k are zero: the epsilons keep 0 / 0 away, here and in the norm."""
    step = Step(dtype=F32)
    for name in "qkvz" if vanish == "all" else vanish:
        getattr(step, name).zero_()
    step.conv_state.zero_()
    step.check()


@pytest.mark.parametrize("scale", [1e-5, 1e-3])
def test_tiny_vectors(scale: float) -> None:
    """Where the l2-norm's epsilon decides: inside the root and not outside, sum and not mean."""
    step = Step(dtype=F32, HK=1)
    step.q.mul_(scale)
    step.k.mul_(scale)
    step.conv_state[:, : 2 * 16].mul_(scale)
    step.check()


@pytest.mark.parametrize("name", ["q", "k", "v", "z", "b", "a", "conv_state", "recurrent_state"])
@pytest.mark.parametrize("T", [1, 2])
def test_nan_stays_in_its_sequence(name: str, T: int) -> None:
    clean, dirty = Step(B=3, HK=1, T=T), Step(B=3, HK=1, T=T)
    tensor = getattr(dirty, name)
    middle = slice(1, 2) if name.endswith("state") else slice(T, 2 * T)
    tensor[middle] = torch.nan
    y, y_dirty = clean.run(), dirty.run()
    assert y_dirty[T : 2 * T].isnan().any()
    for mine, theirs in [
        (y.unflatten(0, (3, T)), y_dirty.unflatten(0, (3, T))),
        (clean.conv_state, dirty.conv_state),
        (clean.recurrent_state, dirty.recurrent_state),
    ]:
        assert torch.equal(mine[::2], theirs[::2])


@pytest.mark.parametrize("step", [{}, {"T": 3}, {"lengths": [2, 1]}], ids=str)
def test_two_runs_are_bit_equal(step: dict) -> None:
    one, two = Step(**step), Step(**step)
    assert torch.equal(one.run(), two.run())
    for mine, theirs in zip(one.bits(), two.bits(), strict=True):
        assert torch.equal(mine, theirs)


def test_tiles_agree() -> None:
    """How the columns are tiled changes no sum over rows, and the norm's sum by rounding alone."""
    results = []
    for tile in (Tile(64, 4), Tile(16, 4), Tile(16, 4, 2)):
        step = Step(DV=64, dtype=F32)
        results.append((step.run(tile), step.recurrent_state))
    for y, state in results[1:]:
        torch.testing.assert_close(y, results[0][0])
        assert torch.equal(state, results[0][1])
