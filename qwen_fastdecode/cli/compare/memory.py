"""Memory that one decode step takes at its peak, above what was allocated when it began (weights and cache).

The process's peak resident size would not do: it never falls, so the second side could only look as bad as the first.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function
from transformers.generation.streamers import BaseStreamer

from .generation import Batch

# Arrivals (the prompt is the first) between which a step is watched; not the first step, which warms up.
_FIRST, _LAST = 3, 4
MarkedRun = Callable[[Callable[[], None], Callable[[], None]], None]
_STEP = "watched decode step"


class StepMark(BaseStreamer):
    """Calls `begin` and `end` around one decode step of a `generate` call of at least three new tokens."""

    def __init__(self, begin: Callable[[], None], end: Callable[[], None]):
        self._at = {_FIRST: begin, _LAST: end}
        self._arrivals = 0

    def put(self, value: Tensor) -> None:
        """Tokens have arrived."""
        self._arrivals += 1
        self._at.get(self._arrivals, lambda: None)()

    def end(self) -> None:
        """Nothing is buffered."""


def decode_step_bytes(model: Any, batch: Batch) -> int | None:
    """Peak memory of one decode step of `model` after the prompts `batch`, above weights and cache, in bytes.

    None on a device whose allocator cannot be asked, or where the model is spread over several.
    """

    def run(begin: Callable[[], None], end: Callable[[], None]) -> None:
        mark = StepMark(begin, end)
        model.generate(**batch, min_new_tokens=4, max_new_tokens=4, do_sample=False, num_beams=1, streamer=mark)

    device = batch["input_ids"].device
    if device.type not in ("cuda", "cpu") or len({parameter.device for parameter in model.parameters()}) > 1:
        return None
    return _cuda_step_bytes(run, device) if device.type == "cuda" else _cpu_step_bytes(run)


def _cuda_step_bytes(run: MarkedRun, device: torch.device) -> int:
    """Asks the caching allocator."""
    levels = []

    def begin() -> None:
        torch.cuda.reset_peak_memory_stats(device)
        levels.append(torch.cuda.memory_allocated(device))

    run(begin, lambda: levels.append(torch.cuda.max_memory_allocated(device)))
    before, peak = levels
    return peak - before


def _cpu_step_bytes(run: MarkedRun) -> int:
    """Adds up the allocations and frees that the profiler sees: the CPU allocator keeps no statistics."""
    step = record_function(_STEP)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run(lambda: step.__enter__() and None, lambda: step.__exit__(None, None, None))
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiled.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    return peak_within(events, _STEP)


def peak_within(events: list[dict[str, Any]], name: str) -> int:
    """How far the allocated bytes of a trace rise, while the event called `name` lasts, above where they were."""
    span = next(e for e in events if e.get("name") == name and e["ph"] == "X")
    memory = [e for e in events if e.get("name") == "[memory]" and span["ts"] <= e["ts"] <= span["ts"] + span["dur"]]
    memory.sort(key=lambda e: (e["ts"], e["args"]["Ev Idx"]))
    return max(accumulate((e["args"]["Bytes"] for e in memory), initial=0))
