"""The machine code of the shipped tiles, compiled without a GPU: what makes the kernel fast is in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("offline_compile.py")
LARGE_BATCH = 256 * 16  # sequences x key heads


@pytest.mark.parametrize(
    "arch",
    ["sm_90", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sm_80", "sm_100", "sm_120", "gfx942"))],
)
def test_machine_code(arch: str, tmp_path: Path) -> None:
    rows = compile_shipped_tiles(arch, tmp_path)
    deferred = [row for row in rows if row["work"].startswith("deferred")]
    for row in deferred:
        print(row)
        assert row["spills"] == 0
        programs = 2 if row["clustered"] else 3  # of 4 warps that fit on a multiprocessor
        assert row["registers"] <= 65536 // (programs * 128)
        assert row["cluster barriers"] == row["clustered"]
        if row["clustered"]:
            assert row["loads after arriving"] == 0
            assert row["stores after waiting"] == 3  # q's and k's taps, the key, the cursor
        assert row["128-bit loads"] >= 32 + 2 * 8  # a head, and in the loop over its parts the first and the next
        assert row["128-bit stores"] >= 8
    rows = [row for row in rows if row not in deferred]
    assert rows
    for row in rows:
        print(row)  # shown with -s, and when a check fails
        threads = row["num_warps"] * (64 if arch == "gfx942" else 32)
        at_once = 4 if row["state"] == "float32" else 8  # numbers in 128 bits
        share = 128 * row["block_v"] // threads // at_once  # of the state tile
        assert row["spills"] == 0
        assert row["128-bit loads"] >= share
        assert row["128-bit stores"] >= share
        # Only the columns' partial sums pass through shared memory, a few rows a warp, and the taps of q and k as words
        # of 64 bits, never the tile itself.
        assert row["shared bytes"] <= max(4 * 4 * row["num_warps"] * row["block_v"], 2 * 128 * 8)
    clustered = [row for row in rows if row["clustered"]]
    for row in clustered:
        assert row["registers"] <= 65536 // (2 * 128)  # two on a multiprocessor: eight sequences' at once
        assert row["cluster barriers"] == 1
        parts = row["block_v"] < 128
        # All has been read that another program may overwrite; what is left are the squares of a head's parts.
        assert row["loads after arriving"] == row["volatile loads after waiting"] == parts
        assert row["stores before arriving"] == 2 * parts  # v's taps, and the square that the others wait for
        keys_taps = 128 // (32 * row["num_warps"])  # q's and k's, 2 * 128 words of 64 bits: so many stores of 128 bits
        assert row["stores after waiting"] == keys_taps + 1  # v's taps of whole heads, the output of parts
        programs = row["value heads"] * 128 // row["block_v"]
        assert row["launcher"] == [row["num_warps"], programs, row["shared bytes"]]
    if arch == "sm_90":
        assert deferred
        assert {row["state"] for row in clustered} == {"float32", "bfloat16"}
        floats = [row for row in rows if row["state"] == "float32"]
        large = next(row for row in floats if int(row["work"].rpartition(" ")[2]) >= LARGE_BATCH)
        # As many programs fit on a multiprocessor as with 128 registers a thread at 4 warps: four, 32 KiB each.
        assert large["registers"] * large["num_warps"] <= 128 * 4
        assert large["shuffles"] < 100


def compile_shipped_tiles(arch: str, cache: Path) -> list[dict]:
    """A row of counts for each tile, from a process of its own: this one's Triton interprets."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    environment["PYTHONPATH"] = os.pathsep.join([str(SCRIPT.parents[2]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, SCRIPT, arch]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
