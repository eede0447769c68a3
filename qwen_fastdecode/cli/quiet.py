"""What other packages say while they are imported stays off the screen. Imports nothing heavy: it comes before them."""

from __future__ import annotations

import logging


def quiet_imports() -> None:
    """Before Transformers is imported: it imports torchao where that is installed, which complains about its builds."""
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
