"""The tile table: how a GPU works on the state. The data are `tiles.toml`, and what the user's own GPU measured."""

from __future__ import annotations

import functools
import json
import os
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


CLUSTER = 8  # programs of a thread block cluster that every GPU with clusters runs at once
STATES = ("float32", "bfloat16")  # dtypes of recurrent states that a row may be for
WIDEST_CLUSTERED = 128  # columns of a head of 128 rows that four warps hold without spilling


class Tile(NamedTuple):
    """How a program works on the [DK, DV] state of a value head."""

    block_v: int  # columns at a time, a power of two
    num_warps: int
    num_stages: int = 1  # 2: the next tile is loaded while the current one is finished
    max_registers: int = 0  # a thread may use so many, so that more programs fit; 0: as many as it likes
    clustered: bool = False  # a program a tile of a value head, a key head's in a cluster; else a program a key head


class Row(NamedTuple):
    """A tile, and the largest work (sequences x key heads) that it is for."""

    max_work: int
    tile: Tile


def lookup(
    arch: str,
    device_name: str,
    work: int,
    DV: int,
    state: str = "float32",
    value_heads: int = 1,
    clusters: bool = True,
) -> Tile:
    """The tile for `work` = sequences x key heads on a GPU, on states of a dtype, with `value_heads` a key head.

    The one tuned on that kind of GPU, else the one shipped for it, else the one shipped for its architecture; a dtype
    for which none of them has rows takes the tiles of float32 states. Clustered tiles are passed over where they do not
    suit these heads, or there are no `clusters`: of shipped ones the next row then counts, which is for other heads;
    a tuned table was tuned for one kind of heads, and its next row is for more work.
    """

    def suitable(row: Row) -> bool:
        return suits(row.tile, DV, value_heads) and (clusters or not row.tile.clustered)

    found: list[Row] = []
    for dtype in dict.fromkeys((state, "float32")):
        own = tuned(dtype).get(device_name)
        found += filter(suitable, [_covering(own, work)] if own else [])
        for name in (device_name, closest(arch)):
            rows = [*filter(suitable, shipped(dtype).get(name, ()))]
            found += [_covering(rows, work)] if rows else []
    return fit(found[0].tile, DV)


def _covering(rows: list[Row], work: int) -> Row:
    return next((row for row in rows if work <= row.max_work), rows[-1])


def suits(tile: Tile, DV: int, value_heads: int) -> bool:
    """Whether programs can have such a tile: of a clustered one, all those of a key head's tiles fit a cluster."""
    return not tile.clustered or (DV <= WIDEST_CLUSTERED and value_heads * parts(tile, DV) <= CLUSTER)


def parts(tile: Tile, DV: int) -> int:
    """How many such tiles a value head of DV columns has."""
    return power_of_two(DV) // fit(tile, DV).block_v


def in_words(tile: Tile) -> str:
    """For who tunes: what of a tile is out of the ordinary is named."""
    words = [f"{tile.block_v} columns", f"{tile.num_warps} warp{'s' * (tile.num_warps > 1)}"]
    words += ["the next one loaded early"] * (tile.num_stages > 1)
    words += [f"{tile.max_registers} registers"] * (tile.max_registers > 0)
    return ", ".join([*words, *["clustered"] * tile.clustered])


def closest(arch: str) -> str:
    """The architecture of the table that stands in for `arch`: itself, else the closest older one of its kind."""
    kind = "gfx" if arch.startswith("gfx") else "sm_"
    known = [name for name in shipped() if name.startswith(kind)]
    older = [name for name in known if _number(name) <= _number(arch)]
    return max(older, key=_number) if older else min(known, key=_number)


def fit(tile: Tile, DV: int) -> Tile:
    """The same tile, no wider than a head."""
    return tile._replace(block_v=min(tile.block_v, power_of_two(DV)))


def whole_head(DV: int) -> Tile:
    """The tile for several tokens a sequence: all columns, 64 elements of a [128, DV] state a thread."""
    return Tile(power_of_two(DV), max(4, power_of_two(DV) // 16))


def candidates(DV: int, value_heads: int = 1, clusters: bool = False, state: str = "float32") -> list[Tile]:
    """Tiles worth measuring for value heads of DV columns and states of a dtype: those that keep all in registers.

    value_heads: of a key head. clusters: whether the GPU has them.
    """
    whole = power_of_two(DV)
    shapes = [
        (whole, 4, 0),
        (whole, 8, 128),
        (whole // 2, 2, 0),
        (whole // 2, 4, 168),
        (whole // 4, 2, 0),
        (whole // 4, 4, 96),
    ]
    if state == "bfloat16":  # half the registers for the state: more programs fit, or narrower ones
        shapes += [(whole // 2, 2, 200), (whole // 2, 4, 0), (whole // 4, 1, 0)]
    found = [Tile(max(width, 16), warps, stages, limit) for width, warps, limit in shapes for stages in (1, 2)]
    if not clusters or whole > WIDEST_CLUSTERED:
        return found
    shared = dict.fromkeys(
        fit(Tile(width, warps, clustered=True), DV) for width, warps in [(whole, 4), (64, 2), (32, 2), (32, 1)]
    )
    return [*found, *(tile for tile in shared if suits(tile, DV, value_heads))]


def power_of_two(n: int) -> int:
    """The smallest power of two >= n, and >= 16: a shorter block leaves most of a warp idle."""
    return max(16, 1 << (n - 1).bit_length())


@functools.cache
def shipped(state: str = "float32") -> dict[str, list[Row]]:
    """The rows of each architecture, and of each kind of GPU that has rows of its own, by rising work."""
    return _by_key("gpu", state, tomllib.loads(Path(__file__).with_name("tiles.toml").read_text())["tile"])


@functools.cache
def tuned(state: str = "float32") -> dict[str, list[Row]]:
    """The rows of each kind of GPU that was tuned here; none, with a warning, where they cannot be read."""
    path = cache_file()
    try:
        return {} if path is None else _by_key("device", state, json.loads(path.read_text())["tile"])
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(
            f"{path}: not a tile table that can be read ({error!r}), so the shipped tiles are used; delete it or run "
            "`qwen-fastdecode tune`",
            stacklevel=2,
        )
        return {}


def cache_file() -> Path | None:
    """Where `qwen-fastdecode tune` keeps what it measured; None for a user without a home."""
    folder = os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(folder or Path.home() / ".cache") / "qwen_fastdecode" / "tiles.json"
    except RuntimeError:  # no HOME, and the user is in no table of users
        return None


def _by_key(key: str, state: str, rows: Iterable[dict[str, Any]]) -> dict[str, list[Row]]:
    """Those for states of one dtype, of equal work in their order. A row that names no dtype is for float32."""
    found: dict[str, list[Row]] = {}
    for row in sorted((row for row in rows if row.get("state", "float32") == state), key=lambda row: row["max_work"]):
        found.setdefault(row[key], []).append(Row(row["max_work"], _tile(row)))
    return found


def _tile(row: dict[str, Any]) -> Tile:
    numbers = {field: row[field] for field in Tile._fields if field != "clustered"}
    return Tile(**numbers, clustered=row.get("clustered", False))


def _number(arch: str) -> int:
    return int("".join(filter(str.isdigit, arch)))  # AMD's names may end in letters
