"""compute-sanitizer over a few small steps: bad addresses (memcheck) and races in shared memory (racecheck)."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys

from benchmarks.checks.gpu_report import write_section

CHECKER = "compute-sanitizer"
TOOLS = ("memcheck", "racecheck")
NO_TOOL = "dry run, without a checker"
LIMIT_S = 100
SUBJECT = "benchmarks.checks.gpu_sanitize_subject"


def start(tool: str, dry_run: bool) -> subprocess.Popen[str]:
    """The subject under one tool; in a dry run alone, to see whether it runs at all."""
    checker = [CHECKER, "--tool", tool, "--error-exitcode", "9", "--kernel-name", "kns=decode"]
    command = [sys.executable, "-m", SUBJECT, "--dry-run"] if dry_run else [*checker, sys.executable, "-m", SUBJECT]
    # With PyTorch's cache of allocations, an address past a tensor's end would be inside another's.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(tool: str, process: subprocess.Popen[str]) -> dict[str, str | int]:
    """What the tool said."""
    try:
        said, _ = process.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        return {"tool": tool, "code": -1, "said": f"not finished in {LIMIT_S} s: no result"}
    lines = [line for line in said.splitlines() if line.strip()]
    return {"tool": tool, "code": process.returncode, "said": "\n".join(lines[-15:])}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="benchmarks/results/latest", help="folder for the JSON")
    parser.add_argument("--dry-run", action="store_true", help="run the subject on the CPU, without a checker")
    arguments = parser.parse_args()
    if not arguments.dry_run and shutil.which(CHECKER) is None:
        print(f"{CHECKER} is not on the PATH: nothing was checked")
        return 0
    started = [(tool, start(tool, arguments.dry_run)) for tool in (TOOLS if not arguments.dry_run else (NO_TOOL,))]
    results = [finish(*one) for one in started]
    write_section(arguments.out, "sanitize", results)
    for result in results:
        print(f"{result['tool']}: exit code {result['code']}: {str(result['said']).splitlines()[-1:]}")
    return 1 if any(result["code"] not in (0, -1) for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
