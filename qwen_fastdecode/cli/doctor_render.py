"""A diagnosis as tables; 80 columns are enough."""

from __future__ import annotations

import io
import platform

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .. import __version__
from ..layer.review import State
from ..layer.selftest import STEPS, dtype_name
from .doctor import ABSENT, LIMITS, Diagnosis, Numeric, Seam, Serving
from .machine import cpu_name

GOOD, DOUBTFUL, BAD, PALE = "green", "yellow", "bold red", "dim"
STYLES = {
    State.REVIEWED.value: GOOD,
    State.VERIFIED.value: DOUBTFUL,
    State.REFUSED.value: BAD,
    ABSENT: PALE,
}


def render(found: Diagnosis, console: Console | None = None) -> None:
    """The tables, the entries to add, and the verdict: the last thing that a terminal shows."""
    console = console or Console()
    console.print(Text(f"qwen-fastdecode {__version__}", style="bold"))
    for table in (_versions(found.versions), _seams(found.seams), _serving(found.serving), _numeric(found.numeric)):
        console.print(table)
        console.print()
    for seam in found.seams:
        if seam.toml:  # to be copied: neither wrapped nor coloured
            text = f"Once reviewed, to be added to patches/{seam.family}.toml:\n\n{seam.toml}\n"
            console.print(text, soft_wrap=True, markup=False, highlight=False)
    console.print(_verdict(found))


def render_issue(found: Diagnosis) -> str:
    """The same as a block of Markdown, without colours, wide enough for no line to break."""
    console = Console(file=io.StringIO(), width=120, no_color=True)
    render(found, console)
    text = "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())  # type: ignore[attr-defined]
    machine = f"{platform.platform()}, {cpu_name()}"
    return f"<details><summary>qwen-fastdecode doctor</summary>\n\n```\n{machine}\n{text}\n```\n\n</details>"


def _versions(versions: dict[str, str]) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style=PALE)
    grid.add_column()
    for name, version in versions.items():
        grid.add_row(name, version)
    return grid


def _seams(seams: list[Seam]) -> Table:
    table = _table("The installed code of each family", "family", "state", "distance")
    table.caption = f"distance: of {STEPS} decode steps of a small layer from upstream's own, relative RMS"
    for seam in seams:
        told = seam.detail if seam.state == State.REVIEWED.value else "see below" if seam.detail else ""
        table.add_row(seam.family, Text(seam.state, STYLES[seam.state]), told)
    return table


def _serving(serving: list[Serving]) -> Table:
    table = _table("Backends", "device", "served by", "why not the other")
    for device, name, backend, others in serving:
        table.add_row(f"{device} ({name})", backend, others)
    return table


def _numeric(numeric: list[Numeric]) -> Table:
    table = _table("The step on this machine", "device", "backend", "dtype", "output", "state", "")
    limits = ", ".join(f"{limit:.0e} in {dtype_name(dtype)}" for dtype, limit in LIMITS.items())
    state = f"state {LIMITS[torch.float32]:.0e}"
    table.caption = f"distance from the float64 reference, relative RMS; allowed: output {limits}; {state}"
    for x in numeric:
        verdict = Text("right", GOOD) if x.right else Text("wrong" if x.conv_equal else "wrong conv state", BAD)
        table.add_row(str(x.device), x.backend, dtype_name(x.dtype), f"{x.output:.1e}", f"{x.state:.1e}", verdict)
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _verdict(found: Diagnosis) -> Text:
    title, style = {
        0: ("All well.", f"bold {GOOD}"),
        1: ("Works, with warnings:", f"bold {DOUBTFUL}"),
        2: ("Cannot patch:", BAD),
    }[found.exit_code]
    return Text("\n\n").join([Text(title, style), *(Text(f"- {line}.") for line in found.problems + found.warnings)])
