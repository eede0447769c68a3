"""The kill switch: QWEN_FASTDECODE=0 in the environment sends every step to upstream, patched or not."""

from __future__ import annotations

import os
import warnings

import torch

KILL_SWITCH = "QWEN_FASTDECODE"
_OFF, _ON = ("0", "false", "off", "no"), ("", "1", "true", "on", "yes")
_environment = vars(os.environ)["_data"]  # behind os.environ, whose look-up takes ten times as long
_key = os.environ.encodekey(KILL_SWITCH)


class _Switch:
    """What the environment said when it was last read: compiled graphs guard `off` (and not the environment, whose
    every new variable would have them compiled again)."""

    off = False
    said: object = None


def switched_off() -> bool:
    """Whether the switch is off. Read anew at every eager call; a compiled step has what the last of these found,
    which in `generate` is the prompt's."""
    if not torch.compiler.is_compiling():
        said = _environment.get(_key)
        if said != _Switch.said:
            _read(said)
    return _Switch.off


def _read(said: object) -> None:
    value = os.environ.get(KILL_SWITCH, "").strip().lower()
    if value not in (*_OFF, *_ON):
        warnings.warn(
            f"{KILL_SWITCH}={value!r} means nothing: {', '.join(_OFF)} switch qwen_fastdecode off, 1 or nothing on. "
            "It is on",
            stacklevel=2,
        )
    _Switch.off, _Switch.said = value in _OFF, said
