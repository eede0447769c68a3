"""The arithmetic of the comparison: spreads, distances, the gate, who served what, and how numbers are written."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable

import pytest
import torch
from rich.console import Console

from qwen_fastdecode.cli.arguments import Exit
from qwen_fastdecode.cli.compare.generation import Clock, ForcedTokens, Run, encode
from qwen_fastdecode.cli.compare.layerwise import LayerDistance
from qwen_fastdecode.cli.compare.memory import StepMark, _cuda_step_bytes, peak_within
from qwen_fastdecode.cli.compare.parity import (
    MAX_LOGITS,
    Float32Distance,
    GreedyAgreement,
    LogitsDistance,
    Parity,
    comparable_part,
)
from qwen_fastdecode.cli.compare.render import as_json, number, percent, quality, sample_panel, size, verdict
from qwen_fastdecode.cli.compare.result import Comparison, Sample, Service, Setup, Speed
from qwen_fastdecode.cli.compare.statistics import Spread, ratio_of_medians, step_ratios
from qwen_fastdecode.cli.compare.upstream import UpstreamKernels
from qwen_fastdecode.errors import BadInput
from qwen_fastdecode.reasons import Reason

SAME_TEXT = GreedyAgreement(4, 4, None)
OTHER_TEXT = GreedyAgreement(4, 3, 7, 2)
PROMPTS = ("one", "two")
SERVED = Service(9, {})
SWITCHED_OFF = Reason.SWITCHED_OFF.value


def parity(
    dtype: str = "float32",
    layer: float = 0.0,
    noise: tuple[float, float] | None = None,
    float32: Float32Distance | None = None,
    greedy: GreedyAgreement = SAME_TEXT,
    state_dtype: str | None = None,
) -> Parity:
    logits = LogitsDistance(10, 0.0, 0.5, 0.0, 0.0, 1.0)
    step = LayerDistance(layer, "layers.0 output", 9, *(noise or (None, None)))
    return Parity(dtype, step, logits, greedy, float32, "", state_dtype)


def run(*step_ms: float) -> Run:
    return Run(1.0, list(step_ms), torch.zeros(2, len(step_ms) + 1, dtype=torch.int64))


def comparison(
    *runs: tuple[Run, Run], kl: float = 0.0, service: Service = SERVED, checked: Parity | None = None
) -> Comparison:
    kernels = UpstreamKernels("PyTorch reference (a.b)", "PyTorch reference (a.c)", "PyTorch reference (a.D)")
    sizes = (1, 2, 5, 4, len(runs))
    setup = Setup("m", "qwen3_next", "torch", 4, 3, kernels, "float32", "cpu", "a CPU", *sizes, {"python": "3"})
    logits = LogitsDistance(10, 0.0, 0.0, kl, kl, 1.0)
    speed = Speed.of(runs, (100, 50), service) if runs else None
    checked = checked or Parity("float32", LayerDistance(), logits, SAME_TEXT)
    return Comparison(setup, checked, speed, Sample("p", "t", "t"))


def test_spread_and_ratios() -> None:
    assert Spread.of([3.0, 1.0, 100.0]) == Spread(3.0, 1.0, 100.0)
    assert ratio_of_medians([4.0, 4.0, 400.0], [2.0, 2.0, 2.0]) == 2.0
    assert step_ratios([4.0, 9.0], [2.0, 3.0]) == [2.0, 3.0]
    with pytest.raises(ValueError, match="shorter"):
        step_ratios([4.0, 9.0], [2.0])


def test_speed_of_runs() -> None:
    speed = Speed.of([(run(4, 4, 40), run(2, 2, 2)), (run(9, 9, 9), run(3, 3, 3))], (100, 50), Service(9, {}))
    assert speed.ratios == [2.0, 3.0]
    assert speed.ratio == Spread(2.5, 2.0, 3.0)
    assert speed.step_ratios == [2.0, 2.0, 20.0, 3.0, 3.0, 3.0]
    assert speed.upstream.step_ms == Spread(9, 4, 40)
    # 2 sequences, 3 decode steps: the first of 4 new tokens is the prefill's.
    assert speed.patched.tokens_per_second == Spread(*(1e3 * 6 / ms for ms in (7.2, 9.0, 6.0)))


def test_logits_distance_of_known_distributions() -> None:
    p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
    upstream, patched = torch.stack([p, p])[None].log(), torch.stack([p, q])[None].log()
    distance = LogitsDistance.between(upstream, patched)
    assert distance.positions == 2
    assert distance.max_abs == pytest.approx(math.log(2), rel=1e-6)
    kl = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert distance.max_kl == pytest.approx(kl, rel=1e-6)
    assert distance.mean_kl == pytest.approx(kl / 2, rel=1e-6)
    squares = math.log(2) ** 2 + math.log(1.5) ** 2
    assert distance.relative_rms == pytest.approx(math.sqrt(squares / (4 * math.log(2) ** 2)), rel=1e-6)
    assert distance.top1_agreement == 0.5


def test_greedy_agreement_counts_prompts_and_not_runs_or_copies() -> None:
    text = torch.tensor([[1, 2, 3], [4, 5, 6]])
    other = torch.tensor([[1, 2, 9], [4, 5, 6]])
    early = torch.tensor([[1, 2, 3], [4, 9, 9]])
    assert GreedyAgreement.between([(text, text)], PROMPTS) == GreedyAgreement(2, 2, None, None)
    assert GreedyAgreement.between([(text, text), (text, early)], PROMPTS) == GreedyAgreement(2, 1, 1, 1)
    assert GreedyAgreement.between([(text, other), (text, early)], PROMPTS) == GreedyAgreement(2, 0, 1, 0)
    assert GreedyAgreement.between([(text, early)], ("one", "one")) == GreedyAgreement(1, 0, 1, 1)


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        (parity(), None),
        (parity(greedy=OTHER_TEXT), "greedy texts differ in float32, from new token 7 on"),
        (parity("bfloat16", greedy=OTHER_TEXT), None),
        (parity(greedy=OTHER_TEXT, state_dtype="bfloat16"), None),
        (parity(greedy=OTHER_TEXT, state_dtype="float32"), "greedy texts differ in float32, from new token 7 on"),
        (parity("bfloat16", layer=9.9e-3), None),
        (
            parity("bfloat16", layer=1.1e-2),
            "a layer step (layers.0 output) is 1.1e-02 from upstream's, not below 1.0e-02",
        ),
        (parity("bfloat16", layer=math.nan), "a layer step (layers.0 output) is nan from"),
        (parity("float32", layer=9e-5), None),
        (parity("float32", layer=1.1e-4), "a layer step (layers.0 output) is 1.1e-04 from upstream's, not below 1.0e"),
        (parity("float32", layer=9e-3, state_dtype="bfloat16"), None),
        (parity("bfloat16", noise=(3e-3, 3.2e-3)), None),
        (parity("bfloat16", noise=(3e-3, 3.4e-3)), "layer steps are 3.4e-03 from float32, not within 1.1 times upstre"),
        (parity("bfloat16", noise=(3e-3, 3.4e-3), state_dtype="bfloat16"), None),
        (parity("bfloat16", noise=(3e-3, math.nan)), "layer steps are nan from float32"),
        (parity("bfloat16", float32=Float32Distance(4.8e-2, 4.9e-2, 1, 1)), None),
        (
            parity("bfloat16", float32=Float32Distance(1e-2, 2.1e-2, 1, 1)),
            "logits are 2.1e-02 from float32, not",
        ),
        (parity("bfloat16", float32=Float32Distance(1e-2, math.nan, 1, 1)), "logits are nan from float32"),
    ],
)
def test_gate(result: Parity, reason: str | None) -> None:
    if reason is None:
        assert result.failures == []
    else:
        assert len(result.failures) == 1
        assert result.failures[0].startswith(reason)


def test_comparable_part_prefers_long_texts() -> None:
    assert comparable_part(8, 100, 1000) == (8, 100)
    assert comparable_part(8, 100, MAX_LOGITS // 250) == (2, 100)
    assert comparable_part(8, 100, MAX_LOGITS // 50) == (1, 50)


def test_service_of_a_part() -> None:
    after_prefill, at_end = (
        Service(0, {"more than one token": 3}),
        Service(9, {"more than one token": 3, "autocast": 3}),
    )
    served = at_end - after_prefill
    assert served == Service(9, {"autocast": 3})
    assert served.fast_share == 0.75
    assert served + served == Service(18, {"autocast": 6})
    assert Service().fast_share == 0


def test_peak_within_a_span_counts_from_its_beginning() -> None:
    def memory(ts: float, change: int) -> dict:
        return {"name": "[memory]", "ph": "i", "ts": ts, "args": {"Bytes": change, "Ev Idx": int(ts)}}

    events = [memory(1, 1000), memory(4, -10), memory(3, 30), memory(5, 25), memory(6, -45), memory(12, 500)]
    span = {"name": "step", "ph": "X", "ts": 2, "dur": 8}
    assert peak_within([span, *events], "step") == 45
    assert peak_within([span], "step") == 0


def test_memory_of_a_step_on_a_gpu_starts_from_what_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: asked.append("reset"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: asked.append("before") or 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: asked.append("peak") or 175)

    def generate(begin: Callable[[], None], end: Callable[[], None]) -> None:
        mark = StepMark(begin, end)
        for token in range(5):  # the prompt, the prefill's, and three decode steps: the second of these is watched
            asked.append(str(token))
            mark.put(torch.zeros(1))

    assert _cuda_step_bytes(generate, torch.device("cuda")) == 75
    assert asked == ["0", "1", "2", "reset", "before", "3", "peak", "4"]


def test_clock_leaves_out_what_happens_between_prefill_and_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([10.0, 11.0, 15.0, 17.0, 20.0])
    monkeypatch.setattr("qwen_fastdecode.cli.compare.generation.perf_counter", lambda: next(seconds))
    called = []
    clock = Clock(after_prefill=lambda: called.append(True))
    for _ in range(4):  # the prompt and three tokens
        clock.put(torch.zeros(1))
    assert called == [True]
    assert clock.prefill_ms == 1000
    assert clock.step_ms == [2000, 3000]


def test_forced_tokens_leave_no_choice() -> None:
    forced = ForcedTokens(torch.tensor([[3, 1], [0, 2]]), prompt_length=5)
    scores = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    assert forced(torch.zeros(2, 5), scores).argmax(1).tolist() == [3, 0]
    assert forced(torch.zeros(2, 6), scores).argmax(1).tolist() == [1, 2]


def test_encode_pads_on_the_left() -> None:
    class Letters:
        pad_token_id = None

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [ord(letter) for letter in text]}

    batch = encode(Letters(), ["ab", "c"], torch.device("cpu"))
    assert batch["input_ids"].tolist() == [[97, 98], [0, 99]]
    assert batch["attention_mask"].tolist() == [[1, 1], [0, 1]]
    with pytest.raises(BadInput, match="'' has no tokens"):
        encode(Letters(), ["ab", ""], torch.device("cpu"))


def test_numbers_as_written() -> None:
    assert [number(x) for x in (1234.5, 99.94, 12.345, 1.234, 0.01234, 0.0)] == [
        "1234",
        "99.9",
        "12.3",
        "1.23",
        "0.012",
        "0",
    ]
    assert [size(x) for x in (0, 999, 1500, 2_000_000, 3_210_000_000)] == [
        "0 B",
        "999 B",
        "1.50 kB",
        "2.00 MB",
        "3.21 GB",
    ]
    assert [percent(x) for x in (1.0, 0.99999, 0.5, 0.0)] == ["100 %", "99.9 %", "50 %", "0 %"]


def test_verdict_claims_only_what_every_repeat_shows() -> None:
    twice, thrice, half = (run(4, 4), run(2, 2)), (run(6, 6), run(2, 2)), (run(2, 2), run(4, 4))
    clear = verdict(comparison(twice, twice, thrice)).plain
    assert clear == "Same text; decodes 2.00x as fast (2.00x to 3.00x in 3 repeats)"
    assert "no clear difference in speed" in verdict(comparison(twice, thrice, half)).plain
    assert "no speed is reported" in verdict(comparison()).plain


def test_every_outcome_has_its_own_headline_and_exit_code() -> None:
    runs = [(run(4, 4), run(2, 2))] * 3
    outcomes = {
        Exit.RIGHT: (comparison(*runs), "Same text; decodes 2.00x as fast"),
        Exit.WRONG: (comparison(), "The patched model is WRONG here"),
        Exit.SWITCHED_OFF: (
            comparison(*runs, service=Service(0, {SWITCHED_OFF: 9})),
            "Switched off: QWEN_FAST",
        ),
        Exit.NOT_SERVED: (comparison(*runs, service=Service(0, {"autocast is on": 9})), "Nothing was served fast"),
        Exit.TOO_FEW_RUNS: (comparison(runs[0]), "Same text.\nNo word on speed: 1 repeat cannot show a spread"),
    }
    for code, (result, headline) in outcomes.items():
        assert result.exit is code
        assert verdict(result).plain.startswith(headline)
        assert ("x as fast" in verdict(result).plain) is (code is Exit.RIGHT)
    partly = verdict(comparison(*runs, service=Service(1, {"autocast is on": 2}))).plain
    assert partly.endswith("Only 33.3 % of the decode steps were served fast.")


def test_other_texts_are_counted_beside_those_of_float32() -> None:
    runs = [(run(4, 4), run(2, 2))] * 3
    checked = parity("bfloat16", greedy=OTHER_TEXT, float32=Float32Distance(1e-2, 1e-2, 2, 1))
    assert verdict(comparison(*runs, checked=checked)).plain.startswith(
        "Same quality, other rounding: 3 of 4 texts identical to upstream's, 1 of 4 to float32's (upstream: 2 of 4); "
        "decodes 2.00x"
    )
    assert "Layer steps as right as upstream's, other rounding: 3 of 4" in quality(
        parity("bfloat16", greedy=OTHER_TEXT)
    )


def test_texts_that_part_are_shown_from_there_on() -> None:
    console = Console(file=io.StringIO(), width=80)
    console.print(sample_panel(Sample("Once", " upon a time", " upon a hill", " upon a time")))
    text = console.file.getvalue()
    assert text.count("upon a") == 1
    for line in ("Transformers: time", "with the patch: hill", "in float32: as Transformers'"):
        assert f"... {line}" in text


def test_json_has_no_nan() -> None:
    data = as_json(comparison((run(4, 4), run(2, 2)), kl=math.inf))
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert data["parity"]["logits"]["mean_kl"] is None
    assert data["parity"]["green"] is True
    assert (data["schema_version"], data["exit_code"], data["outcome"]) == (1, 5, "too few runs")
    assert data["speed"]["ratio"] == {"median": 2.0, "min": 2.0, "max": 2.0}
    assert as_json(comparison())["speed"] is None
