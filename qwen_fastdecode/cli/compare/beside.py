"""What is compared beside Transformers and the patch: `cuda_graph=True`, and Transformers' own compiled step.

Neither is watched layer by layer, as a replay calls no Python: their text and their logits are judged.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import Any

from torch import Tensor

import qwen_fastdecode

from .generation import Clock, Run, forced_logits, generate
from .parity import GreedyAgreement, LogitsDistance, apart, differing_texts
from .result import COMPILED, CUDA_GRAPH, Beside, Side, SideFailed, Start
from .sides import HUNDRED, Sides, compiled, started, told

NAMES = (CUDA_GRAPH, COMPILED)
NOISE = 2.0  # times as far from upstream's logits as the patched side's, whose layers were checked one by one


def missing(model: Any, asked: Sequence[str] | None) -> dict[str, str]:
    """For each side that was asked for, why it cannot run; "" where it can."""
    from qwen_fastdecode.graph import eligible  # brings packages that are noisy before `silence_libraries`

    if not eligible.device_is_supported(model.device):
        why = "the model is not on a CUDA device"
    elif len({parameter.device for parameter in model.parameters()}) > 1:
        why = "the model is spread over several devices"
    else:
        why = ""
    return dict.fromkeys(NAMES if asked is None else asked, why)


class Judge:
    """What a side beside the two is held to."""

    def __init__(self, prompts: Sequence[str], exact: bool, text: Tensor, logits: Tensor, apart: float):
        self._prompts, self._exact = prompts, exact
        self.text = text  # Transformers', greedy
        self._logits = logits  # Transformers', of that text
        self._apart = apart  # how far the patched side's are from them, or may be

    def __call__(self, runs: Sequence[Run], logits: Tensor) -> tuple[GreedyAgreement, LogitsDistance, list[str]]:
        """The agreement, and what is wrong with it."""
        greedy = GreedyAgreement.between([(self.text, run.tokens) for run in runs], self._prompts)
        distance = LogitsDistance.between(self._logits, logits)
        if self._exact:
            return greedy, distance, differing_texts(greedy)
        found = distance.relative_rms
        right = found <= NOISE * self._apart  # false for NaN
        said = f"logits are {apart(found)} from upstream's, not within {NOISE:g} times {apart(self._apart)}"
        return greedy, distance, [] if right else [said]


def logits_of(sides: Sides, text: Tensor) -> Tensor:
    """Logits of the side that is on, over a given text."""
    return forced_logits(sides.model, *sides.comparable(text))


def captured(sides: Sides, judge: Judge) -> Beside:
    """The patch with `cuda_graph=True`, before any run of it is timed. `missing` says why nothing was captured."""

    def check() -> Beside:
        run, logits = sides.generate(), logits_of(sides, judge.text)
        found = qwen_fastdecode.status(sides.model).graphs
        greedy, distance, failures = judge([run], logits)
        why = "" if found is not None and found.replays else f"nothing was captured: {_reasons(found)}"
        return Beside(missing=why, failures=failures, greedy=greedy, logits=distance)

    return sides.run("text and logits", CUDA_GRAPH, check)


def _reasons(found: Any) -> str:
    return ", ".join(sorted(found.reasons)) if found is not None and found.reasons else "no call was long enough"


def run_compiled(sides: Sides, judge: Judge) -> tuple[Beside, Start | None]:
    """Transformers' compiled step, all in one go: leaving it loses what was compiled. Its failure is not ours."""
    sides.announce("everything", COMPILED)
    clock, begun = Clock(), perf_counter()
    try:
        with told("everything", COMPILED), compiled(sides.model):
            generate(sides.model, sides.batch, HUNDRED, clock)
            text, logits = sides.generate(), logits_of(sides, judge.text)
            runs = [sides.generate() for _ in range(sides.settings.repeat)]
    except SideFailed as failure:
        cause = failure.__cause__
        return Beside(missing=f"it raised {type(cause).__name__}: {str(cause).partition(chr(10))[0]}"), None
    greedy, distance, failures = judge([text, *runs], logits)
    speed = None if failures else Side.of(runs, None)
    return Beside(failures=failures, greedy=greedy, logits=distance, speed=speed), started(clock, begun)
