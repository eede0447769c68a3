"""Names that are needed before torch is there: importing this module costs nothing."""

from __future__ import annotations

from typing import Literal, get_args

Backend = Literal["auto", "triton", "torch"]
HeadParallel = Literal["auto", "on", "off"]
BACKENDS: tuple[str, ...] = get_args(Backend)
HEAD_PARALLEL: tuple[str, ...] = get_args(HeadParallel)

PLAN = "_qwen_fastdecode_plan"  # the attribute of a patched layer; a plan, or EXCLUDED
EXCLUDED = False  # `unpatch(model)` under a `patch()` of everything
