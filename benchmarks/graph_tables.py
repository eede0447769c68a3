"""What `docs/cuda-graph.md` and `docs/tensor-parallel.md` say of captured steps, from the committed results."""

from __future__ import annotations

import math

from benchmarks.markdown import table
from benchmarks.tables import MODELS, Cells, Rows, load, machine, times

SIDES = {"unpatched": "Transformers", "patched": "patched", "captured": "patched, cuda_graph=True"}


def long_prompts() -> str:
    """ms a token after long prompts."""
    data = load("graph", "graph.json")
    rows: Rows = [row for row in data["results"] if "ms a token" in row]
    lines = []
    for row in rows:
        eager, captured = row["ms a token"]["patched"], row["ms a token"]["cuda_graph"]
        lines.append(
            [str(row["batch"]), f"{row['prompt']:,}", f"{eager:.1f}", f"{captured:.1f}", times(eager / captured)]
        )
    head = ["batch", "prompt, tokens", "ms a token, patched (less is better)", "... and captured", "faster"]
    (model,), of = {row["model"] for row in rows}, data["machine"]
    return f"{table(head, lines)}\n\n{MODELS[model]}; {machine(of)}; bfloat16; code of {of['date']}."


def graph_memory() -> str:
    """What stays reserved after calls of many shapes, and after the patch is off."""
    said = []
    for row in load("graph", "graph.json")["results"]:
        if "allocated, reserved MiB" not in row:
            continue
        before, *_, after = (reserved for _, reserved in row["allocated, reserved MiB"])
        off = row["unpatched"][1]
        said.append(
            f"{after - before:,.0f} MiB of {MODELS[row['model']].partition(': ')[2]} ({off - before:,.0f} unpatched)"
        )
    return f"Reserved more than before, after ten calls of ten shapes: {' and '.join(said)}."


def captured_ranks() -> str:
    """Captured steps on two tensor-parallel ranks."""
    data = load("captured ranks", "tp-graph.json")
    of = data["machine"]
    return f"{ranks_table(data['results'])}\n\nTwo of {machine(of)}; dense, 32 layers, bfloat16; code of {of['date']}."


def ranks_table(rows: Rows) -> str:
    """ms a token of each side, of `gpu_tp_graph`'s rows: a token is there when the slower rank has it."""
    ms = {
        (row["speed"], row["batch"]): max(rank.get("ms", math.nan) for rank in row["ranks"])
        for row in rows
        if "speed" in row
    }
    batches = sorted({batch for _, batch in ms})
    lines = [[words, *(_beside(ms, side, batch) for batch in batches)] for side, words in SIDES.items()]
    return table(["ms a token (less is better)", *(f"batch {batch}" for batch in batches)], lines)


def _beside(ms: Cells, side: str, batch: int) -> str:
    """Of one side, and how many times as fast as the first that is."""
    if (side, batch) not in ms:
        return ""
    ratio = "" if side == "unpatched" else f" ({times(ms['unpatched', batch] / ms[side, batch])})"
    return f"{ms[side, batch]:.1f}{ratio}"
