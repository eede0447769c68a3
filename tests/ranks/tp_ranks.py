"""Runs a function on several tensor-parallel ranks: gloo processes on the loopback device, without a fixed port.

A rank is forked from a server that imported torch and Transformers once: of a rank's seconds, five were that import.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

LIMIT = 240.0  # seconds; some ten are usual
PRELOADED = [
    "torch.distributed.tensor",
    "transformers.models.qwen3_next.modeling_qwen3_next",
    "transformers.models.qwen3_5.modeling_qwen3_5",
    "transformers.models.qwen3_5_moe.modeling_qwen3_5_moe",
]


def on_ranks(size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What function(rank, *args) returns on each of `size` ranks. Raises what one of them raises, ends all of them."""
    multiprocessing.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        work = size, folder, function, args
        context = mp.start_processes(_enter, work, nprocs=size, join=False, start_method="forkserver")
        deadline = time.monotonic() + LIMIT
        try:
            while not context.join(timeout=1):
                assert time.monotonic() < deadline, f"{function.__name__} hangs on {size} ranks"
        finally:
            for process in context.processes:
                process.kill()
                process.join()
        return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(size)]


def _enter(rank: int, size: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    # Transformers reads the size off the environment, as torchrun sets it.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # as in conftest.py: fresh memory is NaN
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", store, timedelta(seconds=60), rank=rank, world_size=size)
    try:
        result = function(rank, *args)
        dist.barrier()
    finally:
        dist.destroy_process_group()
    torch.save(result, f"{folder}/{rank}.pt")
