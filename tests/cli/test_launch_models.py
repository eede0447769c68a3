"""Programs that bring models, under `qwen-fastdecode run`: patched when they import them, in their own time."""

from __future__ import annotations

import importlib
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from models import LINEAR, build, generate
from programs import ENVIRONMENT, RUN, TINY, python, write
from transformers import pipeline
from transformers.models.qwen3_5 import modeling_qwen3_5

import qwen_fastdecode as qf
from qwen_fastdecode.layer import everything
from qwen_fastdecode.upstream import seams

NEW = 12
PROMPT = "The for statement"
PIPELINE = f"""\
import sys
assert "transformers" not in sys.modules
def work(model):
    from transformers import pipeline
    assert "qwen_fastdecode.api" not in sys.modules
    generator = pipeline("text-generation", model=model, device="cpu")
    return generator({PROMPT!r}, max_new_tokens={NEW}, do_sample=False)[0]["generated_text"]
print(work(sys.argv[1]))
"""


def fast_steps(report: str) -> list[int]:
    """Of each layer, from the table on stderr."""
    assert f"{LINEAR} of {LINEAR} gated DeltaNet layers covered" in report, report
    rows = re.findall(r"(?:(\d+) x )?\w+GatedDeltaNet\[.\] +\S+ +torch +(\d+)", report)  # equal layers are one row
    return [int(count) for layers, count in rows for _ in range(int(layers or 1))]


@pytest.fixture(scope="module")
def expected() -> str:
    generator = pipeline("text-generation", model=str(TINY), device="cpu")
    return generator(PROMPT, max_new_tokens=NEW, do_sample=False)[0]["generated_text"]


ACCELERATE = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1")


@pytest.mark.parametrize("launcher", [(), pytest.param(ACCELERATE, marks=pytest.mark.slow)])
def test_a_script_with_a_pipeline_and_options(launcher: tuple[str, ...], expected: str, tmp_path: Path) -> None:
    write(tmp_path / "program.py", PIPELINE)
    options = ("--deferred-state", "--cuda-graph", "--report")  # on a CPU the report says why neither does anything
    done = python(*launcher, *RUN, *options, "program.py", TINY, cwd=tmp_path)
    assert done.stdout == f"{expected}\n", done.stderr
    assert fast_steps(done.stderr) == [NEW - 1] * LINEAR
    assert "deferred_state: two passes on the torch backend" in done.stderr
    assert "the model is not on a CUDA device" in done.stderr


def said(errors: str) -> list[str]:
    """The lines on stderr, without those of other packages as they are imported."""
    return [line for line in errors.splitlines() if "torchao" not in line and "_pytree.py" not in line]


UNKNOWN = """\
import pathlib, transformers.models.qwen3_5 as package
source = pathlib.Path(package.__path__[0], "modeling_qwen3_5.py").read_text()
pathlib.Path("modeling_qwen3_5.py").write_text(source.replace("beta = b.sigmoid()", "beta = 2 * b.sigmoid()"))
package.__path__.insert(0, str(pathlib.Path.cwd()))
"""
IMPORT = """from transformers import Qwen3_5ForCausalLM
print("went on")
"""
ATTEMPTS = """import threading
def attempt():
    try:
        import transformers.models.qwen3_5.modeling_qwen3_5
    except SystemExit as error:
        print("exit", error.code)
        raise
for thread in [threading.Thread(target=attempt) for _ in range(2)]:
    thread.start()
    thread.join()
"""


def test_what_cannot_be_patched_ends_the_program_in_one_line(tmp_path: Path) -> None:
    """Also where Transformers would make a ModuleNotFoundError of any other exception."""
    write(tmp_path / "program.py", UNKNOWN + IMPORT)
    done = python(*RUN, "program.py", cwd=tmp_path)
    assert (done.stdout, done.returncode) == ("", 2)
    (line,) = said(done.stderr)
    assert line.startswith("qwen-fastdecode run: transformers.models.qwen3_5.modeling_qwen3_5.Qwen3_5GatedDeltaNet ")


@pytest.mark.slow
def test_what_cannot_be_patched_fails_every_import_and_is_said_once(tmp_path: Path) -> None:
    write(tmp_path / "program.py", UNKNOWN + ATTEMPTS)
    done = python(*RUN, "program.py", cwd=tmp_path)
    assert (done.stdout, done.returncode) == ("exit 2\nexit 2\n", 2)  # though no thread's exception ends a program
    assert len(said(done.stderr)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("strict", [True, False])
def test_unknown_code_is_named(strict: bool, tmp_path: Path) -> None:
    write(tmp_path / "program.py", UNKNOWN + IMPORT)
    options = [] if strict else ["--no-strict"]
    done = python(*RUN, *options, "--report", "program.py", cwd=tmp_path)
    assert (done.stdout, done.returncode) == (("", 2) if strict else ("went on\n", 0)), done.stderr
    assert "Qwen3_5GatedDeltaNet" in done.stderr
    assert any("stays with upstream" in line for line in done.stderr.splitlines()[-3:]) is not strict


FORKING = """\
import multiprocessing, os, sys
from transformers import AutoModelForCausalLM
import torch
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
def work(_):
    model.generate(torch.tensor([[1, 2]]), max_new_tokens=4, min_new_tokens=4)
    return os.getpid()
work(0)
with multiprocessing.get_context("fork").Pool(1) as pool:
    print(*pool.map(work, [0, 1]))
    pool.close()
    pool.join()
"""


@pytest.mark.slow
def test_forked_processes_report_for_themselves(tmp_path: Path) -> None:
    write(tmp_path / "program.py", FORKING)
    done = python(*RUN, "--report", "program.py", TINY, cwd=tmp_path)
    child = done.stdout.split()[0]
    line = f"forked process {child}: {2 * 3 * LINEAR} fast steps; more than one token: {2 * LINEAR}"
    assert line in done.stderr, done.stderr
    assert fast_steps(done.stderr) == [3] * LINEAR  # this process's own


@contextmanager
def serving(*start: str | Path, log: Path) -> Iterator[str]:
    """`transformers serve` as it is shipped, on a free port of the loopback; ends it as Ctrl-C does."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve = ("serve", TINY, "--host", "127.0.0.1", "--port", port, "--device", "cpu", "--dtype", "float32")
    command = [sys.executable, *map(str, start), *map(str, serve)]
    with log.open("w") as errors, subprocess.Popen(command, env=ENVIRONMENT, stdout=errors, stderr=errors) as server:
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            server.send_signal(signal.SIGINT)
            try:
                server.wait(timeout=30)
            finally:
                server.kill()


def ask(url: str, body: dict[str, Any] | None = None, timeout: float = 30) -> str:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=timeout) as answer:
        return answer.read().decode()


def wait_for(url: str, log: Path) -> None:
    deadline = time.monotonic() + 90
    while True:
        try:
            ask(f"{url}/health", timeout=5)
        except (urllib.error.URLError, ConnectionError):
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        else:
            return


def conversation(url: str) -> list[Any]:
    """A completion, a longer one of something else, and a streamed one."""
    base = {"model": str(TINY), "prompt": PROMPT, "max_tokens": NEW}
    more: list[dict[str, Any]] = [{}, {"prompt": "A class definition", "max_tokens": 2 * NEW}, {"stream": True}]
    texts = []
    for options in more:
        answer = ask(f"{url}/v1/completions", base | options)
        chunks = [line.removeprefix("data: ") for line in answer.splitlines() if line]
        texts.append("".join(choice["text"] for chunk in chunks for choice in json.loads(chunk)["choices"]))
    return texts


@pytest.mark.slow
def test_transformers_serve_answers_the_same_and_fast(tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("transformers")
    logs = tmp_path / "plain.log", tmp_path / "patched.log"
    with serving(program, log=logs[0]) as plain, serving(*RUN, "--report", program, log=logs[1]) as patched:
        wait_for(plain, logs[0])
        wait_for(patched, logs[1])
        expected = conversation(plain)
        assert conversation(patched) == expected
    assert len(set(expected)) == 2
    assert "gated DeltaNet" not in logs[0].read_text()
    assert fast_steps(logs[1].read_text()) == [2 * (NEW - 1) + 2 * NEW - 1] * LINEAR


def imported(**options: Any) -> None:
    """What the hook on an import does."""
    everything.patch_imported(modeling_qwen3_5.__name__, **{"backend": "auto", "strict": True, "keep": False} | options)


def test_only_classes_of_the_imported_module_are_patched() -> None:
    before = vars(modeling_qwen3_5.Qwen3_5GatedDeltaNet)["forward"]
    model, other = build(), build("qwen3_next")
    imported()
    assert vars(modeling_qwen3_5.Qwen3_5GatedDeltaNet)["forward"] is not before
    assert torch.equal(generate(model), generate(build()))
    generate(other)
    assert qf.status(model).fast_steps == LINEAR * 7
    assert qf.status(other).fast_steps == 0
    qf.unpatch()
    assert vars(modeling_qwen3_5.Qwen3_5GatedDeltaNet)["forward"] is before


SLOW = """\
import threading
go_on = threading.Event()
go_on.wait(60)
SlowGatedDeltaNet = object
"""


def test_a_module_that_another_thread_imports_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That thread may be about to patch it, and wait for us."""
    write(tmp_path / "slow_model.py", SLOW)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(seams, "_layers", lambda: {("slow_model", "SlowGatedDeltaNet"): ("slow", None)})
    importing = threading.Thread(target=importlib.import_module, args=("slow_model",))
    importing.start()
    while not hasattr(sys.modules.get("slow_model"), "go_on"):
        time.sleep(0.01)
    found: list[list[seams.Upstream]] = []
    looking = threading.Thread(target=lambda: found.append([*seams.upstream_classes(import_missing=False)]))
    looking.start()
    looking.join(20)
    waited = looking.is_alive()
    sys.modules["slow_model"].go_on.set()
    importing.join()
    looking.join()
    assert not waited
    assert found == [[]]


def test_layers_that_are_gone_stay_in_the_report_if_they_are_kept() -> None:
    for keep in (False, True):
        imported(keep=keep)
        generate(build())
        assert qf.status().fast_steps == (LINEAR * 7 if keep else 0)
        assert [layer.reason for layer in qf.status().layers] == ["no longer there"] * LINEAR * keep
        qf.unpatch()
    assert qf.status().layers == ()


def test_unknown_code_is_left_with_a_warning_where_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    upstream = modeling_qwen3_5.Qwen3_5RMSNormGated.forward
    monkeypatch.setattr(modeling_qwen3_5.Qwen3_5RMSNormGated, "forward", lambda *args: 1 * upstream(*args))
    with pytest.raises(qf.UnknownUpstream, match="--no-strict"):
        imported()
    with pytest.warns(UserWarning, match=r"Qwen3_5GatedDeltaNet stays with upstream: .*patched by somebody else"):
        imported(strict=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = build()
        generate(model)
    assert qf.status(model).fast_steps == 0
