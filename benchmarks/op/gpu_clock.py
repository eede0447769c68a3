"""Clocks: CUDA graph replay and eager calls, over inputs so many that no cache holds them. Wall clock on a CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

Call = Callable[[], object]
BUDGET_S = 0.25  # of repeats for one number
COPY_BYTES = 8 << 30
REPEATS = (5, 30)  # fewest and most


class Replay:
    """Several calls captured into one CUDA graph; called, it replays them. On a CPU it just calls them."""

    def __init__(self, calls: Sequence[Call], device: torch.device):
        self.calls = calls
        self.outputs: list[Any] = []
        self.graph = None
        if device.type != "cuda":
            return
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls[:2]:  # compiles, and lets libraries create their handles, outside the capture
                call()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs = [call() for call in calls]

    def __call__(self) -> None:
        if self.graph is None:
            self.outputs = [call() for call in self.calls]
        else:
            self.graph.replay()

    def first_output(self) -> torch.Tensor:
        """Runs all calls; what the first one returned."""
        self()
        return self.outputs[0]


def device_us(run: Call, device: torch.device) -> float:
    """Median microseconds of one `run` on the device's own clock."""
    synchronise(device)
    times = [once_us(run, device)]
    for _ in range(_repeats(times[0])):
        times.append(once_us(run, device))
    return statistics.median(times[1:])


def wall_us(run: Call, device: torch.device) -> float:
    """Median microseconds from the first instruction on the host to the last on the device."""
    synchronise(device)
    times: list[float] = []
    while len(times) < 2 or len(times) <= _repeats(times[0]):
        start = time.perf_counter()
        run()
        synchronise(device)
        times.append(1e6 * (time.perf_counter() - start))
    return statistics.median(times[1:])


def host_us(call: Call, device: torch.device, calls: int = 200, rounds: int = 7) -> float:
    """Median microseconds that the host spends in one `call`, the device idle at the start and never waited for.

    `calls` launches at most fill a fifth of the launch queue (1024), so that no launch blocks.
    """
    times = []
    for _ in range(rounds):
        synchronise(device)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append(1e6 * (time.perf_counter() - start) / calls)
    synchronise(device)
    return statistics.median(times[1:])


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second of a large device-to-device copy, read and written bytes counted."""
    size = COPY_BYTES if device.type == "cuda" else 1 << 20
    source = torch.empty(size // 4, device=device).uniform_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / (1e-6 * device_us(lambda: target.copy_(source), device))


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _repeats(first_us: float) -> int:
    fewest, most = REPEATS
    return max(fewest, min(most, int(1e6 * BUDGET_S / max(first_us, 1.0))))


def once_us(run: Call, device: torch.device) -> float:
    """Microseconds of one `run` on the device's own clock."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return 1e6 * (time.perf_counter() - start)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return 1e3 * begin.elapsed_time(end)
