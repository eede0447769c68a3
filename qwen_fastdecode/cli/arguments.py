"""What the user can type, of every command. Imports nothing: `--help` and usage errors cost no torch."""

from __future__ import annotations

import argparse
import importlib
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from typing import Any, NoReturn

from .. import __version__
from ..names import BACKENDS

DTYPES = {
    "float32": "float32",
    "bfloat16": "bfloat16",
    "float16": "float16",
    "fp32": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
}
STATE_DTYPES = ("bfloat16", "float32")
BESIDE = {"cuda-graph": "cuda_graph", "compiled": "compiled"}


class Exit(IntEnum):
    """What a command's exit code says. `doctor` has its own three: 0 all well, 1 warnings, 2 cannot patch."""

    RIGHT = 0
    WRONG = 1
    BAD_INPUT = 2
    SWITCHED_OFF = 3  # by QWEN_FASTDECODE=0
    NOT_SERVED = 4  # no decode step was served fast
    TOO_FEW_RUNS = 5  # right, and no word on speed
    CRASHED = 6
    OUT_OF_MEMORY = 7
    INTERRUPTED = 130
    UNREAD = 141  # as a shell says it of a process that SIGPIPE ended


COMPARE = """\
Runs MODEL with and without the patch in one process, alternately, and reports whether both write the same text and how
fast each decodes."""
COMPARE_EXITS = """\
Exit codes: 0 right; 1 wrong, and no speed is reported; 2 bad input; 3 switched off by QWEN_FASTDECODE=0; 4 no decode
step was served fast; 5 right, but too few runs for a word on speed; 6 a side raised; 7 out of memory."""
DOCTOR = """\
Prints the versions that matter, whether each family's code in the installed Transformers was reviewed, which backend
would serve on which device, and a numeric self-test. Exit code 0: all well; 1: works, with warnings; 2: a family
cannot be patched, or a result is wrong."""
RUN = """\
Runs a program as python would, with its own arguments and exit code. Models that it creates decode through the fast
path. Options of this command go before SCRIPT or -m; everything after it is the program's. Exit code 2, after one
line, where the program's models cannot be patched."""
TUNE = "Measures the kernel's tiles on this GPU and keeps the fastest for each amount of work."


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Exits with 2."""
        self.exit(Exit.BAD_INPUT, f"{self.prog}: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """Every subcommand sets `run`, a function of the parsed arguments, and `parser`, its own."""
    parser = OneLineParser(prog="qwen-fastdecode", description="Fast decoding of Qwen3-Next and Qwen3.5 models.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for add_command in (_add_compare, _add_doctor, _add_run, _add_tune):
        add_command(subparsers)
    return parser


def _add_compare(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "compare", help="the same model with and without the patch", description=COMPARE, epilog=COMPARE_EXITS
    )
    parser.set_defaults(run=_command(".compare.command"), parser=parser)
    add = parser.add_argument
    add("model", metavar="MODEL", help="a folder with a checkpoint, or its name on the Hugging Face Hub")
    add("--revision", metavar="NAME", help="branch, tag or commit of a model on the Hub")
    add("--prompt", metavar="TEXT", action="append", default=[], help="may be repeated: decoded together, as one batch")
    add("--prompts", metavar="FILE", type=Path, help='more, one a line; in a .jsonl file as objects with a "prompt"')
    add("--chat", action="store_true", help="each prompt is what a user says: put into the model's chat template")
    add("--batch", metavar="N", type=at_least(1), help="sequences; the prompts are repeated (default: one each)")
    add("--new-tokens", metavar="N", type=at_least(2), default=64, help="tokens to generate in each run (default: 64)")
    add("--repeat", metavar="N", type=at_least(1), default=5, help="timed runs of each side (default: 5)")
    add("--dtype", choices=DTYPES, metavar="DTYPE", help=f"{', '.join(DTYPES)} (default: float32 on a CPU, else bf16)")
    add("--device", metavar="NAME", help="such as cpu or cuda:1 (default: a GPU if there is one)")
    add("--device-map", metavar="MAP", help="such as auto: weights over several devices, by accelerate")
    add("--backend", choices=BACKENDS, default="auto", help="of the patch (default: auto)")
    add("--state-dtype", choices=STATE_DTYPES, help="of the patched model's recurrent states (default: upstream's)")
    add("--beside", metavar="NAMES", type=_beside, help="of cuda-graph,compiled, or none (default: both, on a GPU)")
    add("--json", metavar="FILE", type=Path, help="write everything that was measured (docs/compare.md)")
    add("--plot", metavar="FILE", type=Path, help="draw the latency of every token and the ratios (png, svg, pdf)")


def _beside(text: str) -> tuple[str, ...]:
    """An argparse type: the sides beside the two, by the names that the comparison has for them."""
    names = [] if text == "none" else text.split(",")
    unknown = {*names} - {*BESIDE}
    if unknown:
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: expected some of {', '.join(BESIDE)}, or none")
    return tuple(BESIDE[name] for name in names)


def _add_doctor(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "doctor", help="can this installation be patched, and is it right", description=DOCTOR
    )
    parser.set_defaults(run=_command(".doctor"), parser=parser)
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    form.add_argument("--issue", action="store_true", help="print a block of Markdown to paste into an issue")


def _add_run(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "run",
        help="a program that you cannot edit, patched",
        description=RUN,
        usage="%(prog)s [OPTIONS] (SCRIPT | -m MODULE) [ARGUMENTS ...]",
        allow_abbrev=False,
    )
    parser.set_defaults(run=_command(".run"), parser=parser)
    add = parser.add_argument
    add("--backend", choices=BACKENDS, default="auto", help="of the patch (default: auto)")
    add("--no-strict", dest="strict", action="store_false", help="leave what cannot be patched to Transformers")
    add("--cuda-graph", action="store_true", help="decode steps as one CUDA graph: docs/cuda-graph.md")
    add("--deferred-state", action="store_true", help="states every N-th step: docs/deferred-state.md")
    add("--report", action="store_true", help="print the table of layers and counters to stderr at the end")
    add("-m", dest="module", action="store_true", help="the program is a module, as in python -m")
    add("program", nargs=argparse.REMAINDER, metavar="SCRIPT", help="a script, or a folder or zip with a __main__.py")


def _add_tune(subparsers: Any) -> None:
    parser = subparsers.add_parser("tune", help="measure the kernel's tiles on this GPU", description=TUNE)
    parser.set_defaults(run=_command(".tune"), parser=parser)
    add = parser.add_argument
    add("--device", metavar="NAME", default="cuda", help="such as cuda:1 (default: cuda)")
    add("--key-heads", metavar="N", type=int, default=16, help="key heads of a layer (default: 16)")
    add("--value-heads", metavar="N", type=int, default=32, help="value heads of a layer (default: 32)")
    add("--head-dim", metavar="N", type=int, default=128, help="size of a head (default: 128)")
    add("--state-dtype", choices=STATE_DTYPES, default="float32", help="of the recurrent states (default: float32)")


def _command(module: str) -> Callable[[argparse.Namespace], int]:
    """A command's `run`, whose module is imported when it is called: most bring torch and Transformers."""

    def run(args: argparse.Namespace) -> int:
        with _ended_by_interrupts():
            command = importlib.import_module(module, __package__)
        return int(command.run(args))

    return run


@contextmanager
def _ended_by_interrupts() -> Iterator[None]:
    """Ctrl-C ends the process by the signal, at once: raised in the middle of torch's import it makes odd errors."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:  # not where it is ignored, as in a background job
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def at_least(minimum: int) -> Any:
    """An argparse type."""

    def number(text: str) -> int:
        value = int(text)
        if value < minimum:
            raise argparse.ArgumentTypeError(f"{value} is less than {minimum}")
        return value

    return number
