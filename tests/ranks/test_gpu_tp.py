"""gpu_tp.sh on the CPU: the same code and the same command, tiny models, two gloo processes by torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent.parent / "benchmarks" / "ranks" / "gpu_tp.sh"


@pytest.mark.slow
def test_dry_run(tmp_path: Path) -> None:
    command = ["bash", str(SCRIPT), "--dry-run", "--out", str(tmp_path), "--limit", "400"]
    environment = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=420, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Correctness, float32, three turns, against one process: 8 of 8 passed." in done.stdout
    results = json.loads((tmp_path / "tp.json").read_text())["results"]
    sides = ("unpatched", "off", "on", "cuda_graph=True")
    assert [(row["side"], row["passed"]) for row in results["correctness"]] == [(side, True) for side in sides] * 2
    one_process = json.loads((tmp_path / "map.json").read_text())["results"]
    sides = ("unpatched", "patched", "cuda_graph=True")
    assert [(row["side"], row["passed"]) for row in one_process] == [(side, True) for side in sides] * 2
    counted = [(row["side"], row["collectives"]) for row in results["speed"] if row["ms"] > 0]
    assert counted == [("unpatched", 5), ("off", 5), ("on", 3), ("unpatched", 3), ("off", 3), ("on", 2)]
