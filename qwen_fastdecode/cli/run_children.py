"""The Python programs that a program starts: `run --report` cannot count what they decode, and says so."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable
from typing import Any

SHOWN = 3  # programs, in a note
WIDTH = 50  # of one of them
NOTE = (
    "It started Python programs, which are not patched and not counted here unless they are started with "
    "qwen-fastdecode run: {}."
)


class Children:
    """Hears of the programs that this process starts, from the interpreter's own audit events."""

    def __init__(self) -> None:
        self._programs: dict[str, int] = {}

    def listen(self) -> None:
        """From now on, and for good: a hook of this kind cannot be taken off."""
        sys.addaudithook(self._hear)

    def note(self) -> str:
        """A sentence on them; empty where there were none."""
        shown = [f"{name} ({n} times)" if n > 1 else name for name, n in self._programs.items()]
        if len(shown) > SHOWN:
            shown[SHOWN:] = [f"and {len(shown) - SHOWN} more"]
        return NOTE.format("; ".join(shown)) if shown else ""

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        # What is raised here would stop the program from starting another.
        if event in ("subprocess.Popen", "os.posix_spawn"):
            self._started(arguments[0], arguments[1])
        elif event == "os.system":
            self._started("sh", ["sh", "-c", arguments[0]])

    def _started(self, executable: Any, arguments: Any) -> None:
        words = _words(arguments if isinstance(arguments, (list, tuple)) else [arguments])
        first = "".join(_words([executable]))
        if os.path.basename(first) in ("sh", "bash") and words[1:2] == ["-c"]:
            words = " ".join(words[2:]).split()
            first = words[0] if words else ""
        if is_python(first) and not any("qwen-fastdecode" in word or "qwen_fastdecode" in word for word in words):
            text = " ".join(" ".join([os.path.basename(first), *words[1:]]).split())
            name = text if len(text) <= WIDTH else f"{text[:WIDTH]}..."
            self._programs[name] = self._programs.get(name, 0) + 1


def _words(arguments: Iterable[Any]) -> list[str]:
    return [os.fsdecode(word) for word in arguments if isinstance(word, (str, bytes, os.PathLike))]


def is_python(program: str) -> bool:
    """Whether it is an interpreter, or a script whose first lines name one: `torchrun`, `accelerate`."""
    if os.path.basename(program).startswith(("python", "pypy")):
        return True
    path = shutil.which(program)
    if path is None:
        return False
    try:
        with open(path, "rb") as file:
            head = file.read(200)
    except OSError:  # it may be run and not be read
        return False
    return head.startswith(b"#!") and b"python" in head
