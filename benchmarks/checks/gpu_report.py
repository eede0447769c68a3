"""Where results go: a JSON a section, with the description of the machine, then all of them as one table."""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import track

from benchmarks.op.gpu_table import markdown
from qwen_fastdecode.ops.triton import kernel as triton_kernel

Item = TypeVar("Item")
OURS = ("torch", "triton", "transformers")
SAME = ("device", "torch", "triton", "transformers", "flash-linear-attention", "kernel")  # in all rows of a file
# By their hash, as a copy of the tree may come without its history.
KERNELS = [
    Path(triton_kernel.__file__).with_name(name)
    for name in ("kernel.py", "value_head.py", "deferred.py", "parts.py", "barrier.py", "tiles.toml")
]
PEERS = ("flash-linear-attention", "causal-conv1d", "vllm", "sglang", "flashinfer-python")


def progress(items: Iterable[Item], description: str, total: int) -> Iterator[Item]:
    """`items` with a progress bar on stderr."""
    yield from track(items, description, total=total, console=Console(stderr=True))


def write_section(folder: str, name: str, results: Any) -> None:
    """One section's results, with the machine that they are of, as `folder`/`name`.json."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / f"{name}.json").write_text(json.dumps({"machine": machine(), "results": results}, indent=1) + "\n")


class Notebook:
    """Takes down rows: each is printed, and written as a section with all before it, so that a run may be cut short."""

    def __init__(self, folder: str, name: str):
        self.rows: list[dict[str, Any]] = []
        self._folder, self._name = folder, name
        self._begun = time.perf_counter()

    def note(self, row: dict[str, Any]) -> None:
        self.rows.append({**row, "at s": round(time.perf_counter() - self._begun, 1)})
        print(self.rows[-1], flush=True)
        write_section(self._folder, self._name, self.rows)


class KeptRows:
    """Rows of models, batches and sides in their file. Those that it holds are kept, so that a run goes on where the
    last one was cut off; a row takes the place of the one that it measures again.

    Raises ValueError where the file is of another machine or other software.
    """

    def __init__(self, folder: str, name: str, done: Callable[[dict[str, Any]], bool]):
        self._folder, self._name, self._done = folder, name, done
        path = Path(folder) / f"{name}.json"
        earlier = json.loads(path.read_text()) if path.exists() else {"machine": machine(), "results": []}
        for fact in SAME:
            if earlier["machine"].get(fact) != machine().get(fact):
                raise ValueError(f"{path} is of {fact} {earlier['machine'].get(fact)}, not {machine().get(fact)}")
        self.rows: list[dict[str, Any]] = earlier["results"]

    def lacks(self, model: str, batch: int, side: str) -> bool:
        """Whether it is still to be measured: it is not there, ended in an error, or is not `done`."""
        row = next((row for row in self.rows if _key(row) == (model, batch, side)), None)
        return row is None or "error" in row or not self._done(row)

    def add(self, row: dict[str, Any]) -> None:
        """Writes the file."""
        self.rows = [*(other for other in self.rows if _key(other) != _key(row)), row]
        write_section(self._folder, self._name, self.rows)


def _key(row: dict[str, Any]) -> tuple[str, int, str]:
    return row["model"], row["batch"], row["side"]


@cache
def machine() -> dict[str, str]:
    """Device, driver, versions, revision: what a number is worth nothing without."""
    facts = {"python": platform.python_version(), "processor": _processor()}
    for package in OURS + PEERS:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "not installed"
    facts["revision"] = _command("git", "describe", "--always", "--dirty") or "unknown"
    facts["kernel"] = hashlib.sha256(b"".join(map(Path.read_bytes, KERNELS))).hexdigest()[:12]
    facts["date"] = _command("date", "-u", "+%Y-%m-%d")
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
    """Joins the sections of a folder into one table, results.md, and prints it."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", required=True, help="folder with the sections' JSON files")
    folder = Path(parser.parse_args().out)
    sections = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    machines = {json.dumps(section["machine"]): section["machine"] for section in sections.values()}
    text = markdown(list(machines.values()), {name: section["results"] for name, section in sections.items()})
    (folder / "results.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
