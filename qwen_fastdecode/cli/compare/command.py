"""`qwen-fastdecode compare`: its arguments, its progress bar, its exit code."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import transformers

from qwen_fastdecode.names import BACKENDS

from .inputs import DTYPES, check_plot, check_writable, fill_batch, find_device, load_model, read_prompts, require
from .result import Comparison
from .run import STATE_DTYPES, Settings, compare, total_runs

DESCRIPTION = """\
Runs MODEL with and without the patch in one process, alternately, and reports whether both write the same text and how
fast each decodes. Exit code 0: the text is right; 1: it is not, and no speed is reported; 2: bad input."""


def add_parser(subparsers: Any) -> None:
    """Registers the subcommand."""
    parser = subparsers.add_parser("compare", help="the same model with and without the patch", description=DESCRIPTION)
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("model", metavar="MODEL", help="a folder with a checkpoint, or its name on the Hugging Face Hub")
    add("--prompt", metavar="TEXT", action="append", default=[], help="may be repeated: decoded together, as one batch")
    add("--prompts", metavar="FILE", type=Path, help="more prompts, one a line")
    add("--batch", metavar="N", type=at_least(1), help="sequences; the prompts are repeated (default: one each)")
    add("--new-tokens", metavar="N", type=at_least(2), default=64, help="tokens to generate in each run (default: 64)")
    add("--repeat", metavar="N", type=at_least(1), default=5, help="timed runs of each side (default: 5)")
    add("--dtype", choices=DTYPES, help="default: float32 on a CPU, else bfloat16")
    add("--device", metavar="NAME", help="such as cpu or cuda:1 (default: a GPU if there is one)")
    add("--backend", choices=BACKENDS, default="auto", help="of the patch (default: auto)")
    add("--state-dtype", choices=STATE_DTYPES, help="of the patched model's recurrent states (default: upstream's)")
    add("--json", metavar="FILE", type=Path, help="write everything that was measured")
    add("--plot", metavar="FILE", type=Path, help="draw the latency of every token and the ratios (png, svg, pdf)")


def at_least(minimum: int) -> Any:
    """An argparse type."""

    def number(text: str) -> int:
        value = int(text)
        if value < minimum:
            raise argparse.ArgumentTypeError(f"{value} is less than {minimum}")
        return value

    return number


def run(args: argparse.Namespace) -> int:
    """Raises BadInput or PatchError where the user has to change something."""
    require("rich", *(["matplotlib"] if args.plot else []))
    prompts = fill_batch(read_prompts(args.prompt, args.prompts), args.batch)
    if args.json:
        check_writable(args.json)
    if args.plot:
        check_plot(args.plot)
    device = find_device(args.device)

    silence_libraries()
    model, tokenizer = load_model(args.model, args.dtype, device)
    settings = Settings(args.new_tokens, args.repeat, args.backend, args.state_dtype)
    comparison = compare_with_progress(model, tokenizer, prompts, settings)
    report(comparison, args.json, args.plot)
    return 1 if comparison.parity.failures else 0


def silence_libraries() -> None:
    """Leaves stderr to this command's own line or bar, and to the bar of loading weights on a terminal."""
    transformers.logging.set_verbosity_error()  # it warns that faster packages are missing; the table says what ran
    huggingface_hub.logging.set_verbosity_error()  # it logs every retry
    for name in ("torchao", "torch.utils._pytree"):  # Transformers imports torchao where it is, and that complains
        logging.getLogger(name).setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler of memory.py announces itself


def compare_with_progress(model: Any, tokenizer: Any, prompts: list[str], settings: Settings) -> Comparison:
    """`compare` with a bar on stderr that moves between runs only: drawing it would cost time inside of them."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description:<22}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    quiet = not console.is_terminal
    with Progress(*columns, console=console, auto_refresh=False, transient=True, disable=quiet) as progress:
        task = progress.add_task("", total=total_runs(settings))
        started = iter(range(total_runs(settings)))

        def on_run(what: str) -> None:
            progress.update(task, description=what, completed=next(started), refresh=True)

        return compare(model, tokenizer, prompts, settings, on_run)


def report(comparison: Comparison, json_file: Path | None, plot_file: Path | None) -> None:
    """Prints the table; writes the files that were asked for."""
    from rich.console import Console

    from .render import as_json, render

    console = Console()
    plain: dict[str, Any] = {"style": "dim", "soft_wrap": True, "markup": False}  # a path is no markup
    console.print(render(comparison))
    if json_file:
        json_file.write_text(json.dumps(as_json(comparison), indent=2) + "\n", encoding="utf-8")
        console.print(f"Everything measured: {json_file}", **plain)
    if plot_file and comparison.speed is None:
        print("no plot: it would claim a speed", file=sys.stderr)
    elif plot_file:
        from .plot import draw

        draw(comparison, plot_file)
        console.print(f"Latency of every token: {plot_file}", **plain)
