"""The sections' results as markdown: what holds, what was asked for and whether it was met, and the numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.markdown import table
from qwen_fastdecode.ops.triton.tiles import Tile

OURS, PYTORCH, INSTALLED = "ours", "upstream, PyTorch", "upstream, installed kernels"
KNOWN = (OURS, PYTORCH, INSTALLED)
Row = dict[str, Any]

CAPTION = """Microseconds a layer, from the outputs of the input projections to the input of the output projection, bf16
activations, 16 key heads, heads of 128. Graph: replay of a CUDA graph of one step of every layer in turn, the states
of all layers together at least four times the last cache. Eager: wall clock, one call a layer. Floor: the recurrent
state read once and written once at the bandwidth of a device-to-device copy in the same run. "all bytes" counts the
convolution's taps, the projections' outputs and the output as well. "in place": one elementwise operation on the same
states, in place, in a graph as well: the floor and what it costs to launch anything. Every timed result was checked
against float64. "PyTorch" is upstream's own code without kernels of other packages, "installed" with those it found;
neither is compiled."""


def markdown(machines: Sequence[dict[str, str]], sections: dict[str, Any]) -> str:
    """Everything; a line a machine, or rather a run: sections of one folder may come from several."""
    lines = ["; ".join(f"{name} {value}" for name, value in machine.items()) for machine in machines]
    parts = ["## GPU results", *lines, *_checks(sections)]
    if "tiles" in sections:
        parts += ["### Tiles", best_tiles(sections["tiles"]["rows"])]
    if "speed" in sections:
        speed = sections["speed"]
        parts += ["### Host time", host(speed["host_us"])]
        parts += ["### Speed", CAPTION, f"Copy: {speed['copy_bandwidth'] / 1e12:.2f} TB/s."]
        parts += [
            speeds(speed["rows"]),
            peers(speed["rows"]),
            *_refused(speed["rows"]),
            "### Asked for",
            targets(speed),
        ]
    if "host" in sections:
        parts += ["### Host time, by itself", host(sections["host"])]
    for model in ("dense", "experts"):
        if said := sections.get(f"tokens-{model}"):
            parts.append("\n".join(_said(said)))
        if rows := sections.get(f"generate-{model}"):
            parts += ["### Whole models", generation(rows)]
    return "\n\n".join(parts)


def _checks(sections: dict[str, Any]) -> Iterable[str]:
    if "correctness" in sections:
        cases = sections["correctness"]
        passed = [case for case in cases if case["passed"]]
        worst = {name: max((case.get(name, 0.0) for case in passed), default=0.0) for name in ("out", "state")}
        yield (
            f"Correctness: {len(passed)} of {len(cases)} cases; worst head's relative error in what passed: "
            f"output {worst['out']:.1e}, state {worst['state']:.1e}."
        )
        yield from (f"- FAILED {case['name']}: {case['error']}" for case in cases if not case["passed"])
    for row in sections.get("ways", []):
        said = row.get("error") or f"tokens equal: {row['tokens_equal']}"
        steps = f"{row.get('fast_steps', 0)} of {row.get('expected_steps', '?')} eager layer steps fast"
        yield f"- {'' if row['passed'] else 'FAILED '}{row['check']}: {steps}; {said}"
    for result in sections.get("sanitize", []):
        verdict = {0: "found nothing", -1: "did not finish"}.get(result["code"], "FOUND SOMETHING OR FAILED")
        yield f"compute-sanitizer {result['tool']}: {verdict}."


def host(times_us: dict[str, float]) -> str:
    return table(("one eager call, batch 1, HV 32", "us"), _rounded(times_us))


def best_tiles(rows: Sequence[Row]) -> str:
    """The table's tile and the three fastest of each workload."""
    found = []
    for key in dict.fromkeys((row["HV"], row["state"], row["batch"]) for row in rows):
        mine = [row for row in rows if (row["HV"], row["state"], row["batch"]) == key and "us" in row]
        best = sorted(mine, key=lambda row: (row["tile"] != shown(None), row["us"]))[:4]
        found.append((*key, *(f"{row['tile']}: {row['us']:.1f} ({row['of_floor']:.2f}x)" for row in best)))
    return table(("HV", "state", "batch", "us (of floor)", "best candidate", "second", "third"), found)


def speeds(rows: Sequence[Row]) -> str:
    label = ("family", "state", "HV", "batch", "layers", "floor", "in place", "graph: ours", "of floor", "of all bytes")
    return table(
        (*label, "PyTorch", "installed", "eager: ours", "PyTorch", "installed"), (_speed_row(row) for row in rows)
    )


def _speed_row(row: Row) -> tuple[Any, ...]:
    graph, eager, floor = row["graph_us"], row["eager_us"], row["floor_us"]
    ours = graph.get(OURS)
    all_bytes = floor * row["bytes"] / (2 * row["state_bytes"])
    ratios = ("", "") if ours is None else (f"{ours / floor:.2f}", f"{ours / all_bytes:.2f}")
    label = row["family"], row["state"], row["HV"], row["batch"], row["layers"]
    times = [_us(times.get(name)) for times in (graph, eager) for name in (OURS, PYTORCH, INSTALLED)]
    return *label, _us(floor), _us(row.get("in_place_us")), times[0], *ratios, *times[1:]


def peers(rows: Sequence[Row]) -> str:
    """Other projects' kernels, by graph replay, where any ran."""
    others = [(row, name, us) for row in rows for name, us in row["graph_us"].items() if name not in KNOWN]
    if not others:
        return "No kernels of vllm or sglang were there to compare with."
    found = (
        (name, row["HV"], row["state"], row["batch"], _us(us), _us(row["graph_us"].get(OURS)))
        for row, name, us in others
    )
    return table(("other kernels", "HV", "state", "batch", "graph", "graph: ours"), found)


def _refused(rows: Sequence[Row]) -> Iterable[str]:
    for row in rows:
        for name, why in row["no_speed"].items():
            yield f"- no speed for {name}, HV {row['HV']}, batch {row['batch']}, {row['state']} state: {why}"


def targets(speed: dict[str, Any]) -> str:
    """What was asked for beside what was measured."""
    rows = [
        row for row in speed["rows"] if row["HV"] == 32 and row["family"] == "qwen3_5" and row["state"] == "float32"
    ]
    floors = [row["graph_us"][OURS] / row["floor_us"] for row in rows if row["batch"] >= 64 and OURS in row["graph_us"]]
    ratios = {
        "of the floor, HV 32, batch 64 and above, at most 1.10": max(floors, default=None),
        "times PyTorch, pure decode at batch 256 (graph)": _ratio(rows, 256, "graph_us", PYTORCH),
        "times installed, pure decode at batch 256 (graph), at least 2": _ratio(rows, 256, "graph_us", INSTALLED),
        "times PyTorch, batch 1, eager": _ratio(rows, 1, "eager_us", PYTORCH),
        "times installed, batch 1, eager, at least 5": _ratio(rows, 1, "eager_us", INSTALLED),
        "us of host time a call, at most 30": speed["host_us"].get("a backend (what the patch calls)"),
    }
    kernels = sorted({name for row in rows for name in row["installed_kernels"]})
    runs = f"Installed kernels that upstream runs: {', '.join(kernels) or 'none'}."
    return "\n\n".join((table(("asked for", "measured"), _rounded(ratios)), runs))


def _ratio(rows: Sequence[Row], batch: int, kind: str, baseline: str) -> float | None:
    for row in rows:
        if row["batch"] == batch and OURS in row[kind] and baseline in row[kind]:
            return row[kind][baseline] / row[kind][OURS]
    return None


def generation(rows: Sequence[Row]) -> str:
    """Whole models: speed, when the first tokens are there, the device's own time, the distance from upstream."""
    head = ("model", "batch", "side", "tokens/s", "ms a token", "times eager", "first token, s", "hundredth, s")
    ordered = sorted(rows, key=lambda row: (row["model"], row["batch"]))
    alone = {(row["model"], row["batch"]): row for row in rows if row["side"] == "eager"}
    return table((*head, "device ms", "logits"), (_generation_row(row, alone) for row in ordered))


def _generation_row(row: Row, alone: dict[tuple[str, int], Row]) -> tuple[Any, ...]:
    label = row["model"], row["batch"], row["side"]
    if "error" in row:
        return *label, row["error"].replace("\n", " "), *["-"] * 6
    eager = alone.get((row["model"], row["batch"]), {}).get("ms_a_token")
    ratio = "-" if eager is None else f"{eager / row['ms_a_token']:.2f}"
    speed = f"{row['tokens_per_s']:.0f}", f"{row['ms_a_token']:.2f}", ratio
    device = "-" if row["device_ms"] is None else f"{row['device_ms']:.2f}"
    return *label, *speed, f"{row['first_s']:.2f}", f"{row['hundredth_s']:.2f}", device, f"{row['logits']:.1e}"


def _said(rows: Sequence[Row]) -> Iterable[str]:
    for row in rows:
        said = row.get("error") or f"{row['steps']} tokens equal: {row['equal']}; logits {row['logits']:.1e}"
        verdict = "" if row.get("right") else "NOT RIGHT "
        yield f"- {verdict}float32, {row['model']}, {row['side']}, batch {row['batch']}: {said}"


def shown(tile: Iterable[int] | None) -> str:
    """A tile in few letters, block_v/num_warps/num_stages/max_registers, and clustered; None is the tile table's."""
    if tile is None:
        return "table's"
    *numbers, clustered = Tile(*tile)
    return "/".join(map(str, numbers)) + " clustered" * clustered


def _rounded(values: dict[str, float | None]) -> Iterable[tuple[str, str]]:
    return ((name, "-" if value is None else f"{value:.2f}") for name, value in values.items())


def _us(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}" if value < 1000 else f"{value:.0f}"
