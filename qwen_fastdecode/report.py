"""What `patch` and `status` answer: one entry a layer, the counters, and a table to read."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

COUNTING = (
    "Counters count eager steps and those that cuda_graph=True replays; steps inside torch.compile or somebody else's "
    "CUDA graphs are not counted."
)
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


@dataclass(frozen=True)
class GraphStatus:
    """What `cuda_graph=True` has done so far; `str()` is a few lines to read."""

    captures: int = 0
    compared: int = 0  # captures whose first replay was compared with an eager step
    worst: float = 0.0  # of those, the largest relative distance
    replays: int = 0
    tokens: int = 0  # that replays gave: one a sequence
    grouped_calls: int = 0  # calls in which experts kept grouped_mm while decoding
    reasons: dict[str, int] = field(default_factory=dict)  # calls, or the rest of them, that ran eagerly
    details: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [
            f"cuda_graph: {self.captures} captured, {self.replays} replays, {self.tokens} tokens; "
            f"{self.compared} of {self.captures} first replays were compared with an eager step (distance "
            f"{self.worst:.1e})"
        ]
        if self.grouped_calls:
            lines.append(f"cuda_graph: experts kept grouped_mm while decoding in {self.grouped_calls} calls")
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
    def fallbacks(self) -> dict[str, int]:
        """Calls that upstream's forward served, by reason."""
        total: Counter[str] = Counter()
        for layer in self.layers:
            total.update(layer.fallbacks)
        return dict(total)

    @property
    def covered(self) -> int:
        """How many layers are covered."""
        return sum(layer.covered for layer in self.layers)

    def __str__(self) -> str:
        lines = [f"qwen_fastdecode: {self.covered} of {len(self.layers)} gated DeltaNet layers covered"]
        if self.layers:
            rows = [("layer", "family", "backend", "fast steps", "fallbacks", "")]
            rows += [
                (x.name, x.family, x.backend, str(x.fast_steps), str(sum(x.fallbacks.values())), _in_a_table(x.reason))
                for x in self.layers
            ]
            widths = [max(len(row[i]) for row in rows) for i in range(5)]
            lines += [
                "  ".join([*(f"{cell:<{w}}" for cell, w in zip(row[:5], widths, strict=True)), row[5]]).rstrip()
                for row in rows
            ]
        if self.split_steps:
            lines.append(f"on this rank's heads alone: {self.split_steps} of {self.fast_steps} fast steps")
        lines += [f"fallback: {reason}: {count}" for reason, count in sorted(self.fallbacks.items())]
        long = [layer.reason for layer in self.layers if _in_a_table(layer.reason) != layer.reason]
        lines += [] if self.graphs is None else [str(self.graphs)]
        return "\n".join([*lines, *dict.fromkeys([*long, *self.notes]), COUNTING])


@dataclass(frozen=True)
class PatchReport(Status):
    """What `patch` did."""
