"""What this package raises: `PatchError` and its kin, and what the command line says of its arguments."""

from __future__ import annotations


class PatchError(RuntimeError):
    """Base of every error that patching raises."""


class NothingToPatch(PatchError):
    """The model has no gated DeltaNet layer of a supported family."""


class LayerNotCovered(PatchError):
    """A gated DeltaNet layer could not be made to decode through the fast path."""


class UnknownUpstream(PatchError):
    """The installed Transformers holds code that was not reviewed and does not pass the self-test, or somebody else's
    patch over it."""


class BackendUnavailable(PatchError):
    """The backend that was asked for cannot run here."""


class RanksDisagree(PatchError):
    """The ranks of a tensor-parallel model were not patched alike, or do not do the same: they would wait for one
    another for ever."""


class BadInput(ValueError):
    """The user of a command has to change something; the message is one line that says what."""


class UnsupportedStep(ValueError):
    """A decode step that no kernel, or not the one that was asked for, computes; the message names the argument."""
