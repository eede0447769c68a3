"""`qwen-fastdecode`: each subcommand's module brings its own arguments and does its own work."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from . import PatchError, __version__, doctor, tune
from .compare import command as compare_command
from .compare.inputs import BadInput

BAD_INPUT = 2


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Exits with 2."""
        self.exit(BAD_INPUT, f"{self.prog}: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line; every subcommand sets `run`, a function of the parsed arguments."""
    parser = OneLineParser(prog="qwen-fastdecode", description="Fast decoding of Qwen3-Next and Qwen3.5 models.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    compare_command.add_parser(subparsers)
    tune.add_parser(subparsers)
    doctor.add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand and returns its exit code; 2, after one line on stderr, for what the user has to change."""
    args = build_parser().parse_args(argv)
    try:
        return int(args.run(args))
    except (BadInput, PatchError) as error:
        print(f"qwen-fastdecode: {' '.join(str(error).split())}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        return 130
