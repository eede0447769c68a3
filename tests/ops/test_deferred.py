"""States that are written every N-th step: the kernel and PyTorch's ring against two passes in float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from test_triton_ownership import Trace, one_item_a_program, trace
from tolerances import FLOAT32, relative_rms
from torch import Tensor
from triton_step import Step, as_op, limit

from qwen_fastdecode.errors import UnsupportedStep
from qwen_fastdecode.ops.reference import decode_reference
from qwen_fastdecode.ops.ring import (
    Ring,
    advance,
    decode_deferred_torch,
    forget,
    new_ring,
    pending,
    settle,
    weights_of,
)
from qwen_fastdecode.ops.step import check_step
from qwen_fastdecode.ops.torch_cpu import decode_torch
from qwen_fastdecode.ops.triton import deferred_launch, gpu
from qwen_fastdecode.ops.triton.deferred_launch import DeferredTile, decode_deferred_triton, settle_triton
from qwen_fastdecode.ops.triton.launch import decode_triton

__all__ = ["one_item_a_program", "trace"]  # fixtures

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
Decode = Callable[..., Tensor]
TILES = {
    "a key head": DeferredTile(4, 4),
    "a key head, its states asked for first": DeferredTile(4, 1, prefetch=True),
    "a value head": DeferredTile(4, 4, prefetch=True, clustered=True),
}


class Run:
    """A step repeated on new tokens, deferred beside two passes in float64."""

    def __init__(
        self, N: int, decode: Decode = decode_deferred_triton, together: int = 0, layer: int = 0, **sizes: object
    ):
        self.step = Step(**{"dtype": F32, **sizes})
        self.decode = decode
        self.law = self.step.recurrent_state.double()
        self.law_taps = self.step.conv_state.clone()
        self.ring = new_ring(self.step.recurrent_state, self.step.HK, N, together=together, layer=layer)
        for part in self.ring[:3]:
            part.fill_(torch.nan)  # nothing but what the cursor counts may be read
        self.generator = torch.Generator().manual_seed(1)

    def token(self) -> float:
        """The error of one step's output."""
        tensors, options = self.step.tensors, self.step.options
        for x in tensors[:6]:
            x.copy_(torch.randn(x.shape, generator=self.generator))
        self.expected = decode_reference(*as_op([*tensors[:6], self.law_taps, self.law, *tensors[8:]], options))
        self.y = self.decode(*as_op(tensors, options), self.ring)
        assert torch.equal(self.step.conv_state, self.law_taps)
        return relative_rms(self.y, self.expected)

    def left(self) -> list[Tensor]:
        """The states, and of the ring what the cursor counts."""
        count, _ = pending(self.ring)
        return [self.step.recurrent_state, self.step.conv_state, self.ring.cursor, *weights_of(self.ring, count)]

    def state_error(self, settle_states: Callable[[Tensor, Ring], None] = settle_triton) -> float:
        settle_states(self.step.recurrent_state, self.ring)
        assert not pending(self.ring)[0].any()
        return relative_rms(self.step.recurrent_state, self.law)


@pytest.mark.parametrize("N", [1, *(pytest.param(N, marks=pytest.mark.slow) for N in (2, 3, 4)), 6, 8])
def test_every_ring_at_every_cursor(N: int) -> None:
    """Settled after each number of steps: every phase of every head, by the kernel and by PyTorch in turn."""
    for steps in range(0, 2 * N + 2, 1 if N <= 4 else 3):
        run = Run(N, R=1, seed=steps, together=2, layer=1)
        assert all(run.token() <= FLOAT32 for _ in range(steps))
        assert run.state_error(settle if steps % 2 else settle_triton) <= FLOAT32
        assert run.token() <= FLOAT32  # a settled ring begins anew


@pytest.mark.parametrize(
    "sizes",
    [
        {"B": 5, "HK": 3, "R": 1},  # more items than programs
        {"B": 3, "HK": 3, "R": 2},  # more than clusters
        {"R": 3, "grouped": False},
        {"R": 4, "gate": "sigmoid", "beta_scale": 2.0},
        {"DK": 24, "DV": 40},  # no powers of two: the blocks are masked
        {"W": 2, "channel_last": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
def test_sizes(sizes: dict, tile: DeferredTile) -> None:
    run = Run(4, lambda *step: decode_deferred_triton(*step, tile), **sizes)
    assert max(run.token() for _ in range(10)) <= FLOAT32
    assert run.state_error() <= FLOAT32


@pytest.mark.parametrize("dtypes", [{}, {"state_dtype": BF16}], ids=str)
def test_a_program_a_value_head_gives_the_same_bits(dtypes: dict) -> None:
    """Over two folds of every head."""
    runs = [
        Run(4, partial(decode_deferred_triton, tile=TILES[name]), R=3, B=3, together=2, layer=1, **dtypes)
        for name in ("a key head", "a value head")
    ]
    for _ in range(9):
        outs = []
        for run in runs:
            run.token()
            outs.append(run.y)
        assert torch.equal(*outs)
    for ours, theirs in zip(*(run.left() for run in runs), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.usefixtures("one_item_a_program")
@pytest.mark.parametrize("steps_before", [0, 2, 3])  # nothing waits, some do, and a third of the heads folds
def test_what_programs_of_a_key_head_share_is_changed_by_one_of_them_after_all_have_read_it(
    steps_before: int, trace: Trace
) -> None:
    run = Run(3, partial(decode_deferred_triton, tile=TILES["a value head"]), R=2, B=3, margin=4)
    for _ in range(steps_before):
        run.token()
    trace.forget()
    run.token()
    shared = trace.shared()
    s, ring = run.step, run.ring
    assert s.conv_state.data_ptr() in shared  # q's taps
    assert ring.cursor.data_ptr() in shared
    for part in (s.recurrent_state, ring.d, ring.w):
        inside = range(part.data_ptr(), part.data_ptr() + part.nbytes)
        assert not any(address in inside for address in shared)
    for program, passed in trace.barriers.items():
        arrived, waited = passed - 1, passed  # the last two
        assert all(barriers < arrived for barriers in trace.when("read", shared, program))
        last = program[1] % s.R == s.R - 1
        assert trace.when("written", shared, program) == ({waited} if last else set())


@pytest.mark.parametrize("sizes", [{}, {"DK": 24, "DV": 40}, {"DV": 9}], ids=str)
def test_bfloat16_states_are_rounded_once_in_a_period(sizes: dict) -> None:
    run = Run(4, state_dtype=BF16, **sizes)
    errors = [run.token() for _ in range(12)]
    assert max(errors) <= 4 * limit(BF16)  # three folds, each truncated by the interpreter
    assert run.state_error() <= 4 * limit(BF16)


@pytest.mark.parametrize("decode", [decode_deferred_triton, decode_deferred_torch])
@pytest.mark.parametrize("bias", [-8.0, 6.0, 60.0], ids=["long memory", "short memory", "decay underflows"])
def test_all_decays(bias: float, decode: Decode) -> None:
    run = Run(4, decode)
    run.step.A_log.fill_(1.0)
    run.step.dt_bias.fill_(bias)
    assert max(run.token() for _ in range(11)) <= 2 * FLOAT32
    assert run.state_error() <= FLOAT32


def test_a_decay_that_underflows_among_long_memories() -> None:
    """A sum of logarithms would lose the digits of what comes after the -500."""
    run = Run(8)
    run.step.A_log.fill_(-4.0)
    for t in range(12):
        run.step.dt_bias.fill_(30000.0 if t == 3 else -2.0)
        assert run.token() <= FLOAT32
    assert run.state_error() <= FLOAT32


def exact(N: int, decode: Decode, two_passes: Decode, steps: int, dtype: torch.dtype = F32) -> None:
    """Long memories, so that errors add up, and a head that now and then forgets everything: its decay underflows."""
    run = Run(N, decode, B=1, HK=1, R=2, state_dtype=dtype)
    two, taps = run.step.recurrent_state.clone(), run.step.conv_state.clone()
    ours, theirs = [], []
    for t in range(steps):
        run.step.dt_bias.copy_(torch.tensor([-6.0, 30000.0 if t % 100 == 70 else -6.0]))
        ours.append(run.token())
        tensors = [*run.step.tensors[:6], taps, two, *run.step.tensors[8:]]
        expected = run.expected
        theirs.append(relative_rms(two_passes(*as_op(tensors, run.step.options)), expected))
    assert sum(ours) <= 1.2 * sum(theirs), (sum(ours), sum(theirs))
    state, law = run.state_error(settle), relative_rms(two, run.law)
    assert state <= 1.2 * law, (state, law)


def test_as_exact_as_two_passes() -> None:
    exact(8, decode_deferred_torch, decode_torch, 192)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("N", [1, 2, 3, 6, 8, 16])
def test_as_exact_as_two_passes_over_1024_steps(N: int, dtype: torch.dtype) -> None:
    exact(N, decode_deferred_torch, decode_torch, 1024, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("N", [6, 8])
def test_the_kernels_as_exact_over_1024_steps(N: int) -> None:
    exact(N, decode_deferred_triton, decode_triton, 1024)


def test_the_ring_in_float64_is_two_passes() -> None:
    run = Run(5, decode_deferred_torch)
    wide = run.step.recurrent_state.double()
    run.step.recurrent_state = wide
    run.ring = new_ring(wide, run.step.HK, 5, F64)
    assert max(run.token() for _ in range(13)) <= 1e-12
    assert run.state_error(settle) <= 1e-12


@pytest.mark.parametrize("layer", [0, 3])
def test_when_heads_fold(layer: int) -> None:
    """An N-th of them at each step, but for the last ones, which fold together; each after N steps, settled or not."""
    ring = new_ring(torch.zeros(5, 8, 1, 1), 8, 8, together=8, layer=layer)
    folded: list[Tensor] = []
    for t in range(41):
        count, folds = pending(ring)
        assert count.max() <= 8
        folded.append(folds.flatten())
        if t == 20:
            forget(ring)
            assert not pending(ring)[0].any()
            folded[-1] = folded[-9]  # nothing waits, so nothing is folded, and the next fold comes when it would have
        advance(ring)
    steps = torch.stack(folded)[8:]  # [33, 40]
    assert (steps[:, :-8].sum(1) == 4).all()
    assert (steps[:, -8:].sum(1) == torch.where(torch.arange(8, 41) % 8 == (8 - layer) % 8, 8, 0)).all()
    assert (steps.unfold(0, 8, 1).sum(-1) == 1).all()


def test_kernels_fold_when_the_ring_says() -> None:
    run = Run(4, B=3, together=2, layer=1)
    law = run.ring._replace(cursor=run.ring.cursor.clone())
    for _ in range(9):
        before, folds = run.step.recurrent_state.clone(), pending(run.ring)[1]
        run.token()
        advance(law)
        assert torch.equal(run.ring.cursor, law.cursor)
        changed = (run.step.recurrent_state != before).flatten(2).any(-1).unflatten(1, (run.step.HK, -1)).any(-1)
        assert torch.equal(changed, folds)


def test_the_tile_of_few_value_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as run at once; where there are no clusters, or a key head has too many of them, none."""
    monkeypatch.setattr(gpu, "INTERPRETED", False)
    monkeypatch.setattr(gpu, "multiprocessors", lambda _: 10)
    monkeypatch.setattr(deferred_launch, "clusters_reason", lambda _: None)

    def found(**sizes: object) -> DeferredTile:
        made = Step(**sizes)
        step, recipe = as_op(made.tensors, made.options)
        return deferred_launch.table_tile(step, check_step(step, recipe))

    assert found(B=5, HK=1, R=4) == deferred_launch.FLOAT32.few
    assert found(B=7, HK=1, R=3) == deferred_launch.FLOAT32.tile
    assert found(B=1, HK=1, R=8) == deferred_launch.FLOAT32.few
    assert found(B=1, HK=1, R=9) == deferred_launch.FLOAT32.tile
    assert found(B=1, HK=1, R=2, state_dtype=BF16) == deferred_launch.OTHER.tile
    assert found(B=1, HK=1, R=2, DV=200) == deferred_launch.FLOAT32.tile
    monkeypatch.setattr(deferred_launch, "clusters_reason", lambda _: "none here")
    assert found(B=1, HK=1, R=2) == deferred_launch.FLOAT32.tile


def test_refusals_name_the_argument() -> None:
    run = Run(4)
    step, recipe = as_op(run.step.tensors, run.step.options)
    with pytest.raises(UnsupportedStep, match=r"heads: got \(0, 2\), expected all 4"):
        decode_deferred_triton(step, recipe._replace(heads=(0, 2)), run.ring)
    with pytest.raises(ValueError, match=r"ring\.d: got shape"):
        decode_deferred_triton(step, recipe, run.ring._replace(d=run.ring.d[:1]))
    with pytest.raises(UnsupportedStep, match="ring: expected float32"):
        decode_deferred_triton(step, recipe, new_ring(run.step.recurrent_state, 2, 4, F64))
    with pytest.raises(ValueError, match="N: got 0, expected at least 1 and less"):
        new_ring(run.step.recurrent_state, 2, 0)
    many = Run(4, R=9)
    with pytest.raises(
        UnsupportedStep, match=r"tile: got .* for 9 value heads of \d+ columns a key head, expected one"
    ):
        decode_deferred_triton(*as_op(many.step.tensors, many.step.options), many.ring, TILES["a value head"])
    two = Step(T=2)
    with pytest.raises(UnsupportedStep, match="q: got 4 tokens for 2 sequences, expected one each"):
        decode_deferred_triton(*as_op(two.tensors, two.options), run.ring)
