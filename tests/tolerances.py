"""Every tolerance of the tests, each with its reason. Errors are relative root-mean-square unless said."""

from __future__ import annotations

import torch
from torch import Tensor

# The op computes in float32 over at most a few hundred terms a sum; float32 has 24 bits.
FLOAT32 = 2e-6
# A float32 model's hidden states after some tens of steps, in which attention adds up in another order: over a static
# cache it adds the zeros of places that are masked.
DRIFT = 2e-5
# Logits of a whole float32 model: two correct ones may be as far apart as either is from float64 (upstream's own were
# 7.7e-6 from it on olmo_hybrid's test model, the largest of all families).
FLOAT32_MODEL = 1e-5
# A gate's exponential amplifies float32 rounding of its argument: |a| up to 100 loses log2(100) bits more.
FLOAT32_EXTREME_GATES = 2e-5
# One rounding to 16 bits at the end costs a number 2^-8 (bf16) or 2^-11 (fp16) at most, and less than half of that in
# RMS over many (1.7e-3 for bf16).
BFLOAT16_ROUNDING = 2.0**-9
FLOAT16_ROUNDING = 2.0**-12
# Distance from upstream's bf16 path, which rounds at every step (measured 5.6e-3 for a fused step that rounds once).
BFLOAT16_UPSTREAM = 1e-2
# Logits of a random float32 model over some dozen steps on bfloat16 states: each step rounds every element (2^-8 at
# most), and the layers above see it (measured 5e-3 to 3e-2, the most where routers and sigmoid gates amplify it).
BFLOAT16_STATE = 5e-2


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||, in float64; NaN or infinity where they differ counts as infinite."""
    actual, expected = actual.double(), expected.double()
    if not torch.equal(actual.isfinite(), expected.isfinite()):
        return float("inf")
    difference = torch.where(actual.isfinite(), actual - expected, torch.zeros_like(actual))
    return (difference.norm() / expected[expected.isfinite()].norm().clamp_min(1e-300)).item()


def rounding(dtype: torch.dtype) -> float:
    """What one rounding to `dtype` of a float32 result may cost."""
    return {torch.bfloat16: BFLOAT16_ROUNDING, torch.float16: FLOAT16_ROUNDING}.get(dtype, FLOAT32)
