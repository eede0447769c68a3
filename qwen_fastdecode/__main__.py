"""`python -m qwen_fastdecode`."""

import sys

from .cli import main

sys.exit(main())
