"""Names that are needed before torch is there: importing this module costs nothing."""

from __future__ import annotations

BACKENDS = ("auto", "triton", "torch")
HEAD_PARALLEL = ("auto", "on", "off")

PLAN = "_qwen_fastdecode_plan"  # the attribute of a patched layer; a plan, or EXCLUDED
EXCLUDED = False  # `unpatch(model)` under a `patch()` of everything
