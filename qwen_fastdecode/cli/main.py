"""`qwen-fastdecode`: each subcommand's module brings its own arguments and does its own work."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from .. import __version__
from ..errors import BadInput, PatchError

COMMANDS = {"compare": ".compare.command", "doctor": ".doctor", "run": ".run", "tune": ".tune"}
BAD_INPUT = 2


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Exits with 2."""
        self.exit(BAD_INPUT, f"{self.prog}: {message} (see {self.prog} --help)\n")


def build_parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of this command line; every subcommand sets `run`, a function of the parsed arguments.

    Where `argv` names a subcommand only its module is imported: most bring torch and Transformers.
    """
    parser = OneLineParser(prog="qwen-fastdecode", description="Fast decoding of Qwen3-Next and Qwen3.5 models.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    named = [command for command in COMMANDS if [command] == list(argv[:1])]
    for command in named or COMMANDS:
        importlib.import_module(COMMANDS[command], __package__).add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand and returns its exit code; 2, after one line on stderr, for what the user has to change."""
    argv = sys.argv[1:] if argv is None else argv
    args = build_parser(argv).parse_args(argv)
    if argv[0] == "run":  # another program: what it raises is its own
        return int(args.run(args))
    try:
        return int(args.run(args))
    except (BadInput, PatchError) as error:
        print(f"qwen-fastdecode: {' '.join(str(error).split())}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        return 130
