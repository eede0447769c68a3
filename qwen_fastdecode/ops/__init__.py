"""The gated DeltaNet decode step, independent of Transformers."""

from .decode import gated_delta_decode

__all__ = ["gated_delta_decode"]
