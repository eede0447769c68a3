"""Decode steps of `generate` as one captured CUDA graph: `patch(model, cuda_graph=True)`.

api.py          refresh, describe, reset_counters: what the rest of the package calls
install.py      the functions of Transformers' `generate` that are stood in for, put on and taken off
state.py        which models want it, and what one remembers between calls: counts
call.py         one call of `generate`: when it captures, replays, compares, and goes back to eager
together.py     what the ranks of a tensor-parallel model decide together
caches.py       Transformers' dynamic cache made into one with fixed addresses that grows in steps, and back
capture.py      the CUDA graph, its memory, its static inputs and outputs
norms.py        plain RMSNorms of a step that is recorded: one kernel each, with upstream's bits
fingerprint.py  what must be as it was when a graph was captured
held.py         a graph that a call holds: whether it still may be replayed, and what its replays count
eligible.py     why a call stays eager, asked before anything is done
reasons.py      the names of those reasons
"""

from .api import describe, refresh, reset_counters

__all__ = ["describe", "refresh", "reset_counters"]
