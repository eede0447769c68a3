"""Other projects' kernels for the same step, where they are installed. Nothing of theirs is copied."""

from __future__ import annotations

from collections.abc import Callable

import torch
from gpu_layers import Stack

PEERS: dict[str, Callable[[Stack], list[Callable[[], torch.Tensor]]]] = {}
