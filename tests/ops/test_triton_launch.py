"""The launcher: grid, addresses, what it refuses, what it keeps between calls."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from triton_step import Step, as_op

from qwen_fastdecode.ops import prepared
from qwen_fastdecode.ops.ring import new_ring
from qwen_fastdecode.ops.triton import deferred_launch, gpu
from qwen_fastdecode.ops.triton import launch as triton_backend
from qwen_fastdecode.ops.triton.deferred_launch import DeferredTile
from qwen_fastdecode.ops.triton.gpu import unavailable_reason
from qwen_fastdecode.ops.triton.layout import Layout
from qwen_fastdecode.ops.triton.tiles import Tile


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """To set what steps are prepared with: `gpu.INTERPRETED_PROGRAMS`, which bounds the grid, and the like."""
    for module in (triton_backend, deferred_launch):
        module._prepared.clear()
    yield monkeypatch
    for module in (triton_backend, deferred_launch):
        module._prepared.clear()


@pytest.mark.parametrize("step", [{}, {"T": 2}], ids=str)
def test_a_program_takes_several_items(step: dict, programs: pytest.MonkeyPatch) -> None:
    """More work than programs: the result is the same, bit for bit, however the work is dealt out."""
    results = []
    for bound in (1, 2, 100):  # of 5 items
        programs.setattr(gpu, "INTERPRETED_PROGRAMS", bound)
        triton_backend._prepared.clear()
        s = Step(B=5, HK=1, **step)
        results.append([s.run(), *s.bits()])
    for result in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(result, results[0], strict=True))


def test_grid_is_bounded(programs: pytest.MonkeyPatch) -> None:
    """No batch can pass a limit of the grid: past the bound, programs take several items."""
    grids = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]):
            grids.append(grid)
            return lambda *_, **__: None

    programs.setattr(triton_backend, "decode_token", Kernel())
    for B in (1, 5000):
        step = Step(B=1)
        step.conv_state = step.conv_state.repeat(B, 1, 1)
        step.recurrent_state = step.recurrent_state.repeat(B, 1, 1, 1)
        for name in "qkvzba":
            setattr(step, name, getattr(step, name).expand(B, *[-1] * (getattr(step, name).dim() - 1)))
        step.run()
    assert grids == [(2, 1, 1), (gpu.INTERPRETED_PROGRAMS, 1, 1)]


class Compiled:
    """Stands in for a kernel and for what is compiled of it: notes what it is given."""

    def __init__(self) -> None:
        self.given: list[weakref.ref[Tensor]] = []
        self.launched: list[tuple] = []

    def warmup(self, *arguments: object, **_: object) -> Compiled:
        self.given += [weakref.ref(x) for x in arguments if isinstance(x, Tensor)]
        return self

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments: self.launched.append(arguments)


TILES = {
    "a key head": Tile(32, 4),
    "a value head": Tile(32, 4, clustered=True),
    "parts of a head": Tile(16, 1, clustered=True),
    "deferred": DeferredTile(4, 4),
    "deferred, a value head": DeferredTile(4, 4, clustered=True),
}


@pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
def test_nothing_that_a_step_allocates_is_kept(tile: Tile | DeferredTile, programs: pytest.MonkeyPatch) -> None:
    """The first step of a kind may be recorded in a CUDA graph, whose memory must hold nothing but what it returns."""
    compiled = Compiled()
    for name in ("decode_token", "decode_value_head"):
        programs.setattr(triton_backend, name, compiled)
    programs.setattr(deferred_launch, "decode_deferred", compiled)
    programs.setattr(gpu, "INTERPRETED", False)
    programs.setattr(gpu, "max_programs_on", lambda _: 100)
    for module in (triton_backend, deferred_launch):
        programs.setattr(module, "clusters_reason", lambda _: None)
        programs.setattr(module, "in_clusters", lambda kernel, _: kernel)
    programs.setattr(torch.cuda, "device", lambda _: nullcontext())
    programs.setattr(torch.cuda, "current_device", lambda: None)
    s = Step(DV=32, R=2)
    step, recipe = as_op(s.tensors, s.options)
    ring = new_ring(s.recurrent_state, s.HK, 4)
    if isinstance(tile, DeferredTile):
        out = deferred_launch.decode_deferred_triton(step, recipe, ring, tile)
    else:
        out = triton_backend.decode_triton(step, recipe, tile)
    (launched,) = compiled.launched
    assert out.data_ptr() in launched
    alive = {id(x()) for x in compiled.given if x() is not None}
    assert alive
    assert alive <= {id(x) for x in (*s.tensors, *step.tokens, *ring)}


def layout_of(step: Step) -> Layout:
    return triton_backend.describe(*as_op(step.tensors, step.options), Tile(16, 4), 100).layout


def test_taps_move_as_words_only_where_they_are_aligned_words() -> None:
    """A CPU forgives what a GPU does not, so the choice itself is checked."""
    assert layout_of(Step(margin=4)).packed_taps
    assert layout_of(Step(margin=4)).packed_weight
    assert not layout_of(Step(margin=4, dtype=torch.float32)).packed_taps  # four taps of 32 bits
    assert not layout_of(Step(margin=4, W=3)).packed_taps
    assert not layout_of(Step(margin=4, channel_last=True)).packed_taps
    step = Step(margin=4)
    aligned = step.conv_state
    step.conv_state = torch.zeros(aligned.numel() + 2, dtype=step.dtype)[2:].view_as(aligned)  # base off by 4 bytes
    assert not layout_of(step).packed_taps
    step.conv_state = torch.zeros(2, aligned[0].numel() + 2, dtype=step.dtype)[:, :-2].unflatten(1, aligned[0].shape)
    assert not layout_of(step).packed_taps  # the second sequence off by 4 bytes
    step = Step(margin=4, W=3)
    step.conv_state = torch.zeros(*step.conv_state.shape[:2], 4, dtype=step.dtype)[..., :3]  # three taps, four apart
    assert not layout_of(step).packed_taps


def far_apart(x: torch.Tensor, stride: int) -> torch.Tensor:
    """x with its first dimension `stride` elements apart; memory is reserved, and touched only where x lies."""
    storage = torch.UntypedStorage((stride * (len(x) - 1) + x[0].numel()) * x.element_size())
    far = torch.empty(0, dtype=x.dtype).set_(storage).as_strided(x.shape, (stride, *x[0].contiguous().stride()))
    return far.copy_(x)


@pytest.mark.parametrize("name", ["q", "k", "v", "z", "b", "a", "conv_state", "recurrent_state"])
@pytest.mark.parametrize("T", [1, 3])
def test_addresses_past_two_to_the_31(name: str, T: int) -> None:
    """A stride fits in 31 bits; its product with the sequence or the token does not."""
    sizes = {"B": 3 if T == 1 or name.endswith("state") else 1, "HK": 1, "R": 1, "T": T, "state_dtype": torch.bfloat16}
    near, far = Step(**sizes), Step(**sizes)
    setattr(far, name, far_apart(getattr(far, name), 2**30 + 8))
    assert torch.equal(far.run(), near.run())
    assert torch.equal(far.conv_state, near.conv_state)
    assert torch.equal(far.recurrent_state, near.recurrent_state)


def test_refuses_what_it_cannot_compute() -> None:
    step = Step()
    step.q = step.q.double()
    with pytest.raises(ValueError, match="computes in float32: got a float64 argument"):
        step.run()
    step = Step()
    step.recurrent_state = step.recurrent_state.transpose(2, 3)
    with pytest.raises(ValueError, match=r"recurrent_state: got strides .*, expected contiguous heads \[DK, DV\]"):
        step.run()
    step = Step()
    step.A_log = torch.zeros(8)[::2]
    with pytest.raises(ValueError, match="A_log: got stride 2, expected 1"):
        step.run()
    with pytest.raises(ValueError, match="tile: got block_v 16, expected all 32 columns"):
        Step(DV=32, T=2).run(Tile(16, 4))


def test_availability() -> None:
    assert unavailable_reason(torch.device("cpu")) is None  # interpreted
    assert "on the CPU only" in unavailable_reason(torch.device("cuda"))


@pytest.mark.parametrize(
    ("device", "finds_gpu", "capability", "reason"),
    [
        ("cpu", True, (9, 0), "needs a CUDA or ROCm device, not 'cpu'"),
        ("cuda", False, (9, 0), "finds no GPU"),
        ("cuda", True, (7, 5), "compute capability 8.0"),
        ("cuda", True, (8, 0), None),
    ],
)
def test_availability_outside_the_interpreter(
    device: str, finds_gpu: bool, capability: tuple[int, int], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: finds_gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    found = unavailable_reason(torch.device(device))
    assert found is None if reason is None else reason in found


def test_launches_kept_are_bounded(programs: pytest.MonkeyPatch) -> None:
    programs.setattr(prepared, "MAX_KINDS", 2)
    for eps in (1e-6, 2e-6, 3e-6):
        step = Step(B=1, HK=1)
        triton_backend.decode_triton(*as_op(step.tensors, {**step.options, "eps": eps}))
    assert 1 <= len(triton_backend._prepared._kinds) <= 2
