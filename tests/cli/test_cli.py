"""The command line: exit codes, files, and one clear line for everything that the user has to change."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from models import judge_upstream
from transformers import LlamaConfig, LlamaForCausalLM

import qwen_fastdecode
from qwen_fastdecode.cli.arguments import Exit
from qwen_fastdecode.cli.compare import command
from qwen_fastdecode.cli.compare.inputs import DEFAULT_PROMPTS
from qwen_fastdecode.cli.main import main
from qwen_fastdecode.ops import backends
from qwen_fastdecode.ops.triton import gpu

ROOT = Path(__file__).parent.parent.parent
CHECKPOINTS = ROOT / "examples" / "checkpoints"
TINY = str(CHECKPOINTS / "qwen3_next-tiny")
FEW = ("--new-tokens", "4", "--repeat", "3", "--device", "cpu")


def rejected(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on stderr of a command that exits with 2 and prints nothing else."""
    try:
        code = main(["compare", *arguments])
    except SystemExit as exit_:  # argparse
        code = exit_.code
    printed = capsys.readouterr()
    assert code == 2
    assert printed.out == ""
    assert printed.err.count("\n") == 1, printed.err
    assert printed.err.startswith("qwen-fastdecode")
    return printed.err.rstrip("\n")


def never_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_model(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("should have been refused before the model is loaded")

    monkeypatch.setattr(command, "load_model", load_model)


def test_compare_prints_a_table_and_writes_both_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    data, plot = tmp_path / "new folder" / "data.json", tmp_path / "plot.png"
    assert main(["compare", TINY, *FEW, "--json", str(data), "--plot", str(plot)]) == 0
    out = capsys.readouterr().out
    for text in ("Same text", "decode, ms per token", "served fast", "100 % of 27", "upstream ran", "both wrote"):
        assert text in out
    table, _, _ = out.partition("Everything measured: ")
    assert max(map(len, table.splitlines())) <= 80
    stored = json.loads(data.read_text())
    assert stored["parity"]["green"] is True
    assert stored["speed"]["fast_share"] == 1
    assert len(stored["speed"]["patched"]["step_ms_of_runs"]) == 3
    assert stored["schema_version"] == 1
    assert stored["package_version"] == qwen_fastdecode.__version__
    assert stored["prompts"] == [DEFAULT_PROMPTS[0]]
    assert stored["setup"]["cpu"]
    assert datetime.fromisoformat(stored["date"]).tzinfo is not None
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_the_states_dtype_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", TINY, *FEW, "--state-dtype", "bfloat16"]) == 0
    assert "recurrent ones in bfloat16" in capsys.readouterr().out


def test_wrong_text_exits_with_1_and_claims_no_speed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    judge_upstream()
    right = backends.decode_torch
    monkeypatch.setattr(backends, "decode_torch", lambda *args, **kwargs: -right(*args, **kwargs))
    data, plot = tmp_path / "data.json", tmp_path / "plot.png"
    assert main(["compare", TINY, *FEW, "--json", str(data), "--plot", str(plot)]) == 1
    printed = capsys.readouterr()
    assert "WRONG" in printed.out
    assert "a layer step (model.layers." in printed.out
    assert "ms per" not in printed.out
    assert "x as fast" not in printed.out
    assert "no plot" in printed.err
    assert not plot.exists()
    assert json.loads(data.read_text())["speed"] is None


def test_prompts_come_from_the_command_line_and_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("A function call\n\nA module\n")
    data = tmp_path / "data.json"
    arguments = (
        "--prompt",
        "A class",
        "--prompts",
        str(file),
        "--batch",
        "5",
        "--dtype",
        "bfloat16",
        "--json",
        str(data),
    )
    assert main(["compare", TINY, *FEW, *arguments]) == 0
    stored = json.loads(data.read_text())
    assert stored["setup"]["sequences"] == 5
    assert stored["setup"]["dtype"] == "bfloat16"
    assert stored["sample"]["prompt"] == "A class"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["--backend", "fla"], "argument --backend: invalid choice: 'fla'"),
        (["--state-dtype", "float16"], "argument --state-dtype: invalid choice: 'float16'"),
        (["--beside", "fla"], "argument --beside: fla: expected some of cuda-graph, compiled, or none"),
        (["--batch", "0"], "argument --batch: 0 is less than 1"),
        (["--new-tokens", "1"], "argument --new-tokens: 1 is less than 2"),
        (["--repeat", "many"], "argument --repeat: invalid number value: 'many'"),
        (["--device", "nonsense"], "device 'nonsense' cannot be used"),
        (["--device", "meta"], "device 'meta' cannot be used"),
        (["--device", f"cuda:{torch.cuda.device_count()}"], "cannot be used"),
        (["--prompts", "{tmp}/missing.txt"], "cannot read the prompts in {tmp}/missing.txt"),
        (["--prompts", "{tmp}/empty.txt"], "{tmp}/empty.txt holds no prompt"),
        (["--prompts", "{tmp}/latin.txt"], "cannot read the prompts in {tmp}/latin.txt"),
        (["--prompts", "{tmp}/bad.jsonl"], '{tmp}/bad.jsonl, line 2: expected an object with a text as "prompt"'),
        (["--device", "mps"], "device 'mps' cannot be used"),
        (["--device", "cpu", "--device-map", "auto"], "--device and --device-map exclude each other"),
        (["--nonsense"], "unrecognized arguments: --nonsense (see qwen-fastdecode compare --help)"),
        (["--prompt", "one", "--prompt", "two", "--batch", "1"], "--batch 1 is less than the number of prompts, 2"),
        (["--json", "{tmp}"], "cannot write {tmp}: Is a directory"),
        (["--json", "{tmp}/empty.txt/data.json"], "cannot write {tmp}/empty.txt/data.json"),
        (["--plot", "{tmp}/empty.txt/plot.png"], "cannot write {tmp}/empty.txt/plot.png"),
        (["--plot", "{tmp}/plot.jpeg"], "the name should end in .png, .svg, .pdf"),
    ],
)
def test_bad_arguments_are_refused_before_the_model_is_loaded(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    never_load(monkeypatch)
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    (tmp_path / "latin.txt").write_bytes(b"d\xe9j\xe0 vu\n")
    before = sorted(tmp_path.iterdir())
    line = rejected(capsys, TINY, *(argument.format(tmp=tmp_path) for argument in arguments))
    assert message.format(tmp=tmp_path) in line
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("package", ["rich", "matplotlib"])
def test_a_missing_extra_is_named(
    package: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    never_load(monkeypatch)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find_spec(name))
    line = rejected(capsys, TINY, "--plot", str(tmp_path / "plot.png"))
    assert line == f"qwen-fastdecode: {package} not installed: pip install {package}"


def test_models_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = str(tmp_path / "missing")
    assert f"no such model: {missing} is no folder" in rejected(capsys, missing)
    assert f"cannot load the configuration of {tmp_path}" in rejected(capsys, str(tmp_path))
    assert f"--revision main: {tmp_path} is a folder" in rejected(capsys, str(tmp_path), "--revision", "main")
    assert "nobody/nothing is no folder, and offline not in" in rejected(capsys, "nobody/nothing")
    (tmp_path / "config.json").write_bytes((Path(TINY) / "config.json").read_bytes())
    assert f"{tmp_path} holds no tokenizer" in rejected(capsys, str(tmp_path))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((Path(TINY) / name).read_bytes())
    assert f"cannot load the weights of {tmp_path}" in rejected(capsys, str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    assert f"cannot load the weights of {tmp_path}" in rejected(capsys, str(tmp_path))


def test_a_model_without_gated_deltanet_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = LlamaConfig(
        vocab_size=1024, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((Path(TINY) / name).read_bytes())
    capsys.readouterr()
    assert "LlamaForCausalLM has no gated DeltaNet layer" in rejected(capsys, str(tmp_path), *FEW)


def test_an_empty_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    assert "the prompt '' has no tokens" in rejected(capsys, TINY, "--prompt", "", *FEW)


def test_a_backend_that_cannot_run_here(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "INTERPRETED", False)  # as outside these tests
    assert "backend='triton' cannot run on cpu" in rejected(capsys, TINY, *FEW, "--backend", "triton")


def test_no_command_and_no_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert "MODEL" in rejected(capsys)
    with pytest.raises(SystemExit, match="2"):
        main([])
    assert capsys.readouterr().err.count("\n") == 1


def test_an_interrupt_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_model(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "load_model", load_model)
    assert main(["compare", TINY, *FEW]) == 130


@pytest.mark.parametrize(
    "start",
    [
        pytest.param(["-m", "qwen_fastdecode", "compare"], id="module"),
        pytest.param([str(ROOT / "examples" / "ab_compare.py")], id="example", marks=pytest.mark.slow),
    ],
)
def test_other_ways_to_start_it(start: list[str]) -> None:
    arguments = [sys.executable, *start, str(CHECKPOINTS / "nothing"), *FEW]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(arguments, check=False, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"qwen-fastdecode: no such model: {CHECKPOINTS / 'nothing'} is no folder\n"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out.startswith("qwen-fastdecode 0.")


def test_the_kill_switch_leaves_nothing_to_compare(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    never_load(monkeypatch)
    monkeypatch.setenv("QWEN_FASTDECODE", "0")
    assert main(["compare", TINY]) == Exit.SWITCHED_OFF
    assert capsys.readouterr().err == "qwen-fastdecode: QWEN_FASTDECODE=0 is set: there is nothing to compare\n"


@pytest.mark.parametrize(
    ("error", "code", "headline"),
    [
        (RuntimeError("boom"), Exit.CRASHED, "Transformers raised RuntimeError (loading): boom"),
        (torch.OutOfMemoryError("too large"), Exit.OUT_OF_MEMORY, "out of memory: Transformers (loading): too large"),
    ],
)
def test_a_crash_has_its_own_exit_code(
    error: Exception,
    code: Exit,
    headline: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load_model(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(command, "load_model", load_model)
    assert main(["compare", TINY]) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    *before, last = printed.err.splitlines()
    assert last.startswith(f"qwen-fastdecode: {headline}")
    assert bool(before) is (code is Exit.CRASHED)  # the traceback


def test_prompts_as_json_lines_in_the_chat_template(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, file, data = tmp_path / "model", tmp_path / "prompts.jsonl", tmp_path / "data.json"
    shutil.copytree(TINY, folder)
    file.write_text('{"prompt": "A class\\nand\\u2028more"}\n\n{"prompt": "A module", "index": 1}\n')
    arguments = ("compare", str(folder), *FEW, "--prompts", str(file), "--json", str(data))
    assert main([*arguments]) == 0
    assert json.loads(data.read_text())["prompts"] == ["A class\nand\u2028more", "A module"]
    capsys.readouterr()
    assert "no chat template" in rejected(capsys, *arguments[1:], "--chat")
    (folder / "chat_template.jinja").write_text("<{{ messages[0].role }}>{{ messages[0].content }}<answer>")
    assert main([*arguments, "--chat"]) == 0
    assert json.loads(data.read_text())["prompts"][1] == "<user>A module<answer>"


def test_a_device_map(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", TINY, *FEW[:4], "--device-map", "auto", "--dtype", "bf16"]) == 0
    assert "bfloat16 on cpu" in capsys.readouterr().out


def test_an_interrupt_in_the_first_seconds_ends_it_in_silence(tmp_path: Path) -> None:
    """While torch is imported: an exception in the middle of that could turn into any other."""
    (tmp_path / "torch.py").write_text("import time\nprint('ready', flush=True)\ntime.sleep(60)")
    # Where the tests run in a background, the signal is ignored, and that is inherited.
    program = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    program += "import sys, qwen_fastdecode.cli.main as cli; sys.exit(cli.main(['doctor']))"
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    with subprocess.Popen(
        [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as command:
        assert command.stdout is not None
        assert command.stdout.readline() == "ready\n"
        command.send_signal(signal.SIGINT)
        _, errors = command.communicate(timeout=30)
    assert (command.returncode, errors) == (-signal.SIGINT, "")


def test_whoever_stops_reading_gets_no_traceback() -> None:
    program = """
import sys
import qwen_fastdecode.cli.arguments as arguments
import qwen_fastdecode.cli.main as cli

arguments._command = lambda module: lambda args: print("a line") or 0
sys.exit(cli.main(["doctor"]))
"""
    reading, writing = os.pipe()
    os.close(reading)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with os.fdopen(writing) as pipe:
        done = subprocess.run(
            [sys.executable, "-c", program],
            env=environment,
            stdout=pipe,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (done.returncode, done.stderr) == (141, "")


def test_help_and_version_import_nothing_heavy() -> None:
    for arguments in (["--help"], ["--version"], *([name, "--help"] for name in ("compare", "doctor", "run"))):
        program = f"""
import sys, time
start = time.perf_counter()
from qwen_fastdecode.cli.main import main
try:
    main({arguments!r})
except SystemExit as end:
    assert end.code == 0
assert time.perf_counter() - start < 0.3, time.perf_counter() - start
assert not {{"torch", "transformers", "numpy", "rich"}} & sys.modules.keys()
"""
        done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
