"""No two programs of a launch share memory that one of them writes, so no order of programs can change a result.

Triton's interpreter runs programs one after another. Here it also notes, for each program, every address that is read
and written, and every barrier.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from triton.runtime.interpreter import InterpreterBuilder, interpreter_builder
from triton_step import Step

from qwen_fastdecode.ops.triton import gpu
from qwen_fastdecode.ops.triton import launch as triton_backend
from qwen_fastdecode.ops.triton.tiles import Tile


class Trace:
    """Addresses of 2 bytes each that the programs of the launches so far have touched."""

    def __init__(self) -> None:
        self.launch = 0
        self.reads: dict[tuple, set[int]] = defaultdict(set)  # program -> addresses
        self.writes: dict[tuple, set[int]] = defaultdict(set)
        self.traffic = {"read": 0, "written": 0}
        self.counted = range(0)  # addresses whose traffic is counted, in bytes
        self.unfenced: dict[tuple, set[int]] = defaultdict(set)  # read since the program's last barrier
        self.overtaking: set[int] = set()  # written with no barrier after being read
        self.barriers: dict[tuple, int] = defaultdict(int)  # that a program has passed
        # kind, program, number of barriers that it had passed in its launch -> addresses
        self.touched: dict[tuple[str, tuple, int], set[int]] = defaultdict(set)

    def program(self) -> tuple:
        return (self.launch, *interpreter_builder.grid_idx)

    def note(self, kind: str, pointers, mask) -> None:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        addresses = np.broadcast_to(pointers.data, np.broadcast(pointers.data, mask.data).shape)[mask.data]
        inside = (addresses >= self.counted.start) & (addresses < self.counted.stop)
        self.traffic[kind] += int(inside.sum()) * size
        touched = {int(address) + offset for address in addresses for offset in range(0, size, 2)}
        self.touched[kind, self.program(), self.barriers[self.program()]] |= touched
        if kind == "read":
            self.reads[self.program()] |= touched
            self.unfenced[self.program()] |= touched
        else:
            self.overtaking |= touched & self.unfenced[self.program()]
            self.writes[self.program()] |= touched

    def when(self, kind: str, addresses: set[int], program: tuple | None = None) -> set[int]:
        """After how many of its barriers that program, or any, touched any of them."""
        return {
            barriers
            for (how, whose, barriers), touched in self.touched.items()
            if how == kind and program in (None, whose) and touched & addresses
        }

    def forget(self) -> None:
        """All that programs did so far."""
        for noted in (self.reads, self.writes, self.barriers, self.touched):
            noted.clear()

    def shared(self) -> set[int]:
        """Addresses that one program writes and another reads or writes."""
        found: set[int] = set()
        for writer, written in list(self.writes.items()):
            for other in {*self.reads, *self.writes} - {writer}:
                found |= written & (self.reads.get(other, set()) | self.writes.get(other, set()))
        return found


@pytest.fixture
def trace(monkeypatch: pytest.MonkeyPatch) -> Iterator[Trace]:
    trace = Trace()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def traced_load(self, pointers, mask, *rest):
        trace.note("read", pointers, mask)
        return load(self, pointers, mask, *rest)

    def traced_store(self, pointers, value, mask, *rest):
        trace.note("written", pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def barrier(self, *_) -> None:
        trace.unfenced[trace.program()].clear()
        trace.barriers[trace.program()] += 1

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", traced_load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", traced_store)
    monkeypatch.setattr(InterpreterBuilder, "create_barrier", barrier)
    return trace


@pytest.fixture
def one_item_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many programs as there is work."""
    triton_backend._prepared.clear()
    monkeypatch.setattr(gpu, "INTERPRETED_PROGRAMS", 1000)
    yield
    triton_backend._prepared.clear()


STEPS = [{}, {"R": 3, "HK": 3, "heads": (3, 6)}, {"channel_last": True}, {"T": 2}, {"lengths": [2, 0, 1], "B": 3}]


@pytest.mark.usefixtures("one_item_a_program")
@pytest.mark.parametrize("step", STEPS, ids=str)
def test_programs_share_nothing_that_is_written(trace: Trace, step: dict) -> None:
    Step(**step).run()
    assert len(trace.writes) > 1
    assert not trace.shared()


@pytest.mark.usefixtures("one_item_a_program")
def test_two_launches_on_one_key_head_would_race(trace: Trace) -> None:
    """The control: the same key head twice, as if each were a program of its own. The trace and the result show it."""
    step = Step(B=1, HK=1, R=2)
    _, conv_state, _ = step.expect()
    for launch in range(2):
        trace.launch = launch
        step.run()
    taps = range(step.conv_state.data_ptr(), step.conv_state.data_ptr() + 2 * 2 * step.DK * step.W)  # of q and k
    assert trace.shared() >= set(taps[::2])
    assert not torch.equal(step.conv_state, conv_state)


@pytest.mark.parametrize("step", STEPS, ids=str)
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "tap by tap"])
def test_a_barrier_stands_between_reading_and_shifting_taps(trace: Trace, step: dict, packed: bool) -> None:
    """A block of taps is held by several threads, which the interpreter does not show: a barrier must part them."""
    s = Step(**step, margin=4 if packed else 5)
    s.run()
    begin = s.conv_state.untyped_storage().data_ptr()
    taps = set(range(begin, begin + s.conv_state.untyped_storage().nbytes()))
    assert taps & set().union(*trace.writes.values())
    assert not taps & trace.overtaking


@pytest.mark.parametrize("tile", [Tile(16, 4), Tile(32, 4), Tile(16, 4, 2), Tile(32, 4, 2)], ids=str)
@pytest.mark.parametrize("step", [{"DV": 32}, {"DV": 32, "R": 3}, {"DV": 24, "R": 3, "heads": (3, 3)}], ids=str)
def test_state_is_read_once_and_written_once(trace: Trace, step: dict, tile: Tile) -> None:
    """The traffic floor, in bytes."""
    s = Step(**step)
    begin = s.recurrent_state.untyped_storage().data_ptr()
    trace.counted = range(begin, begin + s.recurrent_state.untyped_storage().nbytes())
    s.run(tile)
    floor = s.recurrent_state[:, : s.heads[1]].numel() * s.recurrent_state.element_size()
    assert trace.traffic == {"read": floor, "written": floor}


def test_a_sequence_without_tokens_is_not_touched(trace: Trace) -> None:
    s = Step(B=3, lengths=[2, 0, 1])
    s.run()
    touched = set().union(*trace.reads.values(), *trace.writes.values())
    for state in (s.conv_state, s.recurrent_state):
        begin = state[1].data_ptr()
        assert not touched & set(range(begin, begin + state[1].numel() * state.element_size()))
        assert touched & set(range(state.data_ptr(), begin))
