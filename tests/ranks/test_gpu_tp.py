"""gpu_tp.sh on the CPU: the same code and the same command, tiny models, two gloo processes by torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent.parent / "benchmarks" / "ranks" / "gpu_tp.sh"


def dry_run(out: Path, *arguments: str) -> str:
    """What it says."""
    command = ["bash", str(SCRIPT), "--dry-run", "--out", str(out), "--limit", "400", *arguments]
    environment = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=420, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_captured_steps(tmp_path: Path) -> None:
    """On the CPU nothing is captured; the checks and the times are made."""
    said = dry_run(tmp_path, "--graph")
    rows = json.loads((tmp_path / "tp-graph.json").read_text())["results"]
    checks = [row["check"] for row in rows if "check" in row]
    assert f"{len(checks)} of {len(checks)} checks passed." in said
    assert checks.count("tokens") == 8
    assert checks[-1] == "a rank alone moves a weight"
    assert [(row["speed"], row["batch"]) for row in rows if "speed" in row] == [
        (side, batch) for batch in (1, 8, 32) for side in ("unpatched", "patched", "captured")
    ]


@pytest.mark.slow
def test_eager_steps(tmp_path: Path) -> None:
    said = dry_run(tmp_path)
    assert "Correctness, float32, three turns, against one process: 6 of 6 passed." in said
    results = json.loads((tmp_path / "tp.json").read_text())["results"]
    sides = ("unpatched", "off", "on")
    assert [(row["side"], row["passed"]) for row in results["correctness"]] == [(side, True) for side in sides] * 2
    one_process = json.loads((tmp_path / "map.json").read_text())["results"]
    sides = ("unpatched", "patched", "cuda_graph=True")
    assert [(row["side"], row["passed"]) for row in one_process] == [(side, True) for side in sides] * 2
    counted = [(row["side"], row["collectives"]) for row in results["speed"] if row["ms"] > 0]
    assert counted == [("unpatched", 5), ("off", 5), ("on", 3), ("unpatched", 3), ("off", 3), ("on", 2)]
