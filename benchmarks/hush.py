"""Imported first by benchmarks that print tables: what other packages say as they are imported stays off the screen."""

from __future__ import annotations

import logging
import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler that counts memory announces itself
for name in ("torchao", "torch.utils._pytree"):  # Transformers imports torchao where it is, and that complains
    logging.getLogger(name).setLevel(logging.ERROR)
