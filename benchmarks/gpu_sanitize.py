"""compute-sanitizer over a few small steps: bad addresses (memcheck) and races in shared memory (racecheck)."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys

from gpu_report import write_section

TOOLS = ("memcheck", "racecheck")
LIMIT_S = 60  # a tool
SUBJECT = "benchmarks/gpu_sanitize_subject.py"


def run(tool: str, dry_run: bool) -> dict[str, str | int]:
    """What one tool said of the subject; in a dry run, whether the subject runs at all."""
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--kernel-regex", "kns=decode"]
    command = [sys.executable, SUBJECT, "--dry-run"] if dry_run else [*command, sys.executable, SUBJECT]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        return {"tool": tool, "code": -1, "said": f"not finished in {LIMIT_S} s: no result"}
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    return {"tool": tool, "code": done.returncode, "said": "\n".join(lines[-15:])}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="benchmarks/results/latest", help="folder for the JSON")
    parser.add_argument("--dry-run", action="store_true", help="run the subject on the CPU, without a checker")
    arguments = parser.parse_args()
    if not arguments.dry_run and shutil.which("compute-sanitizer") is None:
        print("compute-sanitizer is not on the PATH: nothing was checked")
        return 0
    results = [run(tool, arguments.dry_run) for tool in TOOLS]
    write_section(arguments.out, "sanitize", results)
    for result in results:
        print(f"{result['tool']}: exit code {result['code']}: {str(result['said']).splitlines()[-1:]}")
    return 1 if any(result["code"] not in (0, -1) for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
