"""What a comparison finds, as plain data: `render` prints it, `plot` draws it, JSON stores it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from ...reasons import Reason
from ..arguments import Exit
from .generation import Run
from .parity import GreedyAgreement, LogitsDistance, Parity
from .statistics import Spread, ratio_of_medians, step_ratios
from .upstream import UpstreamKernels

MIN_REPEATS = 3  # fewer have no spread to speak of
UPSTREAM, PATCHED, CUDA_GRAPH, COMPILED = "unpatched", "patched", "cuda_graph", "compiled"  # the sides
WORDS = {
    UPSTREAM: "Transformers",
    PATCHED: "the patched model",
    CUDA_GRAPH: "the patched model with cuda_graph=True",
    COMPILED: "Transformers, compiled",
}


@dataclass(frozen=True)
class Setup:
    """Everything that a number depends on."""

    model: str
    family: str
    backend: str
    num_layers: int
    gdn_layers: int
    upstream: UpstreamKernels
    dtype: str
    device: str
    cpu: str  # its name
    threads: int  # that PyTorch uses on the CPU
    sequences: int
    prompt_tokens: int  # of the longest prompt; shorter ones are padded on the left
    new_tokens: int
    repeat: int
    versions: dict[str, str]
    state_dtype: str | None = None  # of the patched side's recurrent states; None: upstream's


@dataclass(frozen=True)
class Side:
    """One side's speed: spreads over all timed runs."""

    prefill_ms: Spread
    step_ms: Spread
    tokens_per_second: Spread
    peak_step_bytes: int | None  # of one decode step, above weights and cache; None where it cannot be measured
    step_ms_of_runs: list[list[float]]

    @classmethod
    def of(cls, runs: Sequence[Run], peak_step_bytes: int | None) -> Side:
        """From at least one timed run."""
        return cls(
            prefill_ms=Spread.of([run.prefill_ms for run in runs]),
            step_ms=Spread.of([ms for run in runs for ms in run.step_ms]),
            tokens_per_second=Spread.of([1e3 * run.tokens[:, 1:].numel() / sum(run.step_ms) for run in runs]),
            peak_step_bytes=peak_step_bytes,
            step_ms_of_runs=[run.step_ms for run in runs],
        )


@dataclass(frozen=True)
class Service:
    """Who served a number of layer-steps."""

    fast_steps: int = 0
    fallbacks: dict[str, int] = field(default_factory=dict)

    def __add__(self, other: Service) -> Service:
        return Service(self.fast_steps + other.fast_steps, dict(Counter(self.fallbacks) + Counter(other.fallbacks)))

    def __sub__(self, earlier: Service) -> Service:
        fallbacks = Counter(self.fallbacks) - Counter(earlier.fallbacks)
        return Service(self.fast_steps - earlier.fast_steps, dict(fallbacks))

    @property
    def fast_share(self) -> float:
        """Of all steps, between 0 and 1."""
        return self.fast_steps / max(1, self.fast_steps + sum(self.fallbacks.values()))


@dataclass(frozen=True)
class Speed:
    """Both sides; a ratio above 1 means that the patched one is faster."""

    upstream: Side
    patched: Side
    ratios: list[float]  # one a repeat: median step of the unpatched run / of the patched run
    step_ratios: list[float]  # one a step of each repeat
    service: Service  # of the timed patched runs, after their prefill

    @classmethod
    def of(
        cls, runs: Sequence[tuple[Run, Run]], peak_step_bytes: tuple[int | None, int | None], service: Service
    ) -> Speed:
        """From timed (unpatched, patched) runs and both sides' memory."""
        upstream = Side.of([before for before, _ in runs], peak_step_bytes[0])
        patched = Side.of([after for _, after in runs], peak_step_bytes[1])
        ratios = [ratio_of_medians(before.step_ms, after.step_ms) for before, after in runs]
        steps = [ratio for before, after in runs for ratio in step_ratios(before.step_ms, after.step_ms)]
        return cls(upstream, patched, ratios, steps, service)

    @property
    def ratio(self) -> Spread:
        """Over the repeats."""
        return Spread.of(self.ratios)


@dataclass(frozen=True)
class Start:
    """Of the first call of a side, from before it was patched or compiled."""

    first_s: float  # until the first token was there
    hundredth_s: float


@dataclass(frozen=True)
class Beside:
    """A side beside the two, and why it has no speed where it has none."""

    missing: str = ""  # why it was not run, or did not do what it is for
    failures: list[str] = field(default_factory=list)
    greedy: GreedyAgreement | None = None
    logits: LogitsDistance | None = None
    speed: Side | None = None


@dataclass(frozen=True)
class Sample:
    """What both sides wrote after one prompt: the first whose texts differ, else the first."""

    prompt: str
    upstream: str
    patched: str
    float32: str | None = None


@dataclass(frozen=True)
class Comparison:
    """The result. `speed` is None where the text is not right: a wrong answer has no speed."""

    setup: Setup
    parity: Parity
    speed: Speed | None
    sample: Sample
    beside: dict[str, Beside] = field(default_factory=dict)  # by side
    starts: dict[str, Start] = field(default_factory=dict)  # by side; none where nothing is compared beside the two

    @property
    def failures(self) -> list[str]:
        """Why no speed is claimed; what is wrong with Transformers' own compiled step is not among it."""
        own = self.beside.get(CUDA_GRAPH, Beside()).failures
        return [*self.parity.failures, *(f"with cuda_graph=True: {failure}" for failure in own)]

    @property
    def exit(self) -> Exit:
        """What follows from it, as the command's exit code says it."""
        if self.speed is None:
            return Exit.WRONG
        if self.speed.service.fast_steps == 0:
            switched_off = Reason.SWITCHED_OFF.value in self.speed.service.fallbacks
            return Exit.SWITCHED_OFF if switched_off else Exit.NOT_SERVED
        return Exit.TOO_FEW_RUNS if self.setup.repeat < MIN_REPEATS else Exit.RIGHT


class SideFailed(Exception):
    """A side raised, or had no memory left: `exit` says which, the cause is the error."""

    def __init__(self, what: str, side: str, exit_: Exit):
        super().__init__(what)
        self.what, self.side, self.exit = what, side, exit_
