"""A comparison as one table for people and one dictionary for programs."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from .parity import MAX_LAYER_DISTANCE
from .result import Comparison, Sample, Service, Setup, Speed
from .statistics import Spread

MIN_REPEATS = 3  # fewer have no spread to speak of


def render(c: Comparison) -> RenderableType:
    """Verdict, speed, text, and what the numbers depend on; 80 columns are enough."""
    parts: list[RenderableType] = [Text(title(c.setup), style="bold"), verdict(c)]
    if c.speed is not None:
        parts.append(speed_table(c.speed, c.setup.sequences))
    return Group(*parts, details(c), sample_panel(c.sample))


def title(s: Setup) -> str:
    """Model and workload in one line."""
    sequences = counted(s.sequences, "sequence")
    return f"{Path(s.model).name}: {s.dtype} on {s.device}, {sequences} of {s.prompt_tokens} + {s.new_tokens} tokens"


def verdict(c: Comparison) -> Text:
    """The two answers that people came for."""
    if c.speed is None:
        lines = ["The patched model is WRONG here; no speed is reported for a wrong result."]
        return Text("\n".join([*lines, *(f"  {failure}" for failure in c.parity.failures)]), style="bold red")
    agreement, ratio = c.parity.greedy, c.speed.ratio
    text = "Same text" if agreement.identical == agreement.sequences else "Same text but for rounding"
    repeats = f"({ratio.min:.2f}x to {ratio.max:.2f}x in {counted(c.setup.repeat, 'repeat')})"
    if c.setup.repeat < MIN_REPEATS or ratio.min <= 1 <= ratio.max:
        return Text.assemble(
            (f"{text}; no clear difference in speed", "bold yellow"), f": {ratio.median:.2f}x {repeats}"
        )
    style = "bold green" if ratio.median > 1 else "bold yellow"
    return Text.assemble((f"{text}; decodes {ratio.median:.2f}x as fast", style), f" {repeats}")


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


def details(c: Comparison) -> Table:
    """What was compared, and what the numbers depend on."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column()
    layer, logits = c.parity.layer_step, c.parity.logits
    grid.add_row("greedy text", greedy(c))
    grid.add_row(
        "layer steps",
        f"at most {layer.relative_rms:.1e} relative RMS apart; {MAX_LAYER_DISTANCE:.0e} allowed "
        f"({layer.steps} compared)",
    )
    grid.add_row(
        "logits, same text",
        f"{logits.relative_rms:.1e} relative RMS apart; {c.parity.max_logits_distance:.0e} allowed; "
        f"{logits.max_abs:.1e} at most, KL {logits.mean_kl:.1e}, "
        f"top-1 agreement {percent(logits.top1_agreement)} ({counted(logits.positions, 'position')})",
    )
    if c.speed is not None:
        grid.add_row("served fast", served(c.speed.service))
    grid.add_row("patched layers", f"{c.setup.gdn_layers} of {c.setup.num_layers}, {c.setup.backend} backend")
    if c.setup.state_dtype is not None:
        grid.add_row("patched states", f"recurrent ones in {c.setup.state_dtype}")
    grid.add_row("upstream ran", c.setup.upstream.summary)
    versions = ", ".join(f"{name} {number}" for name, number in c.setup.versions.items())
    grid.add_row("environment", f"{versions}; CPU threads: {c.setup.threads}")
    return grid


def greedy(c: Comparison) -> str:
    """How much of the free-running text agrees."""
    agreement = c.parity.greedy
    if agreement.first_difference is None:
        return f"identical in all {agreement.sequences} generated sequences"
    return (
        f"identical in {agreement.identical} of {agreement.sequences} generated sequences; "
        f"the first difference is at new token {agreement.first_difference}"
    )


def served(service: Service) -> str:
    """The share of decode steps that the fast path served, and why not the rest."""
    steps = service.fast_steps + sum(service.fallbacks.values())
    reasons = "".join(f"; {count} not: {reason}" for reason, count in sorted(service.fallbacks.items()))
    return f"{percent(service.fast_share)} of {steps} decode layer-steps{reasons}"


def sample_panel(sample: Sample) -> Panel:
    """What was written."""
    text = Text.assemble((sample.prompt, "bold"), sample.upstream)
    if sample.patched == sample.upstream:
        return Panel(text, title="both wrote", title_align="left")
    text.append("\n\nwith the patch:\n", style="dim")
    return Panel(text + Text.assemble((sample.prompt, "bold"), sample.patched), title="text", title_align="left")


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


def size(count: int) -> str:
    """Bytes in a unit of a thousand."""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB"):
        if value >= 1000:
            value, unit = value / 1000, larger
    return f"{number(value)} {unit}"


def as_json(c: Comparison) -> dict[str, Any]:
    """Everything measured, with what follows from it; NaN and infinity, which JSON has not, become null."""
    result = asdict(c)
    result["parity"] |= {"green": not c.parity.failures, "failures": c.parity.failures}
    result["parity"]["max_logits_distance"] = c.parity.max_logits_distance
    if c.speed is not None:
        result["speed"] |= {"ratio": asdict(c.speed.ratio), "fast_share": c.speed.service.fast_share}
    return _finite(result)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
