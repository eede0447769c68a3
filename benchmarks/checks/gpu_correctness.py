"""Every tile against the float64 reference on the device itself, and what only a device can show."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context

import torch
from torch._dynamo.utils import counters

from benchmarks.checks.gpu_report import progress, write_section
from benchmarks.op.gpu_clock import Replay
from benchmarks.op.gpu_step import Shape, Step, check, compare, pick, random_step, worst_error
from benchmarks.op.gpu_table import shown
from qwen_fastdecode.ops.decode import gated_delta_decode
from qwen_fastdecode.ops.reference import decode_reference
from qwen_fastdecode.ops.step import Weights
from qwen_fastdecode.ops.triton import tiles
from qwen_fastdecode.ops.triton.clusters import clusters_reason
from qwen_fastdecode.ops.triton.gpu import INTERPRETED
from qwen_fastdecode.ops.triton.launch import decode_triton
from qwen_fastdecode.ops.triton.tiles import Tile
from qwen_fastdecode.upstream.families import FAMILIES, HeadSizes, Parts, reader

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
WORKERS = 12
LAUNCHES = 500  # upon one another: a program that shifts taps too early does not do so every time


@dataclass(frozen=True)
class Case:
    """A named check: `test(shape, tile, device)` returns errors to print, and raises AssertionError where it fails."""

    name: str
    test: Callable[..., dict]
    shape: Shape
    tile: Tile | None = None


def cases(dry_run: bool) -> list[Case]:
    """All of them; in a dry run, of a size that the interpreter does in a second."""
    found = [*_tile_cases(), *_shape_cases(), *_device_cases()]
    if dry_run:
        return [
            replace(case, shape=_shrink(case.shape), tile=case.tile and case.tile._replace(block_v=16))
            for case in found
        ]
    return found


def _shrink(s: Shape) -> Shape:
    DK, DV = (16, 32) if s.DK == s.DV else (24, 40)
    heads = None if s.heads is None else (s.R, s.R)
    lengths = s.lengths if isinstance(s.lengths, int) else s.lengths[:2]
    return replace(s, B=2, HK=2, DK=DK, DV=DV, heads=heads, lengths=lengths, cropped=min(s.cropped, 5))


def _tile_cases() -> Iterator[Case]:
    """Every candidate tile, on the ratios, layouts and dtypes that change the compiled code most."""
    kinds = {
        "split R2 bf16, fp32 state": Shape(),
        "split R2 bf16, bf16 state": Shape(state_dtype=BF16),
        "grouped R3 bf16, fp32 state": Shape(R=3, layout="grouped", B=3),
        "split R3 bf16, fp32 state": Shape(R=3),
        "split R4 bf16, fp32 state": Shape(R=4),
        "split R1 bf16, fp32 state": Shape(R=1),
        "split R1 fp32, fp32 state": Shape(R=1, dtype=FP32),
    }
    clusters = INTERPRETED or clusters_reason(torch.device("cuda")) is None
    for name, shape in kinds.items():
        for tile in tiles.candidates(128, shape.R, clusters):
            yield Case(f"tile {shown(tile)} {name}", _equals_reference, shape, tile)


def _shape_cases() -> Iterator[Case]:
    """The shipped tile on everything that the op accepts."""
    shapes = {
        **{f"R{R} {layout}": Shape(R=R, layout=layout) for R in (1, 2, 3, 4) for layout in ("split", "grouped")},
        **{f"R{R} bf16 state": Shape(R=R, state_dtype=BF16) for R in (1, 3, 4)},
        **{f"R{R} batch 32": Shape(R=R, B=32) for R in (1, 2, 3, 4)},  # the table has another tile for it
        **{f"R{R} batch 32 bf16 state": Shape(R=R, B=32, state_dtype=BF16) for R in (1, 2, 3, 4)},
        "fp16": Shape(dtype=FP16),
        "sigmoid gate": Shape(gate="sigmoid"),
        "misaligned views": Shape(guard=3),
        "misaligned views, grouped": Shape(guard=3, layout="grouped", R=3),
        "channel-last taps": Shape(channel_last=True),
        "taps cropped out of a longer past": Shape(cropped=5),
        "2 taps": Shape(W=2),
        "3 taps": Shape(W=3),
        "heads of a rank": Shape(heads=(8, 8)),
        "heads of a rank, 3 values a key": Shape(heads=(12, 24), R=3),
        "DK 96, DV 80": Shape(DK=96, DV=80),
        "64 heads, batch 300": Shape(R=4, B=300),
        "5 tokens": Shape(lengths=5, B=3),
        "5 tokens, grouped, bf16 state": Shape(lengths=5, B=3, layout="grouped", R=3, state_dtype=BF16),
        "ragged": Shape(lengths=(3, 0, 1, 7), R=4),
        "ragged heads": Shape(lengths=(2, 5, 1, 0), heads=(2, 6)),
    }
    for name, shape in shapes.items():
        yield Case(name, _equals_reference, shape)


def _device_cases() -> Iterator[Case]:
    yield Case("deterministic, T = 1", _is_deterministic, Shape(B=64))
    yield Case("deterministic, ragged", _is_deterministic, Shape(B=5, lengths=(3, 0, 9, 1, 4)))
    yield Case("graph replay equals eager", _replays_as_eager, Shape(B=32))
    yield Case("graph replay equals eager, few sequences", _replays_as_eager, Shape(B=4))
    yield Case("graph replay equals eager, one sequence", _replays_as_eager, Shape(B=1))
    yield Case("reduce-overhead equals eager", _recorded_by_the_compiler, Shape(B=32))
    yield Case("reduce-overhead equals eager, one sequence", _recorded_by_the_compiler, Shape(B=1))
    for R in (2, 3, 8):
        yield Case(f"taps are shifted once, R{R}, few sequences", _shifts_once, Shape(B=7, R=R))
        yield Case(f"taps are shifted once, R{R}, one sequence", _shifts_once, Shape(B=1, R=R))
    yield Case("side stream", _runs_on_side_stream, Shape(B=32))
    yield Case("NaN stays in its sequence", _contains_nan, Shape(B=8))
    yield Case("NaN stays in its sequence, of two", _contains_nan, Shape(B=2))
    yield Case("batch 4096, 32 heads: offsets past 2^31", _addresses_large_batch, Shape(B=4096))
    yield Case("taps whose channels lie 2^18 apart: offsets past 2^31", _equals_reference, Shape(B=1, cropped=2**18))
    yield Case("projections that return transposed products", _reads_transposed_projections, Shape(B=7))


def _equals_reference(shape: Shape, tile: Tile | None, device: torch.device) -> dict:
    return check(random_step(shape, device), partial(decode_triton, tile=tile))


def _reads_transposed_projections(shape: Shape, tile: Tile | None, device: torch.device) -> dict:
    """qwen3_5's projections, each as (weight @ x^T)^T: their features lie a batch apart."""
    step, hidden = random_step(shape, device), torch.randn(shape.B, 1, 64, device=device, dtype=shape.dtype)
    sizes = HeadSizes(shape.HK, shape.HV, shape.DK, shape.DV, shape.W)
    family = FAMILIES["qwen3_5"]
    weights = [torch.randn(n, 64, device=device, dtype=shape.dtype) / 8 for n in family.projection_sizes(sizes)]
    projections = [lambda x, weight=weight: (weight @ x[:, 0].T).T.unsqueeze(1) for weight in weights]
    parts = Parts(tuple(projections), None, None, None, Weights(*step.tensors[8:]))
    tokens = reader(family, sizes)(parts.project(hidden))
    return check(replace(step, tensors=(*tokens, *step.tensors[6:])), partial(decode_triton, tile=tile))


def _is_deterministic(shape: Shape, tile: Tile | None, device: torch.device) -> dict:
    step = random_step(shape, device)
    first = _results(step.twin())
    for repeat in range(20 if device.type == "cuda" else 1):
        for one, other in zip(first, _results(step.twin()), strict=True):
            assert torch.equal(one, other), f"repeat {repeat} differs from the first run"
    return {}


def _results(step: Step) -> tuple[torch.Tensor, ...]:
    return step.run(decode_triton), step.conv_state, step.recurrent_state


def _replays_as_eager(shape: Shape, tile: Tile | None, device: torch.device) -> dict:
    step = random_step(shape, device)
    eager, graphed = step.twin(), step.twin()
    replay = Replay([lambda: graphed.run(decode_triton)], device)
    for state, original in zip(graphed.tensors[6:8], step.tensors[6:8], strict=True):
        state.copy_(original)  # the capture was warmed up on it
    for _ in range(3):
        replay()
        expected = eager.run(decode_triton)
    assert torch.equal(replay.outputs[0], expected), "output"
    assert torch.equal(graphed.conv_state, eager.conv_state), "taps"
    assert torch.equal(graphed.recurrent_state, eager.recurrent_state), "state"
    return {}


def _recorded_by_the_compiler(shape: Shape, tile: Tile | None, device: torch.device) -> dict:
    """The first step of a kind is compiled inside torch.compile's own memory, where nothing of it may stay behind."""
    step = random_step(shape, device)
    eager, recorded = step.twin(), step.twin()

    def decode(*tensors: torch.Tensor) -> torch.Tensor:
        return gated_delta_decode(*tensors, **step.options, backend="triton")

    how = {"mode": "reduce-overhead"} if device.type == "cuda" else {"backend": "aot_eager"}
    compiled = torch.compile(decode, fullgraph=True, **how)
    for x in recorded.tensors:
        torch._dynamo.mark_static_address(x)  # as a cache's and a model's are
    for _ in range(4):  # warmed up, recorded, replayed
        out = compiled(*recorded.tensors).clone()
        assert torch.equal(out, decode(*eager.tensors)), "output"
    assert torch.equal(recorded.conv_state, eager.conv_state), "taps"
    assert torch.equal(recorded.recurrent_state, eager.recurrent_state), "state"
    skipped = counters["inductor"]["cudagraph_skips"]
    assert skipped == 0, f"{skipped} graphs were not recorded"
    return {}


def _shifts_once(shape: Shape, tile: Tile | None, device: torch.device) -> dict:
    """The table's tile, launch upon launch with new tokens each time, beside one whose programs share no taps."""
    step = random_step(shape, device)
    other = step.twin()
    alone = Tile(min(32, shape.DV), 4)
    for launch in range(LAUNCHES if device.type == "cuda" else 2):
        for x in step.tensors[:6]:
            x.normal_()
        out, expected = step.run(decode_triton), other.run(partial(decode_triton, tile=alone))
        assert torch.equal(step.conv_state, other.conv_state), f"taps, at launch {launch}"
        assert worst_error(out.unflatten(-1, (-1, shape.DV)), expected.unflatten(-1, (-1, shape.DV)), 1) < 1e-2
    return {}


def _runs_on_side_stream(shape: Shape, tile: Tile | None, device: torch.device) -> dict:
    """The state is made on a side stream behind a slow kernel: a launch on another stream would read it early."""
    if device.type != "cuda":
        return {}
    step = random_step(shape, device)
    expected = _results(step.twin())
    late, stream = step.twin(), torch.cuda.Stream()
    state = late.recurrent_state.clone()
    late.recurrent_state.zero_()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late.recurrent_state.copy_(state)
        results = _results(late)
    stream.synchronize()
    for one, other in zip(results, expected, strict=True):
        assert torch.equal(one, other), "did not wait for the stream it was called on"
    return {}


def _contains_nan(shape: Shape, tile: Tile | None, device: torch.device) -> dict:
    step = random_step(shape, device)
    clean, ill = step.twin(), step.twin()
    ill.recurrent_state[1] = float("nan")
    expected, got = _results(clean), _results(ill)
    healthy = torch.arange(shape.B, device=device) != 1
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one[healthy], other[healthy]), "another sequence changed"
    assert got[0][1].isnan().all()
    assert not got[0][healthy].isnan().any()
    return {}


def _addresses_large_batch(shape: Shape, tile: Tile | None, device: torch.device) -> dict:
    """8.6 GB of state for real. The reference does some sequences; all are compared with the batch in pieces."""
    step = random_step(shape, device)
    picked = torch.tensor([0, 1, shape.B // 2 - 1, shape.B // 2, shape.B - 1], device=device)
    law = pick(step, picked)
    pieces = [pick(step, piece) for piece in torch.arange(shape.B, device=device).split(512)]
    expected = law.run(decode_reference)
    outs = torch.cat([piece.run(decode_triton) for piece in pieces])
    out = step.run(decode_triton)
    assert step.damaged_guards() == 0, "wrote outside the tensors it was given"
    assert torch.equal(out, outs), "differs from the same batch in pieces of 512"
    for state, piece in zip(step.recurrent_state.split(512), pieces, strict=True):
        assert torch.equal(state, piece.recurrent_state), "state differs from that of a piece"
    return compare(out[picked], expected, pick(step, picked), law, shape.DV)


def run_case(index: int, dry_run: bool) -> dict:
    """One case, in whichever process; a failure is a result."""
    device = torch.device("cpu" if dry_run else "cuda")
    case = cases(dry_run)[index]
    try:
        return {"name": case.name, "passed": True, **case.test(case.shape, case.tile, device)}
    except Exception as error:
        text = f"{type(error).__name__}: {error}"[:500]
        return {"name": case.name, "passed": False, "error": text, "trace": traceback.format_exc()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="benchmarks/results/latest", help="folder for the JSON")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU, in Triton's interpreter")
    parser.add_argument("--match", default="", help="only the cases whose name contains this")
    arguments = parser.parse_args()
    todo = [i for i, case in enumerate(cases(arguments.dry_run)) if arguments.match in case.name]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with ProcessPoolExecutor(1 if arguments.dry_run else WORKERS, get_context("spawn")) as pool:
        results = list(progress(pool.map(run_case, todo, [arguments.dry_run] * len(todo)), "correctness", len(todo)))
    write_section(arguments.out, "correctness", results)
    failures = [result for result in results if not result["passed"]]
    for result in failures:
        print(f"FAILED {result['name']}: {result['error']}")
    print(f"correctness: {len(results) - len(failures)} of {len(results)} cases passed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
