"""Where results go: one JSON a section, then all of them with the machine's description as one JSON and one table."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import track

Item = TypeVar("Item")
OURS = ("torch", "triton", "transformers")
PEERS = ("flash-linear-attention", "causal-conv1d", "vllm", "sglang", "flashinfer-python")


def progress(items: Iterable[Item], description: str, total: int) -> Iterator[Item]:
    """`items` with a progress bar on stderr."""
    yield from track(items, description, total=total, console=Console(stderr=True))


def write_section(folder: str, name: str, data: Any) -> None:
    """One section's results as `folder`/`name`.json."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n")


def shown(tile: Iterable[int]) -> str:
    """A tile in few letters: block_v/num_warps/num_stages/max_registers."""
    return "/".join(map(str, tile))


def machine() -> dict[str, str]:
    """Device, driver, versions, revision: what a number is worth nothing without."""
    facts = {"python": platform.python_version(), "processor": _processor()}
    for package in OURS + PEERS:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "not installed"
    facts["revision"] = _command("git", "rev-parse", "HEAD") or "unknown"
    facts["date"] = _command("date", "-u", "+%Y-%m-%d %H:%M UTC")
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts["device"] = f"{properties.name}, {properties.multi_processor_count} multiprocessors"
        facts["memory"] = f"{properties.total_memory / 2**30:.0f} GiB, L2 {properties.L2_cache_size / 2**20:.0f} MiB"
        facts["cuda"] = torch.version.cuda or "none"
        facts["driver"] = _command("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return facts


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _command(*words: str) -> str:
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def main() -> None:
    """Joins the sections of a folder into results.json and results.md, and prints the table."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", required=True, help="folder with the sections' JSON files")
    parser.add_argument("--dry-run", action="store_true", help="accepted, and changes nothing")
    folder = Path(parser.parse_args().out)
    paths = [path for path in sorted(folder.glob("*.json")) if path.stem != "results"]
    sections = {path.stem: json.loads(path.read_text()) for path in paths}
    facts = machine()
    write_section(str(folder), "results", {"machine": facts, **sections})


if __name__ == "__main__":
    main()
