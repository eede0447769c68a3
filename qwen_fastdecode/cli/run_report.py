"""What `qwen-fastdecode run --report` prints when a process ends: this one, and those that it forked.

Imports neither torch nor Transformers: a program that does not is not to pay for it.
"""

from __future__ import annotations

import atexit
import os
import sys
from dataclasses import replace
from multiprocessing import util

from ..report import Status
from .run_children import Children

NOTHING = "This process imported no model of a supported family."
FORKED = "Processes that it forked, {}, report for themselves where they decoded anything."
SPAWNED = "It spawned processes, which are not patched and not counted here: call qwen_fastdecode.patch() in them."
SPAWNERS = ("popen_spawn_posix", "popen_spawn_win32", "popen_forkserver")  # multiprocessing imports them to spawn


class Report:
    """Counts forks, and prints at the end; `refused` are notes on families that were left to Transformers."""

    def __init__(self) -> None:
        self.refused: list[str] = []
        self._forks = 0
        self._before: Status | None = None  # what a forked process had inherited
        self._children = Children()

    def at_exit(self) -> None:
        """From now on, in this process and in those that it forks."""
        atexit.register(self._print)
        self._children.listen()
        os.register_at_fork(after_in_parent=self._count, after_in_child=self._forget)
        util.register_after_fork(self, Report._end_with_multiprocessing)  # whose processes end without atexit

    def _count(self) -> None:
        self._forks += 1

    def _forget(self) -> None:
        self._forks, self._before = 0, _status()

    def _end_with_multiprocessing(self) -> None:
        util.Finalize(None, self._print, exitpriority=0)

    def _print(self) -> None:
        text = self._whole() if self._before is None else self._of_fork(self._before)
        if text:
            print(text, file=sys.stderr, flush=True)

    def _whole(self) -> str:
        status = _status()
        notes = [*status.notes, *self.refused]
        if not status.layers and not notes:
            notes = [NOTHING]
        if self._forks:
            notes.append(FORKED.format(self._forks))
        if any(f"multiprocessing.{name}" in sys.modules for name in SPAWNERS):
            notes.append(SPAWNED)
        if started := self._children.note():
            notes.append(started)
        return str(replace(status, notes=tuple(dict.fromkeys(notes))))

    def _of_fork(self, before: Status) -> str:
        """One line on what was decoded here; counters were inherited with everything else."""
        status = _status()
        fast = status.fast_steps - before.fast_steps
        others = {reason: n - before.fallbacks.get(reason, 0) for reason, n in status.fallbacks.items()}
        others = {reason: n for reason, n in others.items() if n}
        if not fast and not others:
            return ""
        calls = "".join(f"; {reason}: {n}" for reason, n in sorted(others.items()))
        return f"qwen_fastdecode: forked process {os.getpid()}: {fast} fast steps{calls}"


def _status() -> Status:
    """Without importing what the program did not."""
    if "qwen_fastdecode.layer.everything" not in sys.modules:
        return Status(())
    from ..api import status

    return status()
