"""Every figure of README.md and docs/ that was measured, from the committed results: `make figures` writes them.

    python benchmarks/figures.py            # writes the blocks, the chart and the index of the results
    python benchmarks/figures.py --check    # exit code 1 where a file is not what the results say (`make lint`)

A block stands between `<!-- figures: NAME -->` and `<!-- /figures -->`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import deferred_tables, graph_tables, tables
from benchmarks.markdown import table
from benchmarks.tables import RESULTS, SOURCES

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = (
    "README.md",
    *(f"docs/{name}.md" for name in ("performance", "cuda-graph", "tensor-parallel", "deferred-state")),
)
BEGIN, END = "<!-- figures: {} -->", "<!-- /figures -->"
BLOCKS: dict[str, Callable[[], str]] = {
    "models": tables.models,
    "first tokens": tables.first_tokens,
    "device time": tables.device_time,
    "step": tables.step,
    "cpu": tables.cpu,
    "ranks": tables.ranks,
    "states": tables.states,
    "deferred": deferred_tables.models,
    "deferred steps": deferred_tables.steps,
    "deferred gain": deferred_tables.gain,
    "long prompts": graph_tables.long_prompts,
    "graph memory": graph_tables.graph_memory,
    "captured ranks": graph_tables.captured_ranks,
}


def index() -> str:
    """benchmarks/results/README.md: what each folder has."""
    used: dict[str, list[str]] = {}
    for source, folder in SOURCES.items():
        used.setdefault(folder, []).append(source)
    lines = []
    for folder in sorted(path for path in RESULTS.iterdir() if path.is_dir()):
        files = sorted(path.name for path in folder.glob("*.json"))
        about = [_machine(json.loads((folder / name).read_text(encoding="utf-8"))) for name in files]
        facts = []
        for key in ("device", "revision", "kernel"):
            values = dict.fromkeys(_short(key, str(of[key])) for of in about if key in of)
            facts.append(", ".join(values) or ("CPU" if key == "device" else "-"))
        names = ", ".join(f"[{name}]({folder.name}/{name})" for name in files)
        lines.append([folder.name, *facts, names, "yes" if folder.name in used else ""])
    head = ["folder", "device", "revision", "kernel", "files", "quoted in README and docs"]
    return (
        "# Results\n\nWritten by `make figures`; do not edit. A kernel is named by the hash of its source. What was "
        f"expected of each stands beside what came in [the notes](../NOTES.md).\n\n{table(head, lines)}\n"
    )


def _machine(result: dict[str, Any]) -> dict[str, Any]:
    """What a file says of its machine; those of tries say it beside their rows."""
    return result.get("machine") or {key: result[key] for key in ("device",) if key in result}


def _short(key: str, value: str) -> str:
    """Of what a result says of its machine or code, the name alone."""
    return value.partition(",")[0] if key == "device" else value.split()[0].rstrip(",")


def filled(text: str, where: str) -> str:
    """A document with its blocks rewritten. Raises ValueError for a block that is not known, or has no end."""
    head, *parts = text.split("<!-- figures: ")
    for part in parts:
        name, _, rest = part.partition(" -->")
        _, end, after = rest.partition(END)
        if name not in BLOCKS or not end:
            raise ValueError(f"{where}: no block {name!r}, or it has no end")
        head += f"{BEGIN.format(name)}\n\n{BLOCKS[name]()}\n\n{END}{after}"
    return head


def documents() -> dict[Path, str]:
    """Every file that is written, with what it is to hold."""
    texts = {ROOT / name: filled((ROOT / name).read_text(encoding="utf-8"), name) for name in DOCUMENTS}
    return texts | {ROOT / "docs" / "tokens.svg": tables.chart(), RESULTS / "README.md": index()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 where something would change")
    check = parser.parse_args().check
    stale = [
        path for path, text in documents().items() if not path.exists() or path.read_text(encoding="utf-8") != text
    ]
    for path in stale:
        if check:
            print(f"{path} is not what the results say: make figures", file=sys.stderr)
        else:
            path.write_text(documents()[path], encoding="utf-8", newline="\n")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
