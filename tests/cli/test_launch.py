"""`qwen-fastdecode run` against python itself: the same output, the same exit code, the same traceback."""

from __future__ import annotations

import os
import py_compile
import re
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from programs import ENVIRONMENT, ROOT, RUN, python, write

from qwen_fastdecode.cli.run_checks import OLDEST

# What a program can see of how it was started. The annotation would be a string under our own __future__ import.
DESCRIBE = """\
import sys
def f(x: int): pass
names = ("__name__", "__file__", "__package__", "__cached__", "__builtins__", "__doc__")
print({name: str(globals().get(name, "none")) for name in names}, type(__loader__).__name__)
print(__spec__ and (__spec__.name, __spec__.origin), f.__annotations__, sys.argv, sys.path)
print(sys.modules["__main__"].__dict__ is globals(), sorted({*globals()} - {*names, "__annotations__"}))
"""
# The body ends while a thread still works; it pickles, and another process unpickles, what is in __main__.
LATE = """\
import atexit, multiprocessing, pickle, threading, time
def task(x): return x + 1
def late():
    threading.main_thread().join()
    print("thread", pickle.loads(pickle.dumps(task))(1))
if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print("pool", pool.map(task, [1, 2]))
    atexit.register(lambda: print("atexit", pickle.loads(pickle.dumps(task))(2)))
    threading.Thread(target=late).start()
"""
HOOK = (
    "import sys\nsys.excepthook = lambda k, v, t: print(k, v, t.tb_frame.f_code.co_name, v.__traceback__ is t)\n1 / 0"
)
PROGRAMS = {
    "describe": DESCRIBE,
    "threads, atexit and spawned processes": LATE,
    "exit code 3": "import sys\nprint('so far')\nsys.exit(3)",
    "exit without a code": "raise SystemExit",
    "exit with a text": "import sys\nsys.exit('it is over')",
    "exit at once": "import os\nos._exit(5)",
    "raises": "def f(x):\n    raise ValueError(x)\n\n\ntry:\n    1 / 0\nexcept ZeroDivisionError:\n    f(3)",
    "raises our own error": "import qwen_fastdecode\nraise qwen_fastdecode.PatchError('mine')",
    "raises without a frame of its own": "raise RuntimeError('x') from None",
    "its own hook for exceptions": HOOK,
    "interrupted": "def f():\n    raise KeyboardInterrupt\n\n\nf()",
    "killed by a signal": "import os, signal\nos.kill(os.getpid(), signal.SIGTERM)",
    "does not compile": "def f(:\n    pass",
    "has another encoding": "# coding: latin-1\nprint(ascii('é'))",
    "prints only": "print('x')",
}
ARGUMENTS = ("--report", "-m", "--", "a b", "--backend", "none")


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_script_runs_as_it_does_under_python(name: str, tmp_path: Path) -> None:
    write(tmp_path / "folder" / "program.py", PROGRAMS[name])
    arguments = (Path("folder") / "program.py", *ARGUMENTS)
    expected, done = python(*arguments, cwd=tmp_path), python(*RUN, *arguments, cwd=tmp_path)
    assert (done.stdout, done.stderr, done.returncode) == (expected.stdout, expected.stderr, expected.returncode)
    assert name != "prints only" or done.stdout == "x\n"


@pytest.mark.parametrize("safe", [[], ["-P"]] if sys.version_info >= (3, 11) else [[]])
@pytest.mark.parametrize("kind", ["folder", "zip", "link", "bytecode", "module", "package", "module in a package"])
def test_other_kinds_of_programs(kind: str, safe: list[str], tmp_path: Path) -> None:
    program = write(tmp_path / "app" / "__main__.py", DESCRIBE + "import beside")
    write(tmp_path / "app" / "beside.py", "import sys\nprint('beside', sys.argv[0])")
    write(tmp_path / "package" / "__init__.py", "import sys\nprint('package', sys.argv[0])")
    write(tmp_path / "package" / "__main__.py", DESCRIBE)
    write(tmp_path / "package" / "module.py", DESCRIBE)
    with zipfile.ZipFile(tmp_path / "app.zip", "w") as archive:
        archive.write(program, "__main__.py")
        archive.write(program.with_name("beside.py"), "beside.py")
    (tmp_path / "link.py").symlink_to(program)
    py_compile.compile(str(program), str(tmp_path / "app" / "program.pyc"), doraise=True)
    target = {
        "folder": ["app"],
        "zip": ["app.zip"],
        "link": ["link.py"],
        "bytecode": ["app/program.pyc"],
        "module": ["-m", "this"],
        "package": ["-m", "package"],
        "module in a package": ["-m", "package.module"],
    }[kind]
    expected = python(*safe, *target, *ARGUMENTS, cwd=tmp_path)
    done = python(*safe, *RUN, *target, *ARGUMENTS, cwd=tmp_path)
    assert (done.stdout, done.returncode) == (expected.stdout, expected.returncode)
    assert "qwen_fastdecode" not in done.stderr
    assert bool(done.stderr) == bool(expected.stderr)  # with -P, a module in this folder is not found


@pytest.mark.parametrize("target", [["program.py"], ["-m", "package"]])
def test_the_installed_command_leaves_no_trace_of_itself(target: list[str], tmp_path: Path) -> None:
    write(tmp_path / "program.py", DESCRIBE)
    write(tmp_path / "package" / "__main__.py", DESCRIBE)
    command = Path(sys.executable).with_name("qwen-fastdecode")  # python puts its folder on sys.path, not ours
    expected, done = python(*target, cwd=tmp_path), python(command, "run", *target, cwd=tmp_path)
    assert (done.stdout, done.stderr, done.returncode) == (expected.stdout, "", 0)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (["missing.py"], "can't open file '{here}/missing.py': [Errno 2] No such file or directory"),
        (["empty"], "can't find '__main__' module in 'empty'"),
        (["-m", "missing"], "No module named missing"),
        (["-m", "json.missing"], "No module named json.missing"),
        (["-m", "this.missing"], "No module named this.missing"),
        (["-m", "xml"], "No module named xml.__main__"),
        (["-m", "_socket"], "No code object available for _socket"),
    ],
)
def test_programs_that_are_not_there(target: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    expected, done = python(*target, cwd=tmp_path), python(*RUN, *target, cwd=tmp_path)
    assert done.returncode == expected.returncode
    assert done.stderr == f"qwen-fastdecode run: {message.format(here=tmp_path)}\n"


def test_a_package_that_cannot_be_imported_shows_why(tmp_path: Path) -> None:
    write(tmp_path / "package" / "__init__.py", "import missing_dependency")
    write(tmp_path / "package" / "__main__.py", "")
    done = python(*RUN, "-m", "package", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.endswith("ModuleNotFoundError: No module named 'missing_dependency'\n")
    assert "launch.py" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected a SCRIPT, or -m and a MODULE"),
        (["--rep", "program.py"], "unrecognized arguments: --rep"),
        (["--backend", "fla", "program.py"], "argument --backend: invalid choice: 'fla'"),
    ],
)
def test_bad_options(arguments: list[str], message: str) -> None:
    done = python(*RUN, *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(f"qwen-fastdecode run: {message}") or message in done.stderr
    assert done.stderr.count("\n") == 1


def test_no_gpu_for_triton_is_said_before_the_program_starts(tmp_path: Path) -> None:
    write(tmp_path / "program.py", "print('started')")
    done = python(*RUN, "--backend", "triton", "program.py", cwd=tmp_path)
    assert (done.stdout, done.returncode) == ("", 2)
    assert done.stderr == (
        "qwen-fastdecode run: --backend triton: this machine has no GPU, or no driver of one; use --backend auto or "
        "torch\n"
    )


@pytest.mark.parametrize("strict", [True, False])
def test_an_old_transformers_is_said_before_the_program_starts(
    strict: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = write(
        tmp_path / "old" / "transformers-4.56.2.dist-info" / "METADATA", "Name: transformers\nVersion: 4.56.2\n"
    )
    monkeypatch.setitem(ENVIRONMENT, "PYTHONPATH", os.pathsep.join([str(old.parent.parent), ENVIRONMENT["PYTHONPATH"]]))
    write(tmp_path / "program.py", "print('started')")
    done = python(*RUN, *([] if strict else ["--no-strict"]), "program.py", cwd=tmp_path)
    assert (done.stdout, done.returncode) == (("", 2) if strict else ("started\n", 0))
    said = "qwen-fastdecode run: Transformers 4.56.2 is too old, 4.57 is needed; --no-strict runs the program without"
    assert done.stderr.startswith(said) is strict


def test_the_oldest_transformers_is_the_one_that_pip_is_told() -> None:
    (needed,) = re.findall(r'"transformers>=(\d+)\.(\d+)', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert tuple(map(int, needed)) == OLDEST


HEAVY = """\
import sys
print([name for name in ("torch", "transformers", "accelerate", "triton", "numpy") if name in sys.modules])
"""


def test_a_program_that_never_imports_transformers_does_not_pay_for_it(tmp_path: Path) -> None:
    write(tmp_path / "program.py", f"import atexit\natexit.register(lambda: exec({HEAVY!r}, {{}}))")
    done = python(*RUN, "--report", "program.py", cwd=tmp_path)
    assert done.stdout == "[]\n"
    assert "0 of 0 gated DeltaNet layers covered" in done.stderr
    assert "This process imported no model of a supported family." in done.stderr


def test_the_package_itself_is_light_and_whole() -> None:
    done = python("-c", f"import qwen_fastdecode, qwen_fastdecode.cli.main\n{HEAVY}print(dir(qwen_fastdecode))")
    assert done.stdout.startswith("[]\n")
    assert {"patch", "unpatch", "patched", "status", "ops"} <= set(
        done.stdout.replace("'", " ").replace(",", " ").split()
    )
    done = python("-c", "import qwen_fastdecode\nqwen_fastdecode.ptach")
    assert done.stderr.splitlines()[-1].startswith("AttributeError: module 'qwen_fastdecode' has no attribute 'ptach'")
    done = python(
        "-c", "from qwen_fastdecode import *\nimport qwen_fastdecode\nprint(patch, qwen_fastdecode.ops.__name__)"
    )
    assert done.stdout.startswith("<function patch")
    assert done.stdout.endswith("qwen_fastdecode.ops\n")


def test_control_c_ends_it_by_the_signal_after_the_report(tmp_path: Path) -> None:
    write(tmp_path / "program.py", "import time\nprint('ready', flush=True)\ntime.sleep(60)")
    # Where the tests run in a background, the signal is ignored, and that is inherited.
    heed = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
    command = [sys.executable, "-c", heed, sys.executable, *RUN, "--report", "program.py"]
    with subprocess.Popen(
        command, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == "ready\n"
        os.kill(program.pid, signal.SIGINT)
        _, errors = program.communicate(timeout=30)
    assert program.returncode == -signal.SIGINT
    assert errors.splitlines()[1].startswith(f'  File "{tmp_path / "program.py"}", line ')
    assert "0 of 0 gated DeltaNet layers covered" in errors


@pytest.mark.parametrize(("method", "inherited"), [("fork", True), ("spawn", False)])
def test_forked_children_inherit_the_hooks_and_spawned_ones_do_not(
    method: str, inherited: bool, tmp_path: Path
) -> None:
    source = f"""\
import multiprocessing, sys
def hooked(_): return "wrapt" in sys.modules and any("ImportHook" in type(f).__name__ for f in sys.meta_path)
if __name__ == "__main__":
    with multiprocessing.get_context({method!r}).Pool(1) as pool:
        print(pool.map(hooked, [0]))
"""
    write(tmp_path / "program.py", source)
    done = python(*RUN, "--report", "program.py", cwd=tmp_path)
    assert done.stdout == f"[{inherited}]\n"
    assert ("It spawned processes, which are not patched" in done.stderr) is not inherited
    assert ("Processes that it forked, 1, report for themselves" in done.stderr) is inherited


STARTS = """\
import os, subprocess, sys
for command in ([sys.executable, "-c", "0"], [sys.executable, "-c", "0"], ["true"], ["./script"]):
    subprocess.run(command, check=True)
subprocess.run(f"{sys.executable} -c 'print()'", shell=True, check=True, stdout=subprocess.DEVNULL)
subprocess.run([sys.executable, "-m", "qwen_fastdecode", "run", "-m", "this"], check=True, stdout=subprocess.DEVNULL)
"""


def test_python_programs_that_it_starts_are_named_in_the_report(tmp_path: Path) -> None:
    write(tmp_path / "program.py", STARTS)
    write(tmp_path / "script", f"#!{sys.executable}\n").chmod(0o755)
    done = python(*RUN, "--report", "program.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    name = Path(sys.executable).name
    assert done.stderr.splitlines()[-1] == (
        "It started Python programs, which are not patched and not counted here unless they are started with "
        f"qwen-fastdecode run: {name} -c 0 (2 times); script; {name} -c 'print()'."
    )


def test_a_program_that_starts_no_other_is_told_of_none(tmp_path: Path) -> None:
    write(tmp_path / "program.py", "import subprocess\nsubprocess.run(['true'], check=True)")
    assert "It started" not in python(*RUN, "--report", "program.py", cwd=tmp_path).stderr
