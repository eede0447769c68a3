"""`qwen-fastdecode compare`: its arguments, its progress bar, its exit code."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers

from ...errors import BadInput
from ...switch import KILL_SWITCH, switched_off
from ..arguments import Exit
from ..quiet import quiet_imports
from .inputs import (
    check_batch,
    check_plot,
    check_writable,
    fill_batch,
    find_device,
    in_chat,
    load_model,
    read_prompts,
    require,
)
from .result import UPSTREAM, WORDS, Comparison, SideFailed
from .run import compare, total_runs
from .sides import Settings, told


def run(args: argparse.Namespace) -> int:
    """Raises BadInput or PatchError where the user has to change something."""
    require("rich", *(["matplotlib"] if args.plot else []))
    if switched_off():
        said = os.environ[KILL_SWITCH]
        print(f"qwen-fastdecode: {KILL_SWITCH}={said} is set: there is nothing to compare", file=sys.stderr)
        return Exit.SWITCHED_OFF
    prompts = read_prompts(args.prompt, args.prompts)
    check_batch(prompts, args.batch)
    if args.json:
        check_writable(args.json)
    if args.plot:
        check_plot(args.plot)
    device = find_device(args.device) if args.device_map is None else torch.device("cpu")
    if args.device_map is not None and args.device is not None:
        raise BadInput("--device and --device-map exclude each other")

    silence_libraries()
    settings = Settings(args.new_tokens, args.repeat, args.backend, args.state_dtype, args.beside)
    try:
        with told("loading", UPSTREAM):
            model, tokenizer = load_model(
                args.model, args.dtype, device, revision=args.revision, device_map=args.device_map
            )
        if args.chat:
            prompts = in_chat(tokenizer, prompts)
        prompts = fill_batch(prompts, args.batch)
        comparison = compare_with_progress(model, tokenizer, prompts, settings)
    except SideFailed as failure:
        return report_failure(failure)
    report(comparison, args.json, args.plot, prompts)
    return comparison.exit


def report_failure(failure: SideFailed) -> int:
    """What happened, on stderr: of a crash the traceback comes first, so that the headline is what a terminal shows."""
    cause = failure.__cause__
    assert cause is not None
    side = WORDS[failure.side]
    words = next((line for line in str(cause).splitlines() if line.strip()), "")
    if failure.exit is Exit.OUT_OF_MEMORY:
        headline = f"out of memory: {side} ({failure.what}): {words} Use a smaller --batch or fewer --new-tokens"
    else:
        traceback.print_exception(cause)
        headline = f"{side} raised {type(cause).__name__} ({failure.what}): {words}"
    print(f"qwen-fastdecode: {headline}", file=sys.stderr)
    return failure.exit


def silence_libraries() -> None:
    """Leaves stderr to this command's own line or bar, and to the bar of loading weights on a terminal."""
    transformers.logging.set_verbosity_error()  # it warns that faster packages are missing; the table says what ran
    huggingface_hub.logging.set_verbosity_error()  # it logs every retry
    quiet_imports()
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
        task = progress.add_task("", total=total_runs(model, settings))
        started = itertools.count()

        def on_run(what: str) -> None:
            progress.update(task, description=what, completed=next(started), refresh=True)

        return compare(model, tokenizer, prompts, settings, on_run)


def report(comparison: Comparison, json_file: Path | None, plot_file: Path | None, prompts: Sequence[str]) -> None:
    """Prints the table; writes the files that were asked for."""
    from rich.console import Console

    from .render import as_json, render

    console = Console()
    plain: dict[str, Any] = {"style": "dim", "soft_wrap": True, "markup": False}  # a path is no markup
    console.print(render(comparison))
    if json_file:
        json_file.write_text(json.dumps(as_json(comparison, sys.argv, prompts), indent=2) + "\n", encoding="utf-8")
        console.print(f"Everything measured: {json_file}", **plain)
    if plot_file and comparison.speed is None:
        print("no plot: it would claim a speed", file=sys.stderr)
    elif plot_file:
        from .plot import draw

        draw(comparison, plot_file)
        console.print(f"Latency of every token: {plot_file}", **plain)
