"""What this package raises. Everything derives from `PatchError`."""

from __future__ import annotations


class PatchError(RuntimeError):
    """Base of every error that patching raises."""


class NothingToPatch(PatchError):
    """The model has no gated DeltaNet layer of a supported family."""


class LayerNotCovered(PatchError):
    """A gated DeltaNet layer could not be made to decode through the fast path."""


class UnknownUpstream(PatchError):
    """The installed Transformers holds code that was not reviewed, or somebody else's patch over it."""


class BackendUnavailable(PatchError):
    """The backend that was asked for cannot run here."""


class RanksDisagree(PatchError):
    """The ranks of a tensor-parallel model were not patched alike: they would wait for one another for ever."""
