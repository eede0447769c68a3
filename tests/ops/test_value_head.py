"""A program a value head, in clusters, by Triton's interpreter: results, who touches what, and when it is chosen."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from test_triton_ownership import Trace, one_item_a_program, trace
from triton.backends.nvidia.compiler import CUDABackend
from triton_step import Step, as_op

from qwen_fastdecode.ops.triton import launch, tiles
from qwen_fastdecode.ops.triton.clusters import in_clusters, launcher_reason
from qwen_fastdecode.ops.triton.kernel import decode_token
from qwen_fastdecode.ops.triton.tiles import Row, Tile
from qwen_fastdecode.ops.triton.value_head import decode_value_head

__all__ = ["one_item_a_program", "trace"]  # fixtures

BF16, F32 = torch.bfloat16, torch.float32
CLUSTERED = Tile(16, 4, clustered=True)


@pytest.mark.parametrize("R", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("grouped", [True, False], ids=["grouped", "split"])
def test_families_and_head_ratios(R: int, grouped: bool) -> None:
    Step(R=R, grouped=grouped).check(CLUSTERED)


@pytest.mark.parametrize(
    "sizes",
    [
        {"DK": 24, "DV": 40, "R": 3},  # no powers of two: the blocks are masked
        {"DK": 17, "DV": 9},
        {"B": 3, "HK": 3, "R": 1},
        {"B": 9},  # more key heads than programs in the interpreter: here each has one all the same
        {"W": 2},
        {"W": 3, "channel_last": True},
        {"margin": 4, "DV": 12},  # taps as aligned words
        {"gate": "sigmoid", "beta_scale": 2.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtypes", [{}, {"dtype": F32}, {"state_dtype": BF16}], ids=str)
def test_sizes_and_dtypes(sizes: dict, dtypes: dict) -> None:
    Step(**sizes, **dtypes).check(Tile(64, 4, clustered=True))


@pytest.mark.parametrize("heads", [(0, 3), (6, 3), (3, 6), (3, 3)], ids=str)
@pytest.mark.parametrize("alone", [False, True], ids=["all heads given", "those of the range"])
def test_head_range(heads: tuple[int, int], alone: bool) -> None:
    step = Step(HK=3, R=3, heads=heads, dtype=F32)
    if alone:
        for name in "qkvzba":
            setattr(step, name, getattr(step, name)[:, heads[0] // 3 : (sum(heads) - 1) // 3 + 1])
    step.check(CLUSTERED)


@pytest.mark.parametrize("state_dtype", [F32, BF16], ids=str)
def test_the_same_bits_as_with_a_program_a_key_head(state_dtype: torch.dtype) -> None:
    """Of the taps in any case; here of all, as the interpreter adds in the same order."""
    clustered, other = (Step(R=3, B=3, dtype=F32, state_dtype=state_dtype) for _ in range(2))
    assert torch.equal(clustered.run(CLUSTERED), other.run(Tile(16, 4)))
    assert torch.equal(clustered.conv_state, other.conv_state)
    assert torch.equal(clustered.recurrent_state, other.recurrent_state)


@pytest.mark.usefixtures("one_item_a_program")
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "tap by tap"])
def test_shared_taps_are_shifted_by_one_program_after_the_clusters_barrier(trace: Trace, packed: bool) -> None:
    """The programs of a key head share its taps of q and k, and nothing else that is written."""
    s = Step(R=3, margin=4 if packed else 5)
    begin = s.conv_state.data_ptr()
    sequence = s.conv_state.stride(0) * s.conv_state.element_size()
    keys = 2 * s.HK * s.DK * s.W * s.conv_state.element_size()  # q's and k's channels come first
    shared = {address for i in range(s.B) for address in range(begin + i * sequence, begin + i * sequence + keys, 2)}
    s.run(CLUSTERED)
    assert trace.shared() == shared
    assert len(trace.writes) == s.B * s.HK * s.R
    writers = [program for program, written in trace.writes.items() if written & shared]
    assert len(writers) == s.B * s.HK
    assert {program[1] % s.R for program in writers} == {s.R - 1}
    assert not trace.read_late & shared  # after the program's first barrier, where it arrives
    assert not trace.written_early & shared  # before its second, where it has waited


def test_state_is_read_once_and_written_once(trace: Trace) -> None:
    s = Step(R=3, DV=24, heads=(3, 3))
    begin = s.recurrent_state.untyped_storage().data_ptr()
    trace.counted = range(begin, begin + s.recurrent_state.untyped_storage().nbytes())
    s.run(Tile(32, 4, clustered=True))
    floor = s.recurrent_state[:, :3].numel() * s.recurrent_state.element_size()
    assert trace.traffic == {"read": floor, "written": floor}


def described(step: Step, tile: Tile | None) -> launch.Launch:
    return launch.describe(*as_op(step.tensors, step.options), tile, 100)


def test_a_cluster_is_the_value_heads_of_a_key_head() -> None:
    found = described(Step(B=5, HK=2, R=3), CLUSTERED)
    assert (found.kernel, found.grid, found.cluster) == (decode_value_head, (10, 1, 1), 3)
    found = described(Step(B=5, HK=2, R=3), Tile(16, 4))
    assert (found.kernel, found.grid, found.cluster) == (decode_token, (10, 1, 1), 1)


@pytest.mark.parametrize("step", [{"T": 2}, {"DV": 40}, {"R": 9}, {"lengths": [2, 1]}], ids=str)
def test_a_clustered_tile_that_does_not_suit_is_refused_by_name(step: dict) -> None:
    with pytest.raises(ValueError, match=r"tile: got (Tile\(block_v=16|block_v 16)"):
        Step(**step).run(CLUSTERED)


@pytest.mark.parametrize("R", [1, 2])
def test_where_there_are_no_clusters_a_clustered_tile_is_refused(R: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that is alone in its cluster, too: older GPUs do not know its instructions."""
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(launch, "max_programs_on", lambda device: 100)
    monkeypatch.setattr(launch, "clusters_reason", lambda device: "clusters need compute capability 9.0")
    with pytest.raises(ValueError, match="tile: got a clustered one, but clusters need compute"):
        Step(R=R).run(CLUSTERED)


def test_the_table_passes_over_clustered_tiles_that_do_not_suit(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [Row(128, Tile(128, 4, clustered=True)), Row(256, Tile(128, 4, 2)), Row(10**9, Tile(64, 2))]
    monkeypatch.setattr(tiles, "tuned", lambda _: {})
    monkeypatch.setattr(tiles, "shipped", lambda *_: {"sm_90": rows})

    def found(work: int, DV: int, value_heads: int) -> Tile:
        return tiles.lookup("sm_90", "a GPU", work, DV, "float32", value_heads)

    assert found(128, 128, 2) == rows[0].tile
    assert found(129, 128, 2) == rows[1].tile
    assert found(16, 64, 8) == Tile(64, 4, clustered=True)
    assert found(16, 256, 2) == found(16, 128, 9) == rows[1].tile


def test_the_gpus_that_were_measured_have_clusters_for_eight_sequences() -> None:
    for state in ("float32", "bfloat16"):
        for value_heads in (1, 2, 3, 4):
            found = [
                tiles.lookup("sm_90", "NVIDIA H100 80GB HBM3", 16 * batch, 128, state, value_heads).clustered
                for batch in (1, 8, 9)
            ]
            assert found == [True, True, False]
    assert not tiles.lookup("sm_80", "", 16, 128, "float32", 2).clustered


class Compiled(SimpleNamespace):
    """What is used of Triton's compiled kernels."""

    def _init_handles(self) -> None:
        self.loaded = True


def test_the_launcher_is_told_of_clusters_and_the_kernel_stays_as_it_is() -> None:
    kernel = Compiled(packed_metadata=(4, 1, 2048), metadata=SimpleNamespace(num_warps=4, shared=2048))
    assert in_clusters(kernel, 3).packed_metadata == (4, 3, 2048)
    assert kernel.packed_metadata == (4, 1, 2048)
    assert kernel.loaded  # before it was copied
    assert in_clusters(kernel, 1) is kernel


def test_this_tritons_launcher_is_known() -> None:
    assert launcher_reason() is None


@pytest.mark.parametrize("told", [lambda _, m: (m.num_warps, m.shared), lambda _: None, lambda _, m: m.cluster_dims])
def test_without_a_launcher_that_is_known_there_are_no_clusters(
    told: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its programs might run without a cluster, and shift taps that others have yet to read."""
    monkeypatch.setattr(CUDABackend, "pack_metadata", told)
    launcher_reason.cache_clear()
    try:
        assert re.match(
            r"the launcher of Triton .* was not reviewed: it takes .*, expected \(4, 2, 8\)", launcher_reason()
        )
    finally:
        launcher_reason.cache_clear()
    gpu = "NVIDIA H100 80GB HBM3"
    assert tiles.lookup("sm_90", gpu, 16, 128, clusters=True).clustered
    assert not tiles.lookup("sm_90", gpu, 16, 128, clusters=False).clustered
