"""The latency of every token on both sides, and how often the patched one was how much faster."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from .render import title
from .result import Comparison, Side, Speed

_COLORS = {"Transformers": "#b35806", "with the patch": "#1f6fb4"}
WIDE = 5  # times from the lowest ratio to the highest: steps of equal size would stand upon one another at the end


def draw(comparison: Comparison, path: Path) -> None:
    """Writes the picture of a comparison that has a speed."""
    speed, setup = comparison.speed, comparison.setup
    assert speed is not None
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)  # no window system is asked
    latency, ratios = figure.subplots(1, 2, width_ratios=(3, 2))
    draw_latency(latency, speed)
    draw_ratios(ratios, speed)
    figure.suptitle(f"{title(setup)}; upstream ran: {setup.upstream.summary}", fontsize=10)
    figure.savefig(path, dpi=130)


def draw_latency(axes: Any, speed: Speed) -> None:
    """Median over the repeats, and a band from the fastest to the slowest of them."""
    sides: dict[str, Side] = {"Transformers": speed.upstream, "with the patch": speed.patched}
    for label, side in sides.items():
        steps = list(zip(*side.step_ms_of_runs, strict=True))  # one tuple of repeats a step
        positions = range(2, len(steps) + 2)  # the first new token is the prefill's
        axes.fill_between(positions, list(map(min, steps)), list(map(max, steps)), alpha=0.2, color=_COLORS[label])
        axes.plot(positions, list(map(statistics.median, steps)), label=label, color=_COLORS[label], marker=".")
    axes.set(
        xlabel="new token",
        ylabel="ms per step",
        ylim=(0, None),
        title="latency of each decode step (line: median, band: all repeats)",
    )
    axes.legend()


def draw_ratios(axes: Any, speed: Speed) -> None:
    """All pairs of equal steps, and the ratio of medians that is reported."""
    ratio, lowest, highest = speed.ratio, 0.99 * min(speed.step_ratios), 1.01 * max(speed.step_ratios)
    axes.set_xscale("log")  # twice as fast and half as fast lie equally far from 1
    bins = [lowest * (highest / lowest) ** (i / 30) for i in range(31)]
    axes.hist(speed.step_ratios, bins=bins, color="#999999", label="each step of each repeat")
    axes.axvline(1, color="black", linestyle=":", label="equally fast")
    axes.axvspan(ratio.min, ratio.max, alpha=0.2, color=_COLORS["with the patch"])
    label = f"repeats: {ratio.median:.2f}x ({ratio.min:.2f}x to {ratio.max:.2f}x)"
    axes.axvline(ratio.median, color=_COLORS["with the patch"], label=label)
    wide = max(1, highest) > WIDE * min(1, lowest)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if wide else MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter("{x:g}x")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="Transformers' time / patched time", ylabel="steps", title="ratio (above 1: the patch is faster)")
    axes.margins(y=0.35)  # room for the legend
    axes.legend(loc="upper right", fontsize=8)
