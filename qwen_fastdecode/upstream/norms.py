"""The only place that knows upstream's plain RMSNorms: which modules are ones whose weight is zero-centred."""

from __future__ import annotations

import sys
from typing import NamedTuple

from torch import Tensor, nn

HOME = "transformers.models."


class ZeroCentredNorm(NamedTuple):
    """What such a norm computes with: x * rsqrt(mean(x^2) + eps) * (1 + weight)."""

    weight: Tensor
    eps: float


def zero_centred_norm(module: nn.Module) -> ZeroCentredNorm | None:
    """None for everything but a norm of upstream's own code, with nothing around it. Its code is not read: whoever
    stands in for it proves that he computes the same."""
    kind, own = type(module), vars(module)
    if not kind.__name__.endswith("RMSNorm") or not kind.__module__.startswith(HOME) or "forward" in own:
        return None
    home = vars(sys.modules[kind.__module__])
    if any(getattr(vars(kind).get(name), "__globals__", None) is not home for name in ("forward", "_norm")):
        return None  # somebody wrapped or replaced what the class had
    weight, eps = own["_parameters"].get("weight"), own.get("eps")
    if type(weight) is not nn.Parameter or weight.dim() != 1 or type(eps) is not float:
        return None
    if own.get("group_size") is not None:  # qwen4_exp may take means over parts of a row
        return None
    return ZeroCentredNorm(weight, eps)
