"""`qwen-fastdecode tune`, in Triton's interpreter: what it measures means nothing, what it keeps is what is used."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest
import torch

from qwen_fastdecode import BackendUnavailable
from qwen_fastdecode.cli import tune
from qwen_fastdecode.cli.arguments import build_parser
from qwen_fastdecode.cli.tune import Heads, Measured
from qwen_fastdecode.errors import BadInput
from qwen_fastdecode.ops.triton import clusters, gpu, tiles
from qwen_fastdecode.ops.triton import launch as triton_backend
from qwen_fastdecode.ops.triton.tiles import Tile

CPU = torch.device("cpu")
SMALL = Heads(HK=1, R=2, D=16)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's table, in an empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tiles.tuned.cache_clear()
    yield tiles.cache_file()
    tiles.tuned.cache_clear()


def command(*arguments: str) -> argparse.Namespace:
    return build_parser().parse_args(["tune", *arguments])


def test_command_keeps_a_tile_for_each_batch(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(tune, "BATCHES", (1, 2))
    monkeypatch.setattr(tiles, "candidates", lambda DV, *_: [Tile(DV, 8), Tile(DV, 4, 2)])
    args = command("--device", "cpu", "--key-heads", "1", "--value-heads", "2", "--head-dim", "16")
    assert args.run(args) == 0
    assert [len(tiles.tuned()["cpu"]), tiles.tuned()["cpu"][-1].max_work] == [2, tune.UNLIMITED]
    printed = capsys.readouterr().out
    assert re.search(r"^batch    1: +[\d.]+ with 16 columns, \d warps", printed, re.MULTILINE)
    assert str(cache) in printed


@pytest.mark.parametrize(
    ("tile", "words"),
    [
        (Tile(32, 1, clustered=True), "32 columns, 1 warp, clustered"),
        (Tile(64, 2, 2, 200), "64 columns, 2 warps, the next one loaded early, 200 registers"),
    ],
)
def test_tiles_in_words(tile: Tile, words: str) -> None:
    assert tiles.in_words(tile) == words


def test_the_fastest_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {Tile(16, 4): 3.0, Tile(16, 8): 1.0, Tile(16, 2): None}  # None: does not compile
    monkeypatch.setattr(tiles, "candidates", lambda *_: list(times))
    monkeypatch.setattr(triton_backend, "table_tile", lambda *_, **__: Tile(16, 4))
    monkeypatch.setattr(tune, "_time", lambda _, tile, __: times[tile])
    heard: list[str] = []
    assert tune.tune(CPU, SMALL, (3,), heard.append) == [Measured(3, Tile(16, 8), 1.0, Tile(16, 4), 3.0)]
    assert heard[0] == "batch 3: 16 columns, 4 warps"


def test_parts_are_measured_of_heads_that_fit_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters, "clusters_reason", lambda _: None)
    found = tune.candidates(CPU, 1, Heads(HK=16, R=3, D=128))
    assert [tile.block_v for tile in found if tile.clustered] == [128, 64]


def test_kept_tiles_serve_the_works_around_their_batch(cache: Path) -> None:
    found = [Measured(batch, Tile(128, warps), 1.0, Tile(64, 4), 2.0) for batch, warps in [(1, 16), (4, 8), (64, 4)]]
    tune.save("Mine", Heads(16, 2, 128), found)
    tune.save("Other", Heads(16, 2, 128), found[:1])
    works = (16, 32, 33, 256, 257, 10**9)  # the limits are between batches 1 and 4, and 4 and 64
    assert [tiles.lookup("sm_90", "Mine", work, 128).num_warps for work in works] == [16, 16, 8, 8, 4, 4]
    assert tiles.lookup("sm_90", "Other", 10**9, 128).num_warps == 16


def test_tiles_of_one_dtype_of_states_are_kept_beside_those_of_another(cache: Path) -> None:
    floats, halves = Heads(16, 2, 128), Heads(16, 2, 128, "bfloat16")
    for heads, warps in [(floats, 2), (halves, 4), (floats, 8)]:
        tune.save("Mine", heads, [Measured(1, Tile(128, warps), 1.0, Tile(64, 4), 2.0)])
    found = {state: tiles.lookup("sm_90", "Mine", 16, 128, state).num_warps for state in tiles.STATES}
    assert found == {"float32": 8, "bfloat16": 4}


def test_states_are_of_the_dtype_that_is_tuned_for() -> None:
    args = command("--state-dtype", "bfloat16")
    heads = tune.read_heads(args)
    layer = tune.random_layer(1, heads._replace(HK=1, D=16), CPU)
    assert [x.dtype for x in layer[6:8]] == [torch.bfloat16, torch.bfloat16]
    (measured,) = tune.tune(CPU, Heads(1, 2, 16, "bfloat16"), (1,))
    assert measured.us > 0


def test_a_wrong_tile_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_backend, "decode_triton", lambda step, *_: torch.zeros(step.sources[0].shape[0], 32))
    with pytest.raises(RuntimeError, match="computes something else than the PyTorch backend on cpu"):
        tune.tune(CPU, SMALL, (1,))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "nonsense"], "--device: 'nonsense' is no device"),
        (["--device", "cpu", "--value-heads", "17"], "--value-heads 17 is not a multiple of --key-heads 16"),
        (["--device", "cpu", "--head-dim", "0"], "a size is not positive"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str) -> None:
    args = command(*arguments)
    with pytest.raises(BadInput, match=message):
        args.run(args)


def test_no_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "INTERPRETED", False)
    args = command("--device", "cpu")
    with pytest.raises(BackendUnavailable, match="nothing to tune on cpu: Triton needs a CUDA or ROCm device"):
        args.run(args)
