"""The same model with and without the patch: `python examples/ab_compare.py MODEL [--help]`."""

import sys

from qwen_fastdecode.cli.main import main

sys.exit(main(["compare", *sys.argv[1:]]))
