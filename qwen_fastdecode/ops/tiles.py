"""The tile table: which tile of the state a GPU works on. The data are `tiles.toml` and the user's own tuning."""

from __future__ import annotations

import functools
import json
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class Tile(NamedTuple):
    """How a program works on the [DK, DV] state of a value head."""

    block_v: int  # columns at a time, a power of two
    num_warps: int
    num_stages: int = 1  # 2: the next tile is loaded while the current one is finished
    max_registers: int = 0  # a thread may use so many, so that more programs fit; 0: as many as it likes


def lookup(arch: str, device_name: str, work: int, DV: int) -> Tile:
    """The tile for `work` = sequences x key heads on a device: the user's tuned one, else the shipped one.

    An architecture that the table does not know uses the rows of the closest older one of its kind.
    """
    rows = _tuned().get(device_name) or _shipped().get(_known(arch))
    for row in rows:
        if work <= row["max_work"]:
            break
    return fit(Tile(*(row[field] for field in Tile._fields)), DV)


def fit(tile: Tile, DV: int) -> Tile:
    """The same tile, no wider than a head."""
    return tile._replace(block_v=min(tile.block_v, power_of_two(DV)))


def candidates(DV: int) -> list[Tile]:
    """Tiles worth measuring for value heads of DV columns: those that compile without spilling registers."""
    whole = power_of_two(DV)
    shapes = [
        (whole, 4, 0),
        (whole, 8, 128),
        (whole, 16, 0),
        (whole // 2, 4, 168),
        (whole // 2, 8, 128),
        (whole // 4, 4, 96),
        (whole // 4, 8, 80),
    ]
    return [Tile(max(width, 16), warps, stages, limit) for width, warps, limit in shapes for stages in (1, 2)]


def whole_head(DV: int) -> Tile:
    """The tile for several tokens a sequence: all columns, 32 state elements of a [128, DV] head a thread."""
    return Tile(power_of_two(DV), max(4, power_of_two(DV) // 8))


def power_of_two(n: int) -> int:
    """The smallest power of two >= n, and >= 16: a shorter block leaves most of a warp idle."""
    return max(16, 1 << (n - 1).bit_length())


def cache_file() -> Path:
    """Where `qwen-fastdecode tune` keeps what it measured."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "qwen_fastdecode" / "tiles.json"


def _known(arch: str) -> str:
    table = _shipped()
    if arch in table:
        return arch
    if arch.startswith("gfx"):
        return "gfx942"
    known = sorted((int(name[3:]), name) for name in table if name.startswith("sm_"))
    number = int(arch.removeprefix("sm_"))
    return max((row for row in known if row[0] <= number), default=known[0])[1]


@functools.cache
def _shipped() -> dict[str, list[dict[str, Any]]]:
    table: dict[str, list[dict[str, Any]]] = {}
    for row in tomllib.loads(Path(__file__).with_name("tiles.toml").read_text())["tile"]:
        table.setdefault(row["arch"], []).append(row)
    return table


@functools.cache
def _tuned() -> dict[str, list[dict[str, Any]]]:
    path = cache_file()
    return json.loads(path.read_text()) if path.exists() else {}
