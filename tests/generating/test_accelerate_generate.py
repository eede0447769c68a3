"""The example that splits prompts between processes: nothing lost, nothing twice, whatever is killed."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import runpy
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from accelerate import PartialState
from accelerate.commands.config.config_args import load_config_from_file
from models import CHECKPOINTS, load
from programs import ENVIRONMENT, ROOT
from transformers import AutoTokenizer

EXAMPLE = ROOT / "examples" / "accelerate_generate.py"
CONFIGS = ROOT / "examples" / "accelerate"
TINY = CHECKPOINTS / "qwen3_next-tiny"
NEW = 12
ENDED = 60  # seconds for processes to end in: a few on an idle machine, where a hang would be half an hour


def prompts(number: int) -> list[str]:
    """Pieces of text of several lengths; every fifth is the same."""
    words = (TINY / "held_out.txt").read_text(encoding="utf-8").split()
    return ["A module" if i % 5 == 4 else " ".join(words[9 * i : 9 * i + 2 + i % 4]) for i in range(number)]


@functools.cache
def loaded() -> tuple[Any, Any]:
    return load(TINY.name), AutoTokenizer.from_pretrained(TINY)


@functools.cache
def unpatched(text: str) -> str:
    """What one process says to a prompt alone, in float32, without a patch and without padding."""
    model, tokenizer = loaded()
    inputs = tokenizer(text, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    return tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def write_prompts(folder: Path, texts: list[str]) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": text, "note": "kept out"}) + "\n" for text in texts), encoding="utf-8"
    )
    return path


def check(out: Path, texts: list[str]) -> None:
    """The file is whole, in order, each prompt once, and says what the unpatched model says."""
    records = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [record["index"] for record in records] == list(range(len(texts)))
    assert [record["prompt"] for record in records] == texts
    assert [record["answer"] for record in records] == [unpatched(text) for text in texts]


def arguments(folder: Path, *options: str) -> list[str]:
    files = ("--prompts", str(folder / "prompts.jsonl"), "--out", str(folder / "answers.jsonl"))
    return [str(TINY), *files, "--dtype", "float32", "--new-tokens", str(NEW), "--batch", "2", "--cpu", *options]


# accelerate launch, two processes


@contextlib.contextmanager
def launched(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """`accelerate launch --config_file ... examples/accelerate_generate.py ...`; leaves no process behind."""
    launch = [sys.executable, "-m", "accelerate.commands.launch"]
    config = ["--config_file", str(CONFIGS / "cpu_2_processes.yaml")]
    command = [*launch, *config, str(EXAMPLE), *arguments(folder)]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=ENVIRONMENT, **pipes) as launcher:
        try:
            yield launcher
        finally:
            for process in [*workers(folder), launcher]:
                process.kill()


def workers(folder: Path) -> list[psutil.Process]:
    """The processes that answer prompts of this folder, by rank, their launcher dead or not."""
    found = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if str(folder / "prompts.jsonl") in process.cmdline() and "LOCAL_RANK" in process.environ():
                found[process.environ()["RANK"]] = process
    return [found[rank] for rank in sorted(found)]


def kill_a_process(folder: Path, rank: int, after: int) -> None:
    """Kills one of two processes once there are more than `after` answers; the other and the launcher must end too."""
    out = folder / "answers.jsonl"
    with launched(folder) as launcher:
        deadline = time.monotonic() + 180
        while not out.exists() or out.read_bytes().count(b"\n") <= after:
            assert launcher.poll() is None, launcher.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        both = workers(folder)
        assert len(both) == 2
        both[rank].kill()
        launcher.communicate(timeout=ENDED)
        assert launcher.returncode != 0
        assert psutil.wait_procs(both, timeout=ENDED)[1] == []


@pytest.mark.slow
def test_killed_twice_and_continued(tmp_path: Path) -> None:
    texts = prompts(80)
    write_prompts(tmp_path, texts)
    out = tmp_path / "answers.jsonl"
    kill_a_process(tmp_path, rank=1, after=0)
    first = out.read_bytes().count(b"\n")
    kill_a_process(tmp_path, rank=0, after=first)
    second = out.read_bytes().count(b"\n")
    assert 0 < first < second < len(texts)
    with launched(tmp_path) as launcher:
        printed, errors = launcher.communicate(timeout=240)
        assert launcher.returncode == 0, errors
    check(out, texts)
    assert f"{len(texts)} answers in {out}, {second} of them from before" in printed
    fast_steps = json.loads(printed.rpartition("fast steps of each process: ")[2])
    assert len(fast_steps) == 2
    assert all(steps > 0 and steps % 3 == 0 for steps in fast_steps)  # three layers
    assert f"{len(texts)}/{len(texts)}" in errors  # the bar, of one process


# one process, here


@pytest.fixture
def generate(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Runs the example in this process; returns its output."""
    main = runpy.run_path(str(EXAMPLE))["main"]

    def run(*options: str) -> Path:
        main(arguments(tmp_path, *options))
        return tmp_path / "answers.jsonl"

    yield run
    PartialState._reset_state()


@pytest.mark.parametrize("cut", ["nothing", "all", "the last line's end", "half a line", "within the first line"])
def test_a_file_that_was_cut_is_continued(cut: str, tmp_path: Path, generate: Callable[..., Path]) -> None:
    texts = prompts(7)
    write_prompts(tmp_path, texts)
    out = generate()
    whole = out.read_bytes()
    lines = whole.splitlines(keepends=True)
    left = {
        "nothing": whole,
        "all": b"",
        "the last line's end": whole[:-1],
        "half a line": b"".join(lines[:4]) + lines[4][:9],
        "within the first line": lines[0][:5],
    }[cut]
    out.write_bytes(left)
    generate("--batch", "3")
    assert out.read_bytes() == whole
    check(out, texts)


def refusal(capsys: pytest.CaptureFixture[str], generate: Callable[..., Path], *options: str) -> str:
    with pytest.raises(SystemExit, match="2"):
        generate(*options)
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    return line


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "one"', "is not JSON: Expecting ',' delimiter"),
        ('{"text": "one"}', 'expected an object with a text as "prompt", got {"text": "one"}'),
        ('{"prompt": ""}', "expected an object"),
        ('{"prompt": 5}', "expected an object"),
        ('["prompt"]', "expected an object"),
        ('{"prompt": "\\ud800"}', "expected an object"),
    ],
)
def test_bad_lines_are_named(
    line: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], generate: Callable[..., Path]
) -> None:
    path = write_prompts(tmp_path, ["one", "two"])
    path.write_text(f"{path.read_text()}\n{line}\n")
    text = refusal(capsys, generate)
    assert f"{path}, line 4" in text
    assert message in text
    assert not (tmp_path / "answers.jsonl").exists()


def other_prompts(folder: Path) -> None:
    write_prompts(folder, ["one", "other"])


def no_prompts(folder: Path) -> None:
    write_prompts(folder, [])


def other_answers(folder: Path) -> None:
    out = folder / "answers.jsonl"
    lines = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join(reversed(lines)))


def broken_answers(folder: Path) -> None:
    out = folder / "answers.jsonl"
    out.write_bytes(out.read_bytes().replace(b'"index": 0', b'"index 0'))


def more_answers(folder: Path) -> None:
    out = folder / "answers.jsonl"
    out.write_bytes(out.read_bytes() + b'{"index": 2, "prompt": "three"}\n')


def no_job(folder: Path) -> None:
    (folder / "answers.jsonl.job.json").unlink()


def nothing(folder: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (other_prompts, (), "was begun with other prompts: use another --out"),
        (no_prompts, (), "holds no prompt"),
        (nothing, ("--new-tokens", "5"), "was begun with other new tokens: use another --out"),
        (nothing, ("--dtype", "auto"), "was begun with other dtype: use another --out"),
        (nothing, ("--prompts", "missing.jsonl"), "cannot read missing.jsonl"),
        (nothing, ("--out", "/dev/null/answers.jsonl"), "cannot write /dev/null/answers.jsonl: Not a directory"),
        (other_answers, (), "answers.jsonl, line 1 is not the answer to prompt 0"),
        (broken_answers, (), "answers.jsonl, line 1 is not the answer to prompt 0"),
        (more_answers, (), "answers.jsonl, line 3 is not the answer to prompt 2"),
        (no_job, (), "is there, but not answers.jsonl.job.json, which this script puts beside it"),
    ],
)
def test_a_run_that_does_not_continue_the_file_is_refused(
    change: Callable[[Path], None],
    options: tuple[str, ...],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    generate: Callable[..., Path],
) -> None:
    write_prompts(tmp_path, ["one", "two"])
    out = generate()
    change(tmp_path)
    before = out.read_bytes()
    capsys.readouterr()
    assert message in refusal(capsys, generate, *options)
    assert out.read_bytes() == before


def test_two_runs_at_a_time_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], generate: Callable[..., Path]
) -> None:
    write_prompts(tmp_path, ["one"])
    out = tmp_path / "answers.jsonl"
    with out.open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert f"another run is writing {out}" in refusal(capsys, generate)


@pytest.mark.parametrize("number", ["0", "-1", "x"])
def test_numbers_are_positive(number: str, capsys: pytest.CaptureFixture[str], generate: Callable[..., Path]) -> None:
    with pytest.raises(SystemExit, match="2"):
        generate("--batch", number)
    assert f"--batch: expected a positive number, got '{number}'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "processes", "cpu"), [("cpu_2_processes", 2, True), ("gpu_1", 1, False), ("gpu_2", 2, False)]
)
def test_accelerate_reads_the_configurations(name: str, processes: int, cpu: bool) -> None:
    config: Any = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert (config.num_processes, config.use_cpu, config.mixed_precision) == (processes, cpu, "no")
    assert config.distributed_type == ("MULTI_GPU" if processes > 1 else "NO")
