"""What `patch` and `status` answer: one entry a layer, the counters, and a table to read."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from html import escape
from typing import Any

from .reasons import Reason

PREFILL = Reason.SEVERAL_TOKENS.value
HEAD = ("layers", "family", "backend", "fast steps", "prefills", "fallbacks", "")
NUMBER = re.compile(r"\d+(?=\.|\]|$)")  # a layer's, in its name
COUNTING = (
    "Counters count eager steps and those that cuda_graph=True replays; steps inside torch.compile or somebody else's "
    "CUDA graphs are not counted."
)
NOTHING_CAPTURED = "cuda_graph: nothing was captured"
CUDA_GRAPH_HINT = (
    "patch(model, cuda_graph=True) also runs decode steps of generate as one CUDA graph: docs/cuda-graph.md"
)


def _in_a_table(reason: str) -> str:
    """A reason that is too long for a row is written in full below the table, once."""
    return reason if len(reason) <= 60 else "see below"


@dataclass(frozen=True)
class LayerStatus:
    """One gated DeltaNet layer: whether it decodes through the fast path, through which backend, and why not."""

    name: str
    family: str
    backend: str
    covered: bool
    reason: str = ""
    fast_steps: int = 0
    fallbacks: dict[str, int] = field(default_factory=dict)
    split_steps: int = 0  # of the fast ones, on this tensor-parallel rank's heads alone
    deferred_steps: int = 0  # of the fast ones, with the states written every N-th time
    ring_bytes: int = 0  # memory that holds what such steps have not written yet, of all living caches


@dataclass(frozen=True)
class GraphStatus:
    """What `cuda_graph=True` has done so far; `str()` is a few lines to read."""

    captures: int = 0
    compared: int = 0  # captures whose first replay was compared with an eager step
    worst: float = 0.0  # of those, the largest relative distance
    replays: int = 0
    tokens: int = 0  # that replays gave: one a sequence
    grouped_calls: int = 0  # calls in which experts kept grouped_mm while decoding
    norms: int = 0  # of the last capture: run as one kernel each, to upstream's bits
    norms_in_three: int = 0  # as three
    norms_left: dict[str, int] = field(default_factory=dict)  # those that are upstream's own there, by the reason
    reasons: dict[str, int] = field(default_factory=dict)  # calls, or the rest of them, that ran eagerly
    details: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        compared = f"{self.compared} of {self.captures} first replays were compared with an eager step"
        captured = f"{self.captures} captured, {self.replays} replays, {self.tokens} tokens; {compared}"
        lines = [f"cuda_graph: {captured} (distance {self.worst:.1e})" if self.captures else NOTHING_CAPTURED]
        if self.grouped_calls:
            lines.append(f"cuda_graph: experts kept grouped_mm while decoding in {self.grouped_calls} calls")
        for norms, kernels in ((self.norms, "one kernel"), (self.norms_in_three, "3 kernels")):
            if norms:
                lines.append(f"cuda_graph: {norms} norms run as {kernels} each instead of 10, to the same bits")
        for reason, count in sorted(self.norms_left.items()):
            lines.append(f"cuda_graph: {count} norms are upstream's own: {reason}")
        for reason, count in sorted(self.reasons.items()):
            detail = f" ({self.details[reason]})" if reason in self.details else ""
            lines.append(f"cuda_graph: eager: {reason}: {count}{detail}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Status:
    """The state of every gated DeltaNet layer that was looked at; `str()` is a table."""

    layers: tuple[LayerStatus, ...]
    notes: tuple[str, ...] = ()
    graphs: GraphStatus | None = None  # None where no model with `cuda_graph=True` has generated

    @property
    def fast_steps(self) -> int:
        """Layer-steps served by the fast path (each layer counts each decode step)."""
        return sum(layer.fast_steps for layer in self.layers)

    @property
    def split_steps(self) -> int:
        """Of `fast_steps`, those on this tensor-parallel rank's heads alone."""
        return sum(layer.split_steps for layer in self.layers)

    @property
    def deferred_steps(self) -> int:
        """Of `fast_steps`, those that left the states to be written by one of the next."""
        return sum(layer.deferred_steps for layer in self.layers)

    @property
    def ring_bytes(self) -> int:
        """Memory that holds what such steps have not written yet, of all living caches."""
        return sum(layer.ring_bytes for layer in self.layers)

    @property
    def fallbacks(self) -> dict[str, int]:
        """Calls that upstream's forward served, by reason; prefills among them."""
        total: Counter[str] = Counter()
        for layer in self.layers:
            total.update(layer.fallbacks)
        return dict(total)

    @property
    def covered(self) -> int:
        """How many layers are covered."""
        return sum(layer.covered for layer in self.layers)

    @property
    def prefills(self) -> int:
        """Of `fallbacks`, the layer-calls of more than one token: prompts, which are upstream's to decode."""
        return self.fallbacks.get(PREFILL, 0)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as JSON has it."""
        names = "covered", "fast_steps", "split_steps", "deferred_steps", "ring_bytes", "prefills"
        totals = {name: getattr(self, name) for name in names}
        return {
            **totals,
            "fallbacks": self.fallbacks,
            "layers": [asdict(x) for x in self.layers],
            "notes": [*self.notes],
            "graphs": None if self.graphs is None else asdict(self.graphs),
        }

    def __str__(self) -> str:
        lines = [self._headline]
        if self.layers:
            rows = [HEAD, *self._rows]
            widths = [max(len(row[i]) for row in rows) for i in range(len(HEAD) - 1)]
            lines += [
                "  ".join([*(f"{cell:<{w}}" for cell, w in zip(row[:-1], widths, strict=True)), row[-1]]).rstrip()
                for row in rows
            ]
        return "\n".join([*lines, *self._footnotes])

    def _repr_html_(self) -> str:
        """For notebooks."""
        rows = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in self._rows]
        head = "".join(f"<th>{escape(cell)}</th>" for cell in HEAD)
        body = "".join(f"<tr>{row}</tr>" for row in rows)
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>" if rows else ""
        notes = "".join(f"<div>{escape(note)}</div>" for note in self._footnotes)
        return f"<div><b>{escape(self._headline)}</b></div>{table}{notes}"

    @property
    def _headline(self) -> str:
        return f"qwen_fastdecode: {self.covered} of {len(self.layers)} gated DeltaNet layers covered"

    @property
    def _rows(self) -> list[tuple[str, ...]]:
        """Layers that are alike in all but their number take one row; its counts are of each of them."""
        alike: dict[str, list[LayerStatus]] = {}
        for layer in self.layers:
            alike.setdefault(repr(replace(layer, name=NUMBER.sub("*", layer.name))), []).append(layer)
        return [_row(layers) for layers in alike.values()]

    @property
    def _footnotes(self) -> list[str]:
        """What is true of these layers, and no more."""
        others = {reason: count for reason, count in self.fallbacks.items() if reason != PREFILL}
        notes = [f"fallback: {reason}: {count}" for reason, count in sorted(others.items())]
        if self.split_steps:
            notes.insert(0, f"on this rank's heads alone: {self.split_steps} of {self.fast_steps} fast steps")
        if self.deferred_steps:
            rings = f"rings hold {self.ring_bytes / 2**20:.1f} MiB now"
            notes.insert(0, f"deferred states: {self.deferred_steps} of {self.fast_steps} fast steps; {rings}")
        long = [layer.reason for layer in self.layers if _in_a_table(layer.reason) != layer.reason]
        notes += dict.fromkeys([*long, *self.notes])
        if any(layer.covered and layer.fallbacks and not layer.fast_steps for layer in self.layers):
            notes.append(COUNTING)
        if self.graphs is not None:
            notes += str(self.graphs).splitlines()
        return notes


def _row(layers: list[LayerStatus]) -> tuple[str, ...]:
    first = layers[0]
    name = first.name if len(layers) == 1 else f"{len(layers)} x {NUMBER.sub('*', first.name)}"
    prefills = first.fallbacks.get(PREFILL, 0)
    counts = first.fast_steps, prefills, sum(first.fallbacks.values()) - prefills
    return name, first.family, first.backend, *map(str, counts), _in_a_table(first.reason)


@dataclass(frozen=True)
class PatchReport(Status):
    """What `patch` did."""
