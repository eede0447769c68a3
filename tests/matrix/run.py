"""Runs the tests against many releases of Transformers, each in its own environment, and writes the table.

`make matrix` runs every release and all the tests below, and writes docs/compatibility.md; `--changed` is for CI.
A release on the registry that is newer than those listed is run as well and shown, but does not decide the exit code.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import tomllib

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for benchmarks
from environments import newest_release, python_of
from packaging.version import Version
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from table import Result, read_result, render, summary

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
TABLE = ROOT / "docs" / "compatibility.md"
BUILD = ROOT / "build" / "matrix"
THIN = ["tests/matrix/test_release.py", "tests/patching/test_layer_step.py"]
ALL = [
    *THIN,
    "tests/generating/test_generate.py",
    "tests/patching/test_patch.py",
    "tests/patching/test_arguments.py",
    "tests/patching/test_caches.py",
]
LIMIT = 1800  # seconds for one release's tests


def run_release(release: str, tests: list[str], progress: Progress) -> Result:
    """Makes the environment and runs the tests; what goes wrong outside of a test is in `trouble`."""
    line = progress.add_task(f"{release}: environment", total=None)
    report = BUILD / f"{release}.xml"
    report.unlink(missing_ok=True)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    try:
        python = python_of(release, BUILD / "environments")
        progress.update(line, description=f"{release}: tests")
        options = ["-n", "0", "-p", "no:cacheprovider", "-o", "junit_family=xunit1", f"--junitxml={report}"]
        with (BUILD / f"{release}.log").open("w", encoding="utf-8") as log:
            command = [str(python), "-m", "pytest", *options, *tests]
            subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=log, timeout=LIMIT, check=False)
    except subprocess.CalledProcessError as error:
        return Result(release, trouble=f"pip could not install it: {error.stderr.strip()[-300:]}")
    except subprocess.TimeoutExpired:
        return Result(release, trouble=f"the tests took more than {LIMIT} s")
    finally:
        progress.remove_task(line)
    if not report.exists():
        return Result(release, trouble=f"pytest wrote no report: see {BUILD.relative_to(ROOT) / release}.log")
    return read_result(release, report, _features())


def _features() -> list[str]:
    """The names of the features, in order, as written in the test file: this process has no need of torch."""
    text = (HERE / "test_release.py").read_text(encoding="utf-8")
    block = text.partition("FEATURES = {")[2].partition("\n}")[0]
    return [line.split('"')[1] for line in block.splitlines() if line.strip().startswith('"')]


def run_all(releases: list[str], tests: list[str], jobs: int, console: Console) -> list[Result]:
    """Runs the releases side by side; the results are in the order of `releases`."""
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    results = {}
    with Progress(*columns, console=console) as progress, ThreadPoolExecutor(jobs) as pool:
        total = progress.add_task("releases", total=len(releases))
        running = {pool.submit(run_release, release, tests, progress): release for release in releases}
        for done in as_completed(running):
            result = results[running[done]] = done.result()
            state = "[green]ok[/]" if result.fine else "[red]fails[/]"
            counts = f"{result.passed} passed, {len(result.failed)} failed"
            progress.console.print(f"Transformers {result.release}: {counts} {state}")
            progress.advance(total)
    return [results[release] for release in releases]


def main() -> int:
    """Returns 0 if every listed release is fine."""
    listed = tomllib.loads((HERE / "releases.toml").read_text(encoding="utf-8"))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--changed", action="store_true", help="the releases and the tests of CI; writes no table")
    parser.add_argument("--releases", nargs="+", default=None, help="only these; writes no table")
    parser.add_argument("--thin", action="store_true", help="only the tests of the table's cells and of single steps")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="releases side by side (default: %(default)s)")
    options = parser.parse_args()
    console = Console()
    BUILD.mkdir(parents=True, exist_ok=True)

    releases = options.releases or listed["changed" if options.changed else "all"]
    newest = newest_release()
    unlisted = [newest] if newest is not None and Version(newest) > max(map(Version, listed["all"])) else []
    if unlisted:
        console.print(f"[yellow]Transformers {newest} is newer than releases.toml: run, shown, not decisive[/]")
    thin = options.thin or options.changed
    results = run_all([*releases, *unlisted], THIN if thin else ALL, options.jobs, console)
    if options.releases is None and not options.changed:
        TABLE.parent.mkdir(exist_ok=True)
        how = "make matrix" if not thin else "python tests/matrix/run.py --thin"
        TABLE.write_text(render(results, _features(), how), encoding="utf-8")
        console.print(f"wrote {TABLE.relative_to(ROOT)}")
    if not all(result.fine for result in results):
        console.print(summary(results), markup=False, highlight=False)
    return int(not all(result.fine for result in results if result.release not in unlisted))


if __name__ == "__main__":
    sys.exit(main())
