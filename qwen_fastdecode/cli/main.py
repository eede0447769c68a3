"""`qwen-fastdecode`: parses the command line and runs one command, which alone is imported."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from ..errors import BadInput, PatchError
from .arguments import Exit, build_parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code; 2, after one line on stderr, for what the user has to change."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args, rest = build_parser().parse_known_args(argv)
    if rest:  # said by the command's own parser: its --help is the one to see
        args.parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if argv[0] == "run":  # another program: what it raises is its own
        return int(args.run(args))
    try:
        code = int(args.run(args))
        sys.stdout.flush()
        return code
    except (BadInput, PatchError) as error:
        print(f"qwen-fastdecode: {' '.join(str(error).split())}", file=sys.stderr)
        return Exit.BAD_INPUT
    except KeyboardInterrupt:
        return Exit.INTERRUPTED
    except BrokenPipeError:  # whoever read has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # python flushes once more
        return Exit.UNREAD
