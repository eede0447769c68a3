"""What a decode step of the gated DeltaNet layers costs each rank, as a function of batch, heads and ranks.

    python -m benchmarks.ranks.scaling [--layers N --key-heads HK --value-heads HV --hidden H] [--plot FILE]

Counts, not times: bytes of state read and written, operations on them, collectives, and bytes received from the other
ranks. The head ranges and the projections are the package's own (`HeadSizes`, `Family`); `test_scaling` holds the
counts against what 1, 2 and 4 ranks really touch and send.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.markdown import table
from qwen_fastdecode.upstream.families import FAMILIES, Family, HeadSizes

RANKS, BATCHES = (1, 2, 4, 8), (1, 32, 256)
SIDES = ("off", "on")  # head_parallel; unpatched costs what "off" does in collectives, and more passes over the state
STATE_BYTES = 4  # an element of the recurrent state, float32
# On an element of the state, in the folded form: two for S^T k, two for S^T q, three for decay * S + k delta^T.
OPERATIONS = 7


class Cost(NamedTuple):
    """Of one decode step of one layer, on one rank."""

    state_held: int  # bytes of both states; the same on every side: a cache is upstream's, of all heads
    state_moved: int  # bytes of both states read and written
    operations: int
    collectives: int
    received: int  # bytes, from the other ranks
    refetched: int  # bytes received when a cache is made whole, before upstream reads it


@dataclass(frozen=True)
class Step:
    """A step of `batch` sequences of a family's layer. itemsize: bytes of an activation and of a convolution tap."""

    family: Family
    sizes: HeadSizes
    hidden: int
    itemsize: int = 2

    def cost(self, batch: int, ranks: int, side: str) -> Cost:
        """Raises ValueError where the ranks do not divide the key heads and `side` is "on"."""
        s, P = self.sizes, ranks
        split = side == "on" and P > 1
        if split and s.num_k_heads % P:
            raise ValueError(f"ranks: got {P}, expected a divisor of the {s.num_k_heads} key heads")
        recurrent = batch * s.num_v_heads * s.head_k_dim * s.head_v_dim
        held = recurrent * STATE_BYTES + batch * s.conv_channels * s.conv_kernel_size * self.itemsize
        share = P if split else 1
        gathered = [n for name, n in self._projections() if not (split and name in self.family.rows_are_heads)]
        gathered += [s.num_v_heads * s.head_v_dim] if split else []
        gathered += [self.hidden]  # out_proj
        return Cost(
            state_held=held,
            state_moved=2 * held // share,
            operations=OPERATIONS * recurrent // share,
            collectives=len(gathered) if P > 1 else 0,
            received=batch * sum(gathered) * self.itemsize * (P - 1) // P,
            refetched=held * (P - 1) // P if split else 0,
        )

    def _projections(self) -> Iterator[tuple[str, int]]:
        return zip(self.family.projections, self.family.projection_sizes(self.sizes), strict=True)


def rows(step: Step, layers: int) -> Iterator[tuple[str, ...]]:
    """A row a side, number of ranks and batch: of all layers together."""
    for P in RANKS:
        for batch in BATCHES:
            for side in SIDES if P > 1 else SIDES[:1]:
                c = Cost(*(layers * n for n in step.cost(batch, P, side)))
                sizes = (c.state_moved / 1e6, c.operations / 1e9, c.collectives, c.received / 1e6, c.refetched / 1e6)
                yield (str(P), str(batch), side, *(f"{n:,.3g}" if n < 1000 else f"{n:,.0f}" for n in sizes))


HEAD = (
    "ranks",
    "batch",
    "heads split",
    "state moved, MB",
    "operations, G",
    "collectives",
    "received, MB",
    "refetch, MB",
)


STYLES = {"off": ("not split", "--", 9), "on": ("split", "-", 5)}  # words, line, size of the markers: off surrounds on


def _style(number: int, side: str) -> dict[str, Any]:
    _, line, size = STYLES[side]
    face = {"markerfacecolor": "none"} if side == "off" else {}
    return {"color": f"C{number}", "marker": "o", "linestyle": line, "markersize": size, **face}


def plot(step: Step, layers: int, path: Path) -> None:
    """State moved, bytes received and collectives by the number of ranks, a line a batch and side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 4.4), layout="constrained")
    panels: tuple[tuple[str, str], ...] = (
        ("state_moved", "state read and written, MB"),
        ("received", "received from other ranks, MB"),
        ("collectives", "collectives"),
    )
    for axis, (name, label) in zip(axes, panels, strict=True):
        ranks = RANKS[1:] if name == "received" else RANKS  # one rank receives nothing
        for number, batch in enumerate(BATCHES[:1] if name == "collectives" else BATCHES):
            for side in SIDES:
                scale = layers / (1 if name == "collectives" else 1e6)
                values = [scale * getattr(step.cost(batch, P, side), name) for P in ranks]
                axis.plot(ranks, values, label=f"batch {batch}, heads {STYLES[side][0]}", **_style(number, side))
        axis.set(xlabel="ranks", ylabel=f"{label}, a token", xscale="log", xticks=ranks, xticklabels=ranks)
        if name == "collectives":
            axis.set_ylim(0, None)
        else:
            axis.set_yscale("log")
        axis.minorticks_off()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="qwen3_5_moe", choices=sorted(FAMILIES))
    parser.add_argument("--layers", type=int, default=45, help="gated DeltaNet layers")
    parser.add_argument("--key-heads", type=int, default=16)
    parser.add_argument("--value-heads", type=int, default=64)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--plot", type=Path, help="where to draw it")
    asked = parser.parse_args()
    sizes = HeadSizes(asked.key_heads, asked.value_heads, asked.head_dim, asked.head_dim, 4)
    step = Step(FAMILIES[asked.family], sizes, asked.hidden)
    print(
        f"{asked.family}, {asked.layers} layers, HK {asked.key_heads}, HV {asked.value_heads}: a token, on each rank\n"
    )
    print(table(HEAD, rows(step, asked.layers)))
    if asked.plot is not None:
        plot(step, asked.layers, asked.plot)


if __name__ == "__main__":
    main()
