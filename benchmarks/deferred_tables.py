"""Tables of states that are written every N-th step, each from a committed results file."""

from __future__ import annotations

from benchmarks.markdown import table
from benchmarks.tables import amount, load, machine, times


def models() -> str:
    """States written every N-th step: tokens a second of a whole model, and us a layer."""
    data = load("deferred", "deferred-models.json")
    lines = []
    for row in data["results"][1:]:  # the first is about the same tokens
        rate, ms = row["tokens a second"], row["slowest ms"]
        for side, plain in _pairs([*rate]):
            cells = amount(rate[plain]), amount(rate[side]), times(rate[side] / rate[plain])
            lines.append([plain, str(row["batch"]), *cells, f"{ms[plain]:.1f}, {ms[side]:.1f} ms"])
    head = ["way", "sequences", "tokens per second", "... deferred", "gain", "slowest token, without and with"]
    text = table(head, sorted(lines, key=lambda line: ("bfloat16" in line[0], "patched" in line[0], int(line[1]))))
    return f"{text}\n\n{machine(data['machine'])}; Qwen3.5-4B's shape, random weights."


def gain() -> str:
    """What it adds to captured decoding, in a sentence."""
    rows = load("deferred", "deferred-models.json")["results"][1:]
    gains = {
        row["batch"]: row["tokens a second"]["captured, deferred"] / row["tokens a second"]["captured"]
        for row in rows
        if "captured, deferred" in row["tokens a second"]
    }
    (N,) = {row["N"] for row in load("deferred steps", "deferred-op.json")["results"] if "floor us" in row}
    *most, last = sorted(gains)
    said = f"{', '.join(times(gains[batch]) for batch in most)} and {times(gains[last])}"
    return (
        f"On top of that, `deferred_state=True` writes a state only at every {N}th step: {said} the tokens at batch "
        f"{', '.join(map(str, most))} and {last} of the dense model ([more](docs/deferred-state.md))."
    )


def _pairs(sides: list[str]) -> list[tuple[str, str]]:
    """(deferred side, the same without) of the sides of a run."""
    plain = {side: side.replace("captured, deferred", "captured").replace("deferred", "patched") for side in sides}
    return [(side, other) for side, other in plain.items() if side != other]


def steps() -> str:
    """The kernel of such a step beside the one of two passes."""
    data = load("deferred steps", "deferred-op.json")
    lines = []
    for row in data["results"]:
        if "floor us" in row:
            us = [f"{row[name]:.1f}" for name in ("two passes us", "deferred us", "slowest phase us")]
            of = [f"{row[name]:.2f}" for name in ("two passes, of floor", "deferred, of floor")]
            lines.append([row["state dtype"], str(row["batch"]), *us, *of, times(row["two passes / deferred"])])
    head = [
        "states",
        "sequences",
        "us a layer, two passes",
        "deferred",
        "slowest step",
        "of the floor",
        "deferred",
        "gain",
    ]
    of = data["machine"]
    return (
        f"{table(head, lines)}\n\n{machine(of, 'triton')}; 16 key heads, 32 value heads of 128 x 128; by graph replay."
    )
