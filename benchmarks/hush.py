"""Imported first by benchmarks that print tables: what other packages say as they are imported stays off the screen."""

from __future__ import annotations

import os

from qwen_fastdecode.cli.quiet import quiet_imports

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler that counts memory announces itself
quiet_imports()
