"""The tile table, the user's own table over it, and what is made of a broken one."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
from offline_compile import ARCHITECTURES, KINDS

from qwen_fastdecode.ops.triton import tiles
from qwen_fastdecode.ops.triton.tiles import Tile


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's table, in an empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tiles.tuned.cache_clear()
    yield tiles.cache_file()
    tiles.tuned.cache_clear()


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("DV", [8, 64, 128, 256])
def test_every_work_has_a_tile(arch: str, DV: int, cache: Path) -> None:
    for work in (1, 16, 128, 129, 4096, 10**12):
        tile = tiles.lookup(arch, "some GPU", work, DV)
        assert 16 <= tile.block_v <= tiles.power_of_two(DV)
        assert tile.block_v & (tile.block_v - 1) == 0
        assert tile.num_warps in (1, 2, 4, 8, 16)


def test_a_kind_of_gpu_may_have_rows_of_its_own(cache: Path) -> None:
    assert set(tiles.shipped()) == {*ARCHITECTURES, *KINDS}  # each is compiled by test_offline_compile
    for gpu, arch in KINDS.items():
        assert tiles.lookup(arch, gpu, 4096, 128) == tiles.shipped()[gpu][-1].tile
        assert tiles.lookup(arch, "another", 4096, 128) == tiles.shipped()[arch][-1].tile
        assert tiles.shipped()[gpu] != tiles.shipped()[arch]  # else they are not needed


def test_rows_are_read_by_work() -> None:
    """Of equal work, the first; the others are for heads that it does not suit."""
    first: dict[int, Tile] = {}
    for row in tiles.shipped()["sm_90"]:
        first.setdefault(row.max_work, row.tile)
    for (work, tile), (_, following) in pairwise(first.items()):
        assert tiles.lookup("sm_90", "", work, 128) == tile
        assert tiles.lookup("sm_90", "", work + 1, 128) == following


def test_states_of_another_dtype_have_rows_of_their_own(cache: Path) -> None:
    gpu = "NVIDIA H100 80GB HBM3"
    for row in tiles.shipped("bfloat16")[gpu]:
        assert tiles.lookup("sm_90", gpu, row.max_work, 128, "bfloat16") == row.tile
    assert tiles.shipped("bfloat16")[gpu] != tiles.shipped()[gpu]
    assert tiles.lookup("sm_90", gpu, 10**9, 128) == tiles.shipped()[gpu][-1].tile


def test_a_dtype_without_rows_takes_those_of_float32(cache: Path) -> None:
    for work in (1, 10**9):
        assert tiles.lookup("sm_80", "", work, 128, "bfloat16") == tiles.lookup("sm_80", "", work, 128)


def test_tiles_tuned_on_float32_states_leave_those_of_others_alone(cache: Path) -> None:
    gpu = "NVIDIA H100 80GB HBM3"
    cache.parent.mkdir(parents=True)
    cache.write_text(json.dumps({"tile": [{"device": gpu, "max_work": 10**12, **Tile(16, 8)._asdict()}]}))
    assert tiles.lookup("sm_90", gpu, 1, 128) == Tile(16, 8)
    assert tiles.lookup("sm_90", gpu, 1, 128, "bfloat16") == tiles.shipped("bfloat16")[gpu][0].tile


@pytest.mark.parametrize(
    ("arch", "closest"),
    [
        ("sm_80", "sm_80"),
        ("sm_75", "sm_80"),
        ("sm_86", "sm_80"),
        ("sm_89", "sm_80"),
        ("sm_103", "sm_100"),
        ("sm_121", "sm_120"),
        ("gfx90a", "gfx942"),
        ("gfx950", "gfx942"),
        ("gfx1100", "gfx942"),
    ],
)
def test_an_unknown_architecture_takes_the_closest(arch: str, closest: str) -> None:
    assert tiles.closest(arch) == closest


def test_tuned_tiles_win_on_their_kind_of_gpu(cache: Path) -> None:
    tuned = [{"device": "Mine", "max_work": w, **Tile(32, n, 2, 96)._asdict()} for w, n in [(64, 4), (1000, 8)]]
    cache.parent.mkdir(parents=True)
    cache.write_text(json.dumps({"tile": tuned[::-1]}))
    assert [tiles.lookup("sm_90", "Mine", work, 128).num_warps for work in (64, 65, 5000)] == [4, 8, 8]
    assert tiles.lookup("sm_90", "Other", 1, 128) == tiles.shipped()["sm_90"][0].tile


def test_tables_from_before_there_were_clusters_are_read(cache: Path) -> None:
    row = {"device": "Mine", "max_work": 64, **Tile(32, 4)._asdict()}
    del row["clustered"]
    cache.parent.mkdir(parents=True)
    cache.write_text(json.dumps({"tile": [row]}))
    assert tiles.lookup("sm_90", "Mine", 1, 128) == Tile(32, 4)


def test_a_tuned_row_for_more_work_does_not_stand_in_for_one_that_does_not_suit(cache: Path) -> None:
    tuned = {64: Tile(32, 1, clustered=True), 10**12: Tile(128, 8)}
    cache.parent.mkdir(parents=True)
    rows = [{"device": "Mine", "max_work": work, **tile._asdict()} for work, tile in tuned.items()]
    cache.write_text(json.dumps({"tile": rows}))
    assert tiles.lookup("sm_90", "Mine", 16, 128, value_heads=2) == tuned[64]
    assert tiles.lookup("sm_90", "Mine", 16, 128, value_heads=4) == Tile(64, 2, clustered=True)  # as shipped
    assert tiles.lookup("sm_90", "Mine", 65, 128, value_heads=4) == tuned[10**12]


def test_a_tuned_table_of_clusters_alone_leaves_other_heads_to_the_shipped_one(cache: Path) -> None:
    row = {"device": "Mine", "max_work": 10**12, **Tile(128, 4, clustered=True)._asdict()}
    cache.parent.mkdir(parents=True)
    cache.write_text(json.dumps({"tile": [row]}))
    assert tiles.lookup("sm_80", "Mine", 1, 128, value_heads=8).clustered
    assert tiles.lookup("sm_80", "Mine", 1, 256, value_heads=8) == tiles.lookup("sm_80", "Other", 1, 256)


@pytest.mark.parametrize("text", ["", "[1]", '{"tile": [{"device": "Mine"}]}', '{"tile": 3}'])
def test_a_broken_table_is_no_table_and_a_warning_says_what_to_do(text: str, cache: Path) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text(text)
    with pytest.warns(UserWarning, match=r"tiles\.json: not a tile table .*delete it or run `qwen-fastdecode tune`"):
        assert tiles.lookup("sm_90", "Mine", 1, 128) == tiles.shipped()["sm_90"][0].tile


@pytest.mark.parametrize("DV", [16, 64, 128])
def test_candidates_cover_a_head(DV: int) -> None:
    for tile in tiles.candidates(DV):
        assert DV % tile.block_v == 0
    assert len(set(tiles.candidates(128))) == len(tiles.candidates(128))


@pytest.mark.parametrize(
    ("DV", "value_heads", "shapes"),
    [
        (128, 2, [(128, 4), (64, 2), (32, 2), (32, 1)]),
        (128, 4, [(128, 4), (64, 2)]),
        (128, 8, [(128, 4)]),
        (128, 9, []),
        (64, 4, [(64, 4), (64, 2), (32, 2), (32, 1)]),
        (16, 1, [(16, 4), (16, 2), (16, 1)]),
        (256, 1, []),
    ],
)
def test_candidates_are_clustered_where_there_are_clusters_and_the_parts_of_heads_fit(
    DV: int, value_heads: int, shapes: list[tuple[int, int]]
) -> None:
    found = tiles.candidates(DV, value_heads, clusters=True)
    assert [(tile.block_v, tile.num_warps) for tile in found if tile.clustered] == shapes
    assert [tile for tile in found if not tile.clustered] == tiles.candidates(DV, value_heads)
