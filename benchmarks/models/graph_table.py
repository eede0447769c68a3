"""`gpu_graph`'s rows as markdown: what was checked, what was asked for and whether it was met, and the numbers."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.markdown import table

Row = dict[str, Any]
SIDES = ("patched", "cuda_graph")


def markdown(machine: Row, rows: list[Row]) -> str:
    """Everything that a run found."""
    long = [row for row in rows if "ms a token" in row]
    parts = ["## The whole token", "; ".join(f"{name} {value}" for name, value in machine.items())]
    parts += ["### Checked", "\n".join(f"- {line}" for line in _checks(rows))]
    if long:
        parts += ["### ms a token after long prompts", _speeds(long)]
    return "\n\n".join(parts)


def _speeds(rows: list[Row]) -> str:
    head = ("model", "batch", "prompt", *SIDES, "patched / captured", "32 tokens: patched, captured, ms")
    return table(head, [_speed(row) for row in rows])


def _speed(row: Row) -> tuple[str, ...]:
    ms, whole = row["ms a token"], row["ms, 32 tokens"]
    ratio = f"{ms['patched'] / ms['cuda_graph']:.2f}" if {"patched", "cuda_graph"} <= {*ms} else "-"
    both = ", ".join(f"{whole[side]:.0f}" if side in whole else "-" for side in SIDES)
    shown = (f"{ms[side]:.2f}" if side in ms else "-" for side in SIDES)
    return row["model"], str(row["batch"]), str(row["prompt"]), *shown, ratio, both


def _checks(rows: list[Row]) -> Iterator[str]:
    for row in rows:
        if "equal to the bit" in row:
            yield (
                f"{row['model']}, bfloat16, batch {row['batch']}: logits of {row['equal to the bit']} of "
                f"{row['steps']} steps equal to the bit (largest difference {row['largest difference']:.1e})"
            )
        elif "sampled tokens equal" in row:
            yield f"{row['model']}, sampled with a seed, tokens equal: {row['sampled tokens equal']}"
        elif "replay from eager" in row:
            yield (
                f"{row['model']}, batch {row['batch']} x {row['prompt']}: first replay from eager "
                f"{row['replay from eager']:.1e}, eager from itself {row['eager from eager']:.1e}"
            )
        elif "fingerprint us" in row:
            yield f"{row['model']}: asking whether anything changed takes {row['fingerprint us']:.0f} us of the host"
        elif "unpatched" in row:
            found = row["allocated, reserved MiB"]
            yield (
                f"{row['model']}: MiB allocated, reserved before {found[0]}, after ten calls of ten shapes "
                f"{found[-1]}, unpatched {row['unpatched']}"
            )
        elif "steps" in row and "value" in row:
            yield f"captures that fail and those after them: {row['steps']}; memory {row['memory before, after']}"
        elif row.get("errors"):
            yield f"{row['model']}, batch {row['batch']}, prompt {row['prompt']}: {row['errors']}"


def main() -> None:
    """Writes results.md beside the JSON files of a folder, and prints it."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", required=True, help="folder with the JSON files")
    folder = Path(parser.parse_args().out)
    sections = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    text = markdown(sections[0]["machine"], [row for section in sections for row in section["results"]])
    (folder / "results.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
