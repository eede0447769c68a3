"""Tables and the chart of what was measured, each from a committed results file. `figures.py` puts them into documents.

What a results file does not have is left out. Which folder of results is quoted is said here, once.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.chart import COLORS, bars
from benchmarks.markdown import table

RESULTS = Path(__file__).resolve().parent / "results"
SOURCES = {
    "models": "h100-2026-11-27",  # generate-*.json
    "models again": "h100-2026-11-27-again",  # the same with a later kernel, on a slower host
    "graph": "h100-2026-11-27",  # graph.json
    "step": "h100-2026-11-27-again",  # speed.json
    "ranks": "h100x2-2026-11-24",
    "captured ranks": "h100x2-2026-11-27",  # tp-graph.json
    "cpu": "cpu-2026-11-23",
    "states": "state-dtype-cpu-2026-11-24",
    "deferred": "h100-2026-11-27-again",  # deferred-models.json
    "deferred steps": "h100-2026-11-27-again",  # deferred-op.json
}
MODELS = {
    "qwen3_5, hidden 2560, 32 layers": "dense: Qwen3.5-4B's shape",
    "qwen3_next, hidden 2048, 8 of 48 layers": "experts: 8 of Qwen3-Next's 48 layers",
}
SIDES = {
    "eager": "Transformers",
    "fla": "Transformers + flash-linear-attention",
    "patched": "patched",
    "cuda_graph": "patched, cuda_graph=True",
    "compiled": "Transformers, compiled",
    "patched_compiled": "patched, compiled",
}
SHORT = {"eager": "Transformers", "fla": "with fla", "compiled": "Transformers, compiled"}
COMPARED = {"patched": ("eager", "fla"), "cuda_graph": ("eager", "fla"), "patched_compiled": ("compiled",)}
Rows = list[dict[str, Any]]
Cells = dict[tuple[str, int], float]  # of a side and batch


def _folder(source: str) -> Path:
    return RESULTS / SOURCES[source]


def load(source: str, name: str) -> dict[str, Any]:
    return json.loads((_folder(source) / name).read_text(encoding="utf-8"))


def times(ratio: float) -> str:
    return f"{ratio:.2f}x"


def amount(value: float) -> str:
    """Three digits, and thousands set apart."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def machine(of: dict[str, Any], *others: str) -> str:
    parts = [of["device"].partition(",")[0], *(f"{name} {of[name]}" for name in ("torch", "transformers", *others))]
    return ", ".join(parts)


def _code(of: dict[str, Any]) -> str:
    """Which code was measured: a revision may have had changes, the kernel's hash says what was compiled."""
    return f"code of {of['date']}, kernel {of['kernel']}"


def whole_models(source: str = "models") -> tuple[dict[str, Any], Rows]:
    """The machine, and the rows of all whole models that have figures; `error` rows have none.

    Raises FileNotFoundError where there are no results, and ValueError where they are of several machines.
    """
    files = _model_files(source)
    of = {}
    for key in next(iter(files.values()))["machine"]:
        values = {name: file["machine"][key] for name, file in files.items()}
        alike = len({*values.values()}) == 1
        of[key] = next(iter(values.values())) if alike else " and ".join(f"{v} ({name})" for name, v in values.items())
    if any(file["machine"]["device"] != of["device"] for file in files.values()):
        raise ValueError(f"{_folder(source)}: one table cannot be of {of['device']}")
    return of, [row for file in files.values() for row in file["results"] if "error" not in row]


def _model_files(source: str = "models") -> dict[str, dict[str, Any]]:
    """By the model's short name. Raises FileNotFoundError where there are none."""
    paths = sorted(_folder(source).glob("generate-*.json"))
    if not paths:
        raise FileNotFoundError(f"{_folder(source)} holds no generate-*.json")
    return {path.stem.removeprefix("generate-"): json.loads(path.read_text(encoding="utf-8")) for path in paths}


def without_speed() -> str:
    """A line for every side of a model that was run and has no speed: why."""
    lines = []
    for short, file in _model_files().items():
        path = _folder("models") / f"tokens-{short}.json"
        said = json.loads(path.read_text(encoding="utf-8"))["results"] if path.exists() else []
        rows = [row for row in file["results"] if row["side"] in SIDES]
        for side in SIDES:
            wrong = [row for row in said if row["side"] == side and not row.get("right")]
            if wrong and not any(row["side"] == side for row in rows):
                lines.append(f"{SIDES[side]}, {short}: {_wrong(wrong)}.")
        for row in rows:
            if "error" in row:
                why = row["error"].splitlines()[0].partition(". ")[0].removeprefix("AssertionError: ")
                lines.append(f"{SIDES[row['side']]}, {short}, batch {row['batch']}: {why}.")
    return "\n".join(f"- No speed: {line}" for line in lines)


def _wrong(rows: Rows) -> str:
    """What `gpu_tokens` found of a side."""
    apart = [row["logits"] for row in rows if "logits" in row]
    if not apart:
        return rows[0]["error"].splitlines()[0].partition(". ")[0]
    same = "the same" if all(row.get("equal") for row in rows) else "not the same"
    return f"in float32 its logits are up to {max(apart):.1e} from Transformers', its tokens {same}"


def _by_side(rows: Rows, figure: str) -> dict[str, Cells]:
    """The models, each with a figure of every (side, batch)."""
    found: dict[str, Cells] = {}
    for row in rows:
        if row[figure] is not None:
            found.setdefault(MODELS[row["model"]], {})[row["side"], row["batch"]] = row[figure]
    return found


def _sides_by_batch(
    head: str, rows: Rows, figure: str, sides: dict[str, str], compared: dict[str, tuple[str, ...]]
) -> str:
    """A heading a model, then a row a side that has figures; below it, how many times those of `compared` it is."""
    batches = sorted({row["batch"] for row in rows})
    lines = []
    for model, cells in _by_side(rows, figure).items():
        lines.append([f"**{model}**", *("" for _ in batches)])
        for side, name in sides.items():
            if not any((side, batch) in cells for batch in batches):
                continue
            lines.append([name, *(amount(cells[side, b]) if (side, b) in cells else "" for b in batches)])
            against = [other for other in compared.get(side, ()) if any((other, batch) in cells for batch in batches)]
            if against:
                ratios = (_times_each(cells, side, against, batch) for batch in batches)
                lines.append([f"... times {' / '.join(SHORT[other] for other in against)}", *ratios])
    return table([head, *(f"batch {batch}" for batch in batches)], lines)


def _times_each(cells: Cells, side: str, others: list[str], batch: int) -> str:
    """Of the others that were measured at this batch; a dash where one was not."""
    if (side, batch) not in cells:
        return ""
    found = (cells.get((other, batch)) for other in others)
    ratios = (cells[side, batch] / value if value else None for value in found)
    return " / ".join("-" if x is None else f"{x:.2f}" if x < 10 else f"{x:.1f}" for x in ratios)


def models() -> str:
    """Tokens a second of whole models, of every side."""
    of, rows = whole_models()
    text = _sides_by_batch("tokens per second (more is better)", rows, "tokens_per_s", SIDES, COMPARED)
    (prompt,) = {row["prompt"] for row in rows}
    note = f"{machine(of)}, flash-linear-attention (fla) {of['flash-linear-attention']}; bfloat16, random weights, "
    note += f"prompts of {prompt} tokens; {_code(of)}."
    return "\n\n".join(part for part in (text, without_speed(), note) if part)


def first_tokens() -> str:
    """How long the first call takes: patching, compiling and capturing are in it."""
    _, rows = whole_models()
    batches = sorted({row["batch"] for row in rows})
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        lines.append([f"**{MODELS[model]}**", *("" for _ in batches)])
        for side, name in SIDES.items():
            of = {row["batch"]: row for row in rows if (row["model"], row["side"]) == (model, side)}
            if not of:
                continue
            cells = (f"{of[b]['first_s']:.2f} / {of[b]['hundredth_s']:.1f}" if b in of else "" for b in batches)
            lines.append([name, *cells])
    head = ["first / hundredth token, s (less is better)", *(f"batch {batch}" for batch in batches)]
    return table(head, lines)


def device_time() -> str:
    """What the GPU itself has to do for one token of every sequence."""
    _, rows = whole_models()
    found = _sides_by_batch("GPU time of a token, ms (less is better)", rows, "device_ms", SIDES, {})
    return f"{found}\n\n{_measured_again(rows)}"


def _measured_again(rows: Rows) -> str:
    """How far the GPU time of patched models is from that of the later run, which may have another kernel and host."""
    of, later = whole_models("models again")
    before, after = (
        {(row["model"], row["side"], row["batch"]): row["device_ms"] for row in found if row["side"] in COMPARED}
        for found in (rows, later)
    )
    both = before.keys() & after.keys()
    apart = max(abs(after[cell] / before[cell] - 1) for cell in both)
    return (
        f"[Measured again](../benchmarks/results/{SOURCES['models again']}) with kernel {of['kernel']}, {len(both)} of "
        f"the {len(before)} patched cells: all within {100 * apart:.1f} %."
    )


def step() -> str:
    """One gated DeltaNet step, by CUDA graph and as an eager call, beside what was measured in the same run."""
    data = load("step", "speed.json")
    rows, halves = (_steps(data["results"]["rows"], state) for state in ("float32", "bfloat16"))
    others = {"upstream, PyTorch": "faster than Transformers", "upstream, installed kernels": "... with fla"}
    others = {name: words for name, words in others.items() if any(name in row["graph_us"] for row in rows)}
    lines = []
    for row in rows:
        graph, eager = row["graph_us"], row["eager_us"]
        line = [str(row["batch"]), amount(graph["ours"]), *(_over(graph, name) for name in others)]
        line += [times(graph["ours"] / row["floor_us"]), amount(eager["ours"])]
        lines.append([*line, *(_over(eager, name) for name in others), _of_floor(halves, row["batch"])])
    head = ["batch", "graph, us", *others.values(), "of the floor (less is better)", "eager, us", *others.values()]
    head.append("bfloat16 states: graph, us (of their floor)")
    bandwidth = data["results"]["copy_bandwidth"] / 1e12
    of = data["machine"]
    note = f"{machine(of, 'triton')}; {_code(of)}. The copy that sets the floor moves {bandwidth:.2f} TB/s."
    return f"{table(head, lines)}\n\n{note}"


def _steps(rows: Rows, state: str) -> Rows:
    """Those of Qwen3.5-4B's heads and states of a dtype."""
    kind = {"family": "qwen3_5", "HV": 32, "state": state}
    return [row for row in rows if kind.items() <= row.items()]


def _of_floor(rows: Rows, batch: int) -> str:
    found = [(row["graph_us"]["ours"], row["floor_us"]) for row in rows if row["batch"] == batch]
    return "".join(f"{amount(us)} ({times(us / floor)})" for us, floor in found)


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


def chart() -> str:
    """Tokens a second as an SVG: a column a model, a group of bars a batch, a bar a side."""
    of, rows = whole_models()
    columns = []
    for model, cells in _by_side(rows, "tokens_per_s").items():
        batches = sorted(batch for side, batch in cells if side == "eager")
        columns.append((model, [(f"batch {batch}", _multiples(cells, batch)) for batch in batches]))
    return bars("tokens per second, as a multiple of Transformers alone (more is better)", columns, machine(of))


def _multiples(cells: Cells, batch: int) -> dict[str, float]:
    """Of the sides that the chart has a color for."""
    drawn = {side: name for side, name in SIDES.items() if name in COLORS and (side, batch) in cells}
    return {name: cells[side, batch] / cells["eager", batch] for side, name in drawn.items()}
