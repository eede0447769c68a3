"""A comparison as one table for people and one dictionary for programs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ... import __version__
from ..arguments import Exit
from .parity import Parity, apart
from .result import (
    COMPILED,
    CUDA_GRAPH,
    MIN_REPEATS,
    PATCHED,
    UPSTREAM,
    Beside,
    Comparison,
    Sample,
    Service,
    Setup,
    Speed,
)
from .statistics import Spread

LABELS = {
    UPSTREAM: "Transformers",
    PATCHED: "with the patch",
    CUDA_GRAPH: "... cuda_graph=True",
    COMPILED: "Transformers compiled",
}
SCHEMA_VERSION = 1  # of the JSON; counts up when a field is removed or means something else


def render(c: Comparison) -> RenderableType:
    """Verdict, speed, text, and what the numbers depend on; 80 columns are enough."""
    parts: list[RenderableType] = [Text(title(c.setup), style="bold"), verdict(c)]
    if c.speed is not None:
        parts.append(speed_table(c.speed, c.setup.sequences))
        if c.starts:
            parts.append(sides_table(c, c.speed))
    return Group(*parts, details(c), sample_panel(c.sample))


def title(s: Setup) -> str:
    """Model and workload in one line."""
    sequences = counted(s.sequences, "sequence")
    return f"{Path(s.model).name}: {s.dtype} on {s.device}, {sequences} of {s.prompt_tokens} + {s.new_tokens} tokens"


def verdict(c: Comparison) -> Text:
    """The answers that people came for, in one or two lines."""
    text, style = headline(c)
    return Text(text, style=style)


def headline(c: Comparison) -> tuple[str, str]:
    """The verdict and its style."""
    if c.speed is None:
        lines = ["The patched model is WRONG here; no speed is reported for a wrong result."]
        return "\n".join([*lines, *(f"  {failure}" for failure in c.failures)]), "bold red"
    if c.exit is Exit.SWITCHED_OFF:
        return "Switched off: QWEN_FASTDECODE=0 is set, so both sides ran Transformers' own code.", "bold yellow"
    if c.exit is Exit.NOT_SERVED:
        why = ", ".join(sorted(c.speed.service.fallbacks)) or "no layer decoded a token"
        return f"Nothing was served fast: both sides ran Transformers' own code ({why}).", "bold yellow"
    ratio, text = c.speed.ratio, quality(c.parity)
    repeats = f"{ratio.min:.2f}x to {ratio.max:.2f}x in {counted(c.setup.repeat, 'repeat')}"
    share = c.speed.service.fast_share
    part = "" if share == 1 else f"\nOnly {percent(share)} of the decode steps were served fast."
    if c.exit is Exit.TOO_FEW_RUNS:
        few = counted(c.setup.repeat, "repeat")
        return f"{text}.\nNo word on speed: {few} cannot show a spread (--repeat {MIN_REPEATS} or more).", "bold yellow"
    if ratio.min <= 1 <= ratio.max:
        return f"{text}; no clear difference in speed: {ratio.median:.2f}x ({repeats}){part}", "bold yellow"
    style = "bold green" if ratio.median > 1 and share == 1 else "bold yellow"
    return f"{text}; decodes {ratio.median:.2f}x as fast ({repeats}){part}", style


def quality(parity: Parity) -> str:
    """Whether the texts are the same, and if not, how often either side's is the one of float32."""
    agreement, exact = parity.greedy, parity.float32
    if agreement.first_difference is None:
        return "Same text"
    same = f"{agreement.identical} of {counted(agreement.prompts, 'text')} identical to upstream's"
    if exact is None:
        return f"Layer steps as right as upstream's, other rounding: {same}"
    return (
        f"Same quality, other rounding: {same}, {exact.patched_identical} of {agreement.prompts} to float32's "
        f"(upstream: {exact.upstream_identical} of {agreement.prompts})"
    )


def speed_table(speed: Speed, sequences: int) -> Table:
    """Both sides, each number with its spread."""
    before, after = speed.upstream, speed.patched
    table = Table(caption="median (lowest to highest)", caption_justify="left")
    table.add_column("")
    table.add_column("Transformers", justify="right")
    table.add_column("with the patch", justify="right")
    step = "decode, ms per token" if sequences == 1 else f"decode, ms per {sequences} tokens"
    table.add_row(step, spread(before.step_ms), spread(after.step_ms), style="bold")
    table.add_row("tokens per second", spread(before.tokens_per_second), spread(after.tokens_per_second))
    table.add_row("prefill, ms (not patched)", spread(before.prefill_ms), spread(after.prefill_ms))
    table.add_row("extra memory in a step", size(before.peak_step_bytes), size(after.peak_step_bytes))
    return table


def sides_table(c: Comparison, speed: Speed) -> Table:
    """All sides, with what a program waits for when it begins."""
    caption = "seconds to the 1st and 100th token of a side's first call, patching and compiling included"
    table = Table(caption=caption, caption_justify="left")
    for name in ("", "ms a token", "tokens/s", "times", "1st, s", "100th, s"):
        table.add_column(name, justify="right" if name else "left")
    beside = {side: found.speed for side, found in c.beside.items()}
    for side, found in {UPSTREAM: speed.upstream, PATCHED: speed.patched, **beside}.items():
        if found is not None and side in c.starts:
            start, times = c.starts[side], speed.upstream.step_ms.median / found.step_ms.median
            cells = number(found.step_ms.median), number(found.tokens_per_second.median), f"{times:.2f}x"
            table.add_row(LABELS[side], *cells, f"{start.first_s:.2f}", f"{start.hundredth_s:.2f}")
    return table


def why_not(found: Beside) -> str:
    """Of a side beside the two: why it has no speed."""
    return found.missing or "WRONG, no speed: " + "; ".join(found.failures)


def details(c: Comparison) -> Table:
    """What was compared, and what the numbers depend on."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column()
    layer, logits, exact = c.parity.layer_step, c.parity.logits, c.parity.float32
    grid.add_row("greedy text", greedy(c))
    grid.add_row(
        "layer steps",
        f"at most {apart(layer.relative_rms)} from upstream's; {apart(c.parity.max_layer_distance)} allowed "
        f"({layer.steps} compared)",
    )
    if layer.patched_from_float32 is not None and layer.upstream_from_float32 is not None:
        grid.add_row("  from float32", noise(layer.patched_from_float32, layer.upstream_from_float32))
    grid.add_row(
        "logits, same text",
        f"{apart(logits.relative_rms)} from upstream's, {apart(logits.max_abs)} at most; KL {apart(logits.mean_kl)}; "
        f"top-1 agreement {percent(logits.top1_agreement)} ({counted(logits.positions, 'position')})",
    )
    if exact is not None:
        grid.add_row("  from float32", noise(exact.patched_logits, exact.upstream_logits))
    elif c.parity.float32_missing:
        grid.add_row("  from float32", f"not measured: {c.parity.float32_missing}")
    if c.speed is not None:
        grid.add_row("served fast", served(c.speed.service))
        for side, found in c.beside.items():
            if found.speed is None:
                grid.add_row(side.replace("_", " "), why_not(found))
    grid.add_row("patched layers", f"{c.setup.gdn_layers} of {c.setup.num_layers}, {c.setup.backend} backend")
    if c.setup.state_dtype is not None:
        grid.add_row("patched states", f"recurrent ones in {c.setup.state_dtype}")
    grid.add_row("upstream ran", c.setup.upstream.summary)
    versions = ", ".join(f"{name} {number}" for name, number in c.setup.versions.items())
    grid.add_row("environment", f"{versions}; {counted(c.setup.threads, 'thread')} of {c.setup.cpu}")
    return grid


def noise(patched: float, upstream: float) -> str:
    """Distances of both sides from float32: which rounding is nearer."""
    return f"{apart(patched)}; upstream's own distance is {apart(upstream)}"


def greedy(c: Comparison) -> str:
    """How much of the free-running text agrees."""
    agreement = c.parity.greedy
    if agreement.first_difference is None:
        return f"identical after {counted(agreement.prompts, 'prompt')}, in every run"
    return (
        f"identical after {agreement.identical} of {counted(agreement.prompts, 'prompt')}; the first difference is at "
        f"new token {agreement.first_difference}"
    )


def served(service: Service) -> str:
    """The share of decode steps that the fast path served, and why not the rest."""
    steps = service.fast_steps + sum(service.fallbacks.values())
    reasons = "".join(f"; {count} not: {reason}" for reason, count in sorted(service.fallbacks.items()))
    return f"{percent(service.fast_share)} of {steps} decode layer-steps{reasons}"


def sample_panel(sample: Sample) -> Panel:
    """What was written; up to where they part, once."""
    text = Text.assemble((sample.prompt, "bold"), sample.upstream)
    if sample.patched == sample.upstream:
        return Panel(text, title="both wrote", title_align="left")
    same = common_beginning(sample.upstream, sample.patched)
    text = Text.assemble((sample.prompt, "bold"), same, ("\n\n... Transformers: ", "dim"), sample.upstream[len(same) :])
    text.append("\n\n... with the patch: ", style="dim").append(sample.patched[len(same) :], style="not dim")
    if sample.float32 is not None:
        theirs = {sample.upstream: "Transformers'", sample.patched: "the patched one"}
        text.append("\n\n... in float32: ", style="dim")
        rest = sample.float32.removeprefix(same) if sample.float32.startswith(same) else sample.float32
        text.append(f"as {theirs[sample.float32]}" if sample.float32 in theirs else rest, style="not dim")
    return Panel(text, title="the first text that differs", title_align="left")


def common_beginning(*texts: str) -> str:
    """Of several texts, as far as they are the same."""
    shared = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*texts, strict=False))
    return "".join(letters[0] for letters in shared)


def counted(count: int, noun: str) -> str:
    """A number of things."""
    return f"{count} {noun}" + ("s" if count != 1 else "")


def spread(s: Spread) -> str:
    """ "median (lowest to highest)"."""
    return f"{number(s.median)} ({number(s.min)} to {number(s.max)})"


def number(value: float) -> str:
    """Three digits that matter."""
    return f"{value:.{max(0, 2 - int(math.log10(value)))}f}" if value >= 1 else f"{value:.2g}"


def percent(share: float) -> str:
    """Rounded down: 100 % is all."""
    return f"{math.floor(1000 * share) / 10:g} %"


def size(count: int | None) -> str:
    """Bytes in a unit of a thousand."""
    if count is None:
        return "not measured"
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB"):
        if value >= 1000:
            value, unit = value / 1000, larger
    return f"{number(value)} {unit}"


def as_json(c: Comparison, command: Sequence[str] = (), prompts: Sequence[str] = ()) -> dict[str, Any]:
    """Everything measured, with what follows from it (docs/compare.md); NaN and infinity become null."""
    about: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "package_version": __version__,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": list(command),
        "prompts": list(prompts),
        "exit_code": int(c.exit),
        "outcome": c.exit.name.lower().replace("_", " "),
        "headline": headline(c)[0],
    }
    result = about | asdict(c)
    result["parity"] |= {"green": not c.parity.failures, "failures": c.parity.failures}
    result["parity"]["max_layer_distance"] = c.parity.max_layer_distance
    if c.speed is not None:
        result["speed"] |= {"ratio": asdict(c.speed.ratio), "fast_share": c.speed.service.fast_share}
    return _finite(result)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
