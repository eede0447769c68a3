"""Tables and the chart of what was measured, each from a committed results file. `figures.py` puts them into documents.

What a results file does not have is left out. Which folder of results is quoted is said here, once.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.chart import bars
from benchmarks.markdown import table

RESULTS = Path(__file__).resolve().parent / "results"
SOURCES = {
    "gpu": "h100-2026-11-24",  # generate.json and speed.json: one machine, one kernel
    "graph": "h100-2026-11-26-graph",  # graph.json
    "ranks": "h100x2-2026-11-24",
    "cpu": "cpu-2026-11-23",
    "states": "state-dtype-cpu-2026-11-24",
    "deferred": "h100-2026-11-26-deferred",  # deferred-op.json and deferred-models.json
}
ALONE, INSTALLED = "PyTorch", "installed"  # what upstream was to run: its own PyTorch code, or other packages' kernels
MODELS = {
    "qwen3_5, hidden 2560, 32 layers": "dense, Qwen3.5-4B's shape",
    "qwen3_5, hidden 2560, 4 layers": "dense, Qwen3.5-4B's shape, 4 of 32 layers",
    "qwen3_next, hidden 2048, 8 of 48 layers": "experts, Qwen3-Next's shape, 8 of 48 layers",
    "qwen3_next, hidden 2048, 48 layers": "experts, Qwen3-Next's shape",
}
CAPTURED_PROMPT = 16  # tokens; longer ones are in docs/cuda-graph.md
Rows = list[dict[str, Any]]


def load(source: str, name: str) -> dict[str, Any]:
    return json.loads((RESULTS / SOURCES[source] / name).read_text(encoding="utf-8"))


def times(ratio: float) -> str:
    return f"{ratio:.2f}x"


def amount(value: float) -> str:
    """Three digits, and thousands set apart."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def machine(of: dict[str, Any], *others: str) -> str:
    parts = [of["device"].partition(",")[0], *(f"{name} {of[name]}" for name in ("torch", "transformers", *others))]
    return ", ".join(parts)


def subjects(rows: Rows) -> list[tuple[str, str]]:
    """(model, mode) pairs, in order."""
    return list(dict.fromkeys((row["model"], row["mode"]) for row in rows))


def tokens() -> str:
    """Tokens a second of whole models: the patched model's, and how many times each unpatched side's."""
    data = load("gpu", "generate.json")
    rows: Rows = data["results"]
    batches = sorted({row["batch"] for row in rows})
    lines = []
    for model, mode in subjects(rows):
        cells = {(row["asked"], row["batch"]): row for row in rows if (row["model"], row["mode"]) == (model, mode)}
        patched = [cells.get((ALONE, batch)) for batch in batches]
        name = f"{MODELS.get(model, model)}; {mode}"
        lines.append([f"**{name}**", *(f"**{amount(row['after'])}**" if row else "" for row in patched)])
        same = all(row["kernels"] == ALONE for row in cells.values())
        for asked, words in {
            ALONE: "times Transformers alone",
            INSTALLED: "the same, measured again" if same else "times Transformers with flash-linear-attention",
        }.items():
            of = [cells.get((asked, batch)) for batch in batches]
            if any(of):
                lines.append([f"... {words}", *(times(row["after"] / row["before"]) if row else "" for row in of)])
    head = ["tokens per second, patched (more is better)", *(f"batch {batch}" for batch in batches)]
    return f"{table(head, lines)}\n\n{_caption(data['machine'])}"


def _caption(of: dict[str, Any]) -> str:
    return (
        f"{machine(of)}, flash-linear-attention {of['flash-linear-attention']}; bfloat16, random weights; code of "
        f"{of['date']} ({of['revision']}). A ratio below 1 means that the patched model was slower."
    )


def captured() -> str:
    """Tokens a second inside `generate`: Transformers alone, patched, and patched with cuda_graph=True."""
    data = load("graph", "graph.json")
    rows = {
        (row["model"], row["batch"]): row["ms a token"]
        for row in data["results"]
        if row.get("prompt") == CAPTURED_PROMPT and "eager" in row.get("ms a token", {})
    }
    batches = sorted({batch for _, batch in rows})
    sides = {"eager": "Transformers alone", "patched": "patched", "cuda_graph": "**patched, cuda_graph=True**"}
    lines = []
    for model in dict.fromkeys(model for model, _ in rows):
        cells = [rows.get((model, batch)) for batch in batches]
        lines.append([f"**{MODELS.get(model, model)}**", *("" for _ in batches)])
        for side, words in sides.items():
            lines.append(
                [
                    f"... {words}",
                    *(amount(b * 1000 / ms[side]) if ms else "" for b, ms in zip(batches, cells, strict=True)),
                ]
            )
        lines.append(
            ["... times Transformers alone", *(times(ms["eager"] / ms["cuda_graph"]) if ms else "" for ms in cells)]
        )
    head = ["tokens per second (more is better)", *(f"batch {batch}" for batch in batches)]
    of = data["machine"]
    caption = (
        f"{machine(of)}, flash-linear-attention {of['flash-linear-attention']}; bfloat16, random weights, prompts of "
        f"{CAPTURED_PROMPT} tokens; code of {of['date']} ({of['revision']})."
    )
    return f"{table(head, lines)}\n\n{caption}"


def device_time() -> str:
    """What the GPU itself has to do for one decode step of a whole model."""
    data = load("gpu", "generate.json")
    rows: Rows = [row for row in data["results"] if row.get("device_ms_before")]
    batches = sorted({row["batch"] for row in rows})
    lines = []
    for model, mode in subjects(rows):
        for asked in (ALONE, INSTALLED):
            cells = {
                row["batch"]: row
                for row in rows
                if (row["model"], row["mode"], row["asked"]) == (model, mode, asked)
                and (asked == ALONE or row["kernels"] != ALONE)
            }
            if cells:
                upstream = "Transformers alone" if asked == ALONE else "with flash-linear-attention"
                values = [
                    f"{row['device_ms_before']:.3g} to {row['device_ms_after']:.3g} "
                    f"({times(row['device_ms_before'] / row['device_ms_after'])})"
                    if (row := cells.get(batch))
                    else ""
                    for batch in batches
                ]
                lines.append([f"{MODELS.get(model, model)}; {mode}; {upstream}", *values])
    return table(["GPU time of a step, ms (less is better)", *(f"batch {batch}" for batch in batches)], lines)


def step() -> str:
    """One gated DeltaNet step, by CUDA graph and as an eager call."""
    data = load("gpu", "speed.json")
    rows: Rows = [row for row in data["results"]["rows"] if row["HV"] == 32 and row["state"] == "float32"]
    lines = []
    for row in rows:
        graph, eager = row["graph_us"], row["eager_us"]
        lines.append(
            [
                str(row["batch"]),
                amount(graph["ours"]),
                *(_over(graph, name) for name in ("upstream, PyTorch", "upstream, installed kernels")),
                times(graph["ours"] / row["floor_us"]),
                amount(eager["ours"]),
                *(_over(eager, name) for name in ("upstream, PyTorch", "upstream, installed kernels")),
            ]
        )
    head = ["batch", "graph, us", "faster than Transformers", "... with fla", "of the floor (less is better)"]
    head += ["eager, us", "faster than Transformers", "... with fla"]
    bandwidth = data["results"]["copy_bandwidth"] / 1e12
    of = data["machine"]
    note = f"{machine(of, 'triton')}, flash-linear-attention (fla) {of['flash-linear-attention']}; code of "
    note += f"{of['date']} ({of['revision']}). The copy that sets the floor moves {bandwidth:.2f} TB/s."
    return f"{table(head, lines)}\n\n{note}"


def _over(times_us: dict[str, float], name: str) -> str:
    return times(times_us[name] / times_us["ours"]) if name in times_us else "no result"


def cpu() -> str:
    """The step on one CPU thread."""
    data = load("cpu", "op.json")
    lines = []
    for row in data["ratios"]:
        rounds = row["rounds"]
        spread = f"{statistics.median(rounds):.1f}x ({min(rounds):.1f}x to {max(rounds):.1f}x)"
        sides = {x["side"]: x for x in data["steps"] if (x["batch"], x["memory"]) == (row["batch"], row["memory"])}
        ms = [f"{side['milliseconds']['median']:.2g}" for side in (sides["upstream"], *_ours(sides))]
        extra = [f"{side['memory_percent']:.0f} %" for side in (sides["upstream"], *_ours(sides))]
        lines.append([str(row["batch"]), row["memory"], spread, " / ".join(ms), " / ".join(extra)])
    head = ["batch", "memory of temporaries", "times as fast", "ms, Transformers / patched"]
    head += ["extra memory, of the state"]
    about = data["setting"]
    return f"{table(head, lines)}\n\n{about['shape']}; torch {about['torch']}, Transformers {about['transformers']}."


def _ours(sides: dict[str, Any]) -> Rows:
    return [side for name, side in sides.items() if name != "upstream"]


def ranks() -> str:
    """Tensor parallel decoding on two GPUs."""
    data = load("ranks", "tp.json")
    rows: Rows = data["results"]["speed"]
    batches = sorted({row["batch"] for row in rows})
    sides = {"unpatched": "unpatched", "off": '`head_parallel="off"`', "on": '`head_parallel="on"`'}
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        ms = {(row["side"], row["batch"]): row["ms"] for row in rows if row["model"] == model}
        for side, words in sides.items():
            cells = [
                f"{ms[side, batch]:.1f}"
                + ("" if side == "unpatched" else f" ({times(ms['unpatched', batch] / ms[side, batch])})")
                for batch in batches
            ]
            lines.append([model, words, *cells])
    of = data["machine"]
    head = ["ms a token (less is better)", "", *(f"batch {batch}" for batch in batches)]
    return f"{table(head, lines)}\n\nTwo of {machine(of)}; bfloat16, eager; code of {of['date']}."


def states() -> str:
    """What recurrent states in bfloat16 cost."""
    data = load("states", "state_dtype.json")
    lines = []
    for row in data["checkpoints"]:
        difference, error = row["nll bfloat16 minus float32"], row["its standard error"]
        agree = f"{100 * row['greedy tokens that agree']:.2f} %"
        lines.append([row["checkpoint"], f"{row['tokens']:,}", f"{difference:.1e} +- {error:.1e}", agree])
    text = table(["checkpoint", "tokens", "nats a token more", "greedy tokens that agree"], lines)
    growth = []
    for row in data["growth"]:
        memory = f"{row['memory']:,} tokens" if row["memory"] < 10**6 else "for ever"
        growth.append([memory, *(f"{error:.1e}" for error in row["bfloat16"].values())])
    head = ["error of a head's state that remembers", *(f"after {n}" for n in data["growth"][0]["bfloat16"])]
    return f"{text}\n\n{table(head, growth)}"


def deferred() -> str:
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


def _pairs(sides: list[str]) -> list[tuple[str, str]]:
    """(deferred side, the same without) of the sides of a run."""
    plain = {side: side.replace("captured, deferred", "captured").replace("deferred", "patched") for side in sides}
    return [(side, other) for side, other in plain.items() if side != other]


def deferred_steps() -> str:
    """The kernel of such a step beside the one of two passes."""
    data = load("deferred", "deferred-op.json")
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


def chart() -> str:
    """Tokens a second of eager decoding, as an SVG: one group of bars a model and batch."""
    rows: Rows = [row for row in load("gpu", "generate.json")["results"] if row["mode"] == "eager"]
    groups = []
    for model, _ in subjects(rows):
        for batch in sorted({row["batch"] for row in rows if row["model"] == model}):
            of = {row["asked"]: row for row in rows if (row["model"], row["batch"]) == (model, batch)}
            groups.append((MODELS.get(model, model), f"batch {batch}", _sides(of)))
    title = "tokens per second, as a multiple of Transformers alone (more is better)"
    return bars(title, groups, machine(load("gpu", "generate.json")["machine"]) + ", eager")


def _sides(of: dict[str, dict[str, Any]]) -> dict[str, float]:
    base = of[ALONE]["before"]
    found = {"Transformers": 1.0, "patched": of[ALONE]["after"] / base}
    if INSTALLED in of:
        found["Transformers with flash-linear-attention"] = of[INSTALLED]["before"] / base
    return found
