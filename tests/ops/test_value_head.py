"""A program or several a value head, in clusters, by Triton's interpreter: results, who touches what, when chosen."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from test_triton_launch import far_apart
from test_triton_ownership import Trace, one_item_a_program, trace
from tolerances import FLOAT32, relative_rms
from triton.backends.nvidia.compiler import CUDABackend
from triton_step import Step, as_op

from qwen_fastdecode.ops.triton import gpu, launch, tiles
from qwen_fastdecode.ops.triton.clusters import in_clusters, launcher_reason
from qwen_fastdecode.ops.triton.kernel import decode_token
from qwen_fastdecode.ops.triton.tiles import Row, Tile
from qwen_fastdecode.ops.triton.value_head import decode_value_head

__all__ = ["one_item_a_program", "trace"]  # fixtures

BF16, F32 = torch.bfloat16, torch.float32
H100 = "NVIDIA H100 80GB HBM3"
CLUSTERED = Tile(16, 4, clustered=True)  # a head of 16 columns is whole, wider ones have parts


@pytest.mark.parametrize(
    ("DV", "R"), [*((16, R) for R in (1, 2, 3, 4, 8)), (32, 1), (32, 3), (32, 4), (64, 2), (128, 1)]
)
@pytest.mark.parametrize("grouped", [True, False], ids=["grouped", "split"])
def test_families_and_head_ratios(DV: int, R: int, grouped: bool) -> None:
    Step(R=R, DV=DV, grouped=grouped).check(CLUSTERED)


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


@pytest.mark.parametrize(
    "sizes",
    [
        {"DK": 24, "DV": 40, "R": 2},  # of the four parts of 16 columns one is cut off, and one is empty
        {"DK": 17, "DV": 19, "R": 3},  # columns that are no pairs
        {"DV": 24, "B": 3, "HK": 3, "R": 4},
        {"DV": 32, "B": 9},  # more key heads than programs in the interpreter
        {"DV": 32, "W": 2},
        {"DV": 32, "W": 3, "channel_last": True},
        {"DV": 64, "margin": 4},  # taps as aligned words, and pairs of bfloat16 states
        {"DV": 44, "R": 1, "margin": 4},
        {"DV": 32, "gate": "sigmoid", "beta_scale": 2.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtypes", [{}, {"dtype": F32}, {"state_dtype": BF16}], ids=str)
def test_parts_of_sizes_and_dtypes(sizes: dict, dtypes: dict) -> None:
    Step(**sizes, **dtypes).check(CLUSTERED)


def test_parts_of_states_in_pairs_of_bfloat16() -> None:
    step = Step(DV=64, margin=4, state_dtype=BF16)
    assert described(step, CLUSTERED).layout.pairs  # those of the test above are read so
    step.check(CLUSTERED)


def test_parts_with_64_bit_offsets() -> None:
    """Heads of one sequence so far apart that the last begins past 2^31 elements."""
    step = Step(B=1, HK=1, R=4, DV=32, margin=4, state_dtype=BF16)
    step.recurrent_state = far_apart(step.recurrent_state[0], 2**30 + 7)[None]  # odd: no pairs, which count half
    assert described(step, CLUSTERED).layout.wide
    step.check(CLUSTERED)


@pytest.mark.parametrize("DV", [16, 32], ids=["whole", "parts"])
@pytest.mark.parametrize("heads", [(0, 3), (6, 3), (3, 6), (3, 3)], ids=str)
@pytest.mark.parametrize("alone", [False, True], ids=["all heads given", "those of the range"])
def test_head_range(heads: tuple[int, int], alone: bool, DV: int) -> None:
    step = Step(HK=3, R=3, DV=DV, heads=heads, dtype=F32)
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


@pytest.mark.parametrize("state_dtype", [F32, BF16], ids=str)
def test_parts_leave_the_same_states_as_whole_heads_bit_for_bit(state_dtype: torch.dtype) -> None:
    """The output's bits may differ: its norm adds parts' sums."""
    parts, whole = (Step(R=2, DV=40, B=3, margin=4, dtype=F32, state_dtype=state_dtype) for _ in range(2))
    assert relative_rms(parts.run(CLUSTERED), whole.run(Tile(64, 4, clustered=True))) <= FLOAT32
    assert torch.equal(parts.conv_state, whole.conv_state)
    assert torch.equal(parts.recurrent_state, whole.recurrent_state)


def keys_taps(s: Step) -> set[int]:
    """Addresses of the taps of q and k, of 2 bytes each."""
    begin = s.conv_state.data_ptr()
    sequence = s.conv_state.stride(0) * s.conv_state.element_size()
    keys = 2 * s.HK * s.DK * s.W * s.conv_state.element_size()  # q's and k's channels come first
    return {address for i in range(s.B) for address in range(begin + i * sequence, begin + i * sequence + keys, 2)}


@pytest.mark.usefixtures("one_item_a_program")
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "tap by tap"])
def test_shared_taps_are_shifted_by_one_program_after_the_clusters_barrier(trace: Trace, packed: bool) -> None:
    """The programs of a key head share its taps of q and k, and nothing else that is written."""
    s = Step(R=3, margin=4 if packed else 5)
    shared = keys_taps(s)
    s.run(CLUSTERED)
    assert trace.shared() == shared
    assert len(trace.writes) == s.B * s.HK * s.R
    writers = [program for program, written in trace.writes.items() if written & shared]
    assert len(writers) == s.B * s.HK
    assert {program[1] % s.R for program in writers} == {s.R - 1}
    assert trace.when("read", shared) == {0}  # before the program's first barrier, where it arrives
    assert trace.when("written", shared) == {2}  # after its second, where it has waited


@pytest.mark.usefixtures("one_item_a_program")
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "tap by tap"])
def test_parts_share_their_squares_besides_and_read_them_after_the_clusters_barrier(trace: Trace, packed: bool) -> None:
    s = Step(R=3, DV=24, margin=4 if packed else 5)
    parts, taps = 2, keys_taps(s)
    begin = s.conv_state.untyped_storage().data_ptr()
    values_taps = {*range(begin, begin + s.conv_state.untyped_storage().nbytes(), 2)} - taps
    s.run(CLUSTERED)
    squares = trace.shared() - taps
    assert trace.shared() > taps
    assert len(trace.writes) == s.B * s.HK * s.R * parts
    assert len(squares) == len(trace.writes) * 4 // 2  # one number of 4 bytes a program
    for program, read in trace.reads.items():
        head = program[1] // parts * parts
        peers = (trace.writes[0, head + part, 0, 0] for part in range(parts))
        assert read & squares == set().union(*peers) & squares
    assert {program[1] % (s.R * parts) for program, written in trace.writes.items() if written & taps} == {
        s.R * parts - 1
    }
    # A program passes a barrier of its own first, the second where it arrives, the third where it has waited.
    assert trace.when("written", squares) == {0}  # by the first of the interpreter's launches
    assert trace.when("read", taps | values_taps) == {0}
    assert trace.when("written", values_taps) == {1}
    assert trace.when("read", squares) == trace.when("written", taps) == {3}


def test_squares_that_no_part_has_written_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of every result here: without the first of the interpreter's launches there is no output."""

    class SecondLaunchAlone:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable:
            run = decode_value_head[grid]
            return lambda *arguments, **options: arguments[-1].phase == "rest" and run(*arguments, **options)

    monkeypatch.setattr(launch, "decode_value_head", SecondLaunchAlone())
    launch._prepared.clear()
    try:
        assert Step(DV=32).run(CLUSTERED).isnan().all()
        assert not Step().run(Tile(16, 8)).isnan().any()
    finally:
        launch._prepared.clear()


def test_state_is_read_once_and_written_once(trace: Trace) -> None:
    s = Step(R=3, DV=24, heads=(3, 3))
    begin = s.recurrent_state.untyped_storage().data_ptr()
    trace.counted = range(begin, begin + s.recurrent_state.untyped_storage().nbytes())
    s.run(Tile(32, 4, clustered=True))
    floor = s.recurrent_state[:, :3].numel() * s.recurrent_state.element_size()
    assert trace.traffic == {"read": floor, "written": floor}


def test_parts_read_the_state_once_a_launch_and_write_it_once(trace: Trace) -> None:
    """The interpreter's first launch, for the squares, reads it too; a GPU has one launch."""
    s = Step(R=3, DV=24, heads=(3, 3))
    begin = s.recurrent_state.untyped_storage().data_ptr()
    trace.counted = range(begin, begin + s.recurrent_state.untyped_storage().nbytes())
    s.run(CLUSTERED)
    floor = s.recurrent_state[:, :3].numel() * s.recurrent_state.element_size()
    assert trace.traffic == {"read": 2 * floor, "written": floor}


def described(step: Step, tile: Tile | None) -> launch.Launch:
    return launch.describe(*as_op(step.tensors, step.options), tile, 100)


def test_a_cluster_is_the_value_heads_of_a_key_head() -> None:
    found = described(Step(B=5, HK=2, R=3), CLUSTERED)
    assert (found.kernel, found.grid, found.cluster) == (decode_value_head, (10, 1, 1), 3)
    found = described(Step(B=5, HK=2, R=3, DV=24), CLUSTERED)
    assert (found.kernel, found.grid, found.cluster) == (decode_value_head, (10, 1, 1), 6)
    assert found.squares == 60
    assert described(Step(B=5, HK=2, R=3), CLUSTERED).squares is None
    found = described(Step(B=5, HK=2, R=3), Tile(16, 4))
    assert (found.kernel, found.grid, found.cluster) == (decode_token, (10, 1, 1), 1)


@pytest.mark.parametrize("step", [{"T": 2}, {"DV": 40, "R": 3}, {"R": 9}, {"lengths": [2, 1]}], ids=str)
def test_a_clustered_tile_that_does_not_suit_is_refused_by_name(step: dict) -> None:
    with pytest.raises(ValueError, match=r"tile: got (Tile\(block_v=16|block_v 16)"):
        Step(**step).run(CLUSTERED)


def test_a_refusal_says_how_many_programs_a_head_would_take() -> None:
    with pytest.raises(ValueError, match=r"3 value heads of a key head .* the 8 programs of a cluster: 4 each"):
        Step(DV=40, R=3).run(CLUSTERED)


@pytest.mark.parametrize("R", [1, 2])
def test_where_there_are_no_clusters_a_clustered_tile_is_refused(R: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that is alone in its cluster, too: older GPUs do not know its instructions."""
    monkeypatch.setattr(gpu, "INTERPRETED", False)
    monkeypatch.setattr(gpu, "max_programs_on", lambda device: 100)
    monkeypatch.setattr(launch, "clusters_reason", lambda device: "clusters need compute capability 9.0")
    launch._prepared.clear()  # of other tests' steps of this kind
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
    assert found(16, 256, 4) == found(16, 128, 9) == rows[1].tile  # heads so wide have not been measured


def test_the_gpus_that_were_measured_have_clusters_for_eight_sequences() -> None:
    for state in ("float32", "bfloat16"):
        for value_heads in (1, 2, 3, 4):
            found = [tiles.lookup("sm_90", H100, 16 * batch, 128, state, value_heads).clustered for batch in (1, 8, 9)]
            assert found == [True, True, False]
    assert not tiles.lookup("sm_80", "", 16, 128, "float32", 2).clustered


@pytest.mark.parametrize(
    ("gpu", "state", "value_heads", "widths"),  # of the tiles for work 16, 32, 33, 64 and 65
    [
        *((gpu, "float32", R, (32, 32, 32, 32, 128)) for gpu in ("", H100) for R in (1, 2)),
        *((gpu, "float32", R, (64, 64, 128, 128, 128)) for gpu in ("", H100) for R in (3, 4)),
        *((gpu, "float32", R, (128, 128, 128, 128, 128)) for gpu in ("", H100) for R in (5, 8)),
        *((H100, "bfloat16", R, (64, 64, 128, 128, 128)) for R in (1, 2, 3, 4)),
        *((H100, "bfloat16", R, (128, 128, 128, 128, 128)) for R in (5, 8)),
    ],
)
def test_the_fewest_sequences_have_parts_of_heads_that_fit_a_cluster(
    gpu: str, state: str, value_heads: int, widths: tuple[int, ...]
) -> None:
    found = [tiles.lookup("sm_90", gpu, work, 128, state, value_heads) for work in (16, 32, 33, 64, 65)]
    assert all(tile.clustered for tile in found)
    assert tuple(tile.block_v for tile in found) == widths


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
    assert tiles.lookup("sm_90", H100, 16, 128, clusters=True).clustered
    assert not tiles.lookup("sm_90", H100, 16, 128, clusters=False).clustered
