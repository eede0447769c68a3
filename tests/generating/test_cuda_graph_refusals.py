"""`cuda_graph=True`: what cannot be captured stays eager and says why; what it does to a process is undone."""

from __future__ import annotations

import copy
import gc
import pickle
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from cuda_graph_stand_in import captured, stand_in
from models import LINEAR, PROMPT, USUAL, build, generate
from transformers import PreTrainedModel
from transformers.generation import utils

import qwen_fastdecode as qf
from qwen_fastdecode import graph
from qwen_fastdecode.graph import caches, call, eligible, install, state
from qwen_fastdecode.graph.capture import HostRead, NoHostReads
from qwen_fastdecode.upstream.sharding import Ranks

pytestmark = pytest.mark.usefixtures(stand_in.__name__)


def hook(model: Any) -> None:
    model.lm_head.register_forward_hook(lambda module, args, out: None)


def train(model: Any) -> None:
    model.train()


def subclass(model: Any) -> None:
    class Own(torch.nn.Parameter):
        pass

    model.lm_head.weight = Own(model.lm_head.weight.detach())


def flash(model: Any) -> None:
    model.config._attn_implementation = "flash_attention_2"


def quantized(model: Any) -> None:
    model.hf_quantizer = type("Quantizer", (), {"is_compileable": False})()


def ranks(model: Any) -> None:
    model._device_mesh = object()


MADE: dict[str, Callable[[Any], None]] = {
    "hooks on the model's modules": hook,
    "the model is in training mode": train,
    "weights of a tensor subclass": subclass,
    "a quantization that Transformers says cannot be compiled": quantized,
    "several ranks run the model together, and not by a tensor-parallel plan alone": ranks,
}


@pytest.mark.parametrize("reason", MADE)
def test_a_model_that_cannot_be_captured(reason: str) -> None:
    model = build()
    captured(model)
    MADE[reason](model)
    generate(model, 12)
    found = graph.describe(model)
    assert found.reasons == {reason: 1}
    assert found.captures == 0


def test_reasons_that_need_no_call(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    with torch.no_grad():
        assert eligible.model_reason(model, synced_ranks=False) is None
        assert eligible.model_reason(model, synced_ranks=True) is eligible.Eager.SEVERAL_RANKS
        two = Ranks(Mock(), 0, 2)
        assert eligible.model_reason(model, synced_ranks=False, ranks=two) is None
        model._device_mesh = Mock(size=lambda: 4)  # of which a tensor-parallel group is a part
        assert eligible.model_reason(model, synced_ranks=False, ranks=two) is eligible.Eager.SEVERAL_RANKS
        del model._device_mesh
        model.config.distributed_config = Mock(enable_expert_parallel=True)
        assert eligible.model_reason(model, synced_ranks=False, ranks=two) is eligible.Eager.SEVERAL_RANKS
        del model.config.distributed_config
        monkeypatch.setattr(eligible, "group_is_supported", lambda ranks: False)
        assert eligible.model_reason(model, synced_ranks=False, ranks=two) is eligible.Eager.GROUP
        with torch.autocast("cpu", torch.bfloat16):
            assert eligible.model_reason(model, synced_ranks=False) is eligible.Eager.AUTOCAST
        flash(model)
        assert eligible.model_reason(model, synced_ranks=False) is eligible.Eager.ATTENTION
        monkeypatch.setattr(eligible, "device_is_supported", lambda device: False)
        assert eligible.model_reason(model, synced_ranks=False) is eligible.Eager.NOT_ON_GPU
        monkeypatch.setattr(eligible.transformers, "__version__", "5.12.1")
        assert eligible.model_reason(model, synced_ranks=False) is eligible.Eager.OLD_TRANSFORMERS
    assert eligible.model_reason(build(), synced_ranks=False) is eligible.Eager.OLD_TRANSFORMERS


X, MASK, TWO = torch.ones(2, 3, 4), torch.eye(2, 3) > 0, torch.tensor([True, False, True])
COUNTED: dict[str, Callable[[], Any]] = {
    "what it picks": lambda: X[MASK],
    "many numbers": lambda: X.index_put_((MASK,), torch.ones(2, 4)),
    "a number that is added": lambda: X.index_put_((MASK,), torch.tensor(1.0), accumulate=True),
    "twice": lambda: torch.ones(3, 3).index_put_((TWO, TWO), torch.tensor(1.0)),
    "of another device": lambda: torch.ones(2, 3, device="meta").index_put_((MASK,), torch.tensor(1.0)),
    "beside an index": lambda: X.index_put_((MASK, torch.tensor([0, 1])), torch.tensor(1.0)),
}


@pytest.mark.parametrize("how", COUNTED)
def test_masks_that_are_counted_read_the_host(how: str) -> None:
    with pytest.raises(HostRead, match="reads values on the host"), NoHostReads():
        COUNTED[how]()


def test_a_mask_that_only_says_where_one_number_goes_is_not_counted() -> None:
    """A sharded embedding has it so, before it and after it; CUDA fills, and reads nothing."""
    tokens, out = torch.arange(6).view(2, 3), X.clone()
    with NoHostReads():
        tokens[MASK] = 0
        out[MASK, :] = 0.0
    assert tokens.tolist() == [[0, 1, 2], [3, 0, 5]]
    assert torch.equal(out, X * ~MASK[..., None])


class Wrapped(torch.nn.Module):
    """A head that does something else beside."""

    def __init__(self, head: torch.nn.Module, beside: Callable[[Any, torch.Tensor], None]):
        super().__init__()
        self.head, self.beside, self.calls = head, beside, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.beside(self, x)
        return self.head(x)


def reads_host(module: Any, x: torch.Tensor) -> None:
    module.calls += 1
    x.sum().item()


def counts(module: Any, x: torch.Tensor) -> None:
    module.calls += 1


SURPRISES = {
    "the step could not be captured": reads_host,
    "the step changes Python state, which a replay would not": counts,
}


@pytest.mark.parametrize("reason", SURPRISES)
@pytest.mark.filterwarnings("ignore:qwen_fastdecode, cuda_graph=True")
def test_a_step_that_surprises_is_left_to_eager(reason: str) -> None:
    model = build()
    model.lm_head = Wrapped(model.lm_head, SURPRISES[reason]).eval()
    expected = generate(model, 16)
    before = model.lm_head.calls
    captured(model)
    assert torch.equal(generate(model, 16), expected)
    assert model.lm_head.calls == 2 * before
    found = graph.describe(model)
    assert found.reasons == {reason: 1}
    assert found.replays == 0
    assert qf.status(model).fast_steps == 15 * LINEAR


@pytest.mark.filterwarnings("ignore:qwen_fastdecode, cuda_graph=True")
def test_after_two_failures_it_is_not_tried_again() -> None:
    model = build()
    model.lm_head = Wrapped(model.lm_head, reads_host).eval()
    captured(model)
    for _ in range(4):
        generate(model, 10)
    assert graph.describe(model).reasons == {
        "the step could not be captured": 2,
        "capturing this model failed twice before": 2,
    }


@pytest.mark.filterwarnings("ignore:qwen_fastdecode, cuda_graph=True")
def test_a_replay_that_differs_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    expected = generate(model, 16)
    captured(model)
    own = call.Graph.replay
    monkeypatch.setattr(call.Graph, "replay", lambda self, inputs: _off(own(self, inputs)))
    assert torch.equal(generate(model, 16), expected)
    assert graph.describe(model).reasons == {"the first replay differed from the eager step": 1}


def _off(outputs: Any) -> Any:
    outputs.logits = outputs.logits * 1.01
    return outputs


def test_slow_replays_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    expected = generate(model, 16)
    captured(model)
    monkeypatch.setattr(call, "worth_it", lambda eager_ms, replay_ms: False)
    assert torch.equal(generate(model, 16), expected)
    found = graph.describe(model)
    assert (found.reasons, found.replays) == ({"replaying was no faster than the eager step": 1}, 1)


def test_a_cache_with_python_numbers_is_not_captured() -> None:
    model = build()
    captured(model)
    own = caches._reviewed
    assert not own(type("Sliding", (caches._Dynamic,), {})())
    try:
        caches._reviewed = lambda layer: False  # type: ignore[assignment]
        generate(model, 12)
    finally:
        caches._reviewed = own
    assert graph.describe(model).reasons == {"a cache of layers that were not reviewed": 1}


def test_without_memory_for_a_copy_a_replay_is_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    expected = generate(model, 16)
    captured(model)
    monkeypatch.setattr(call, "free_bytes", lambda device: 0)
    assert torch.equal(generate(model, 16), expected)
    found = graph.describe(model)
    assert (found.captures, found.compared, found.replays) == (1, 0, 14)
    assert qf.status(model).fast_steps == 15 * LINEAR


def test_without_memory_for_the_cache_the_call_is_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    captured(model)
    monkeypatch.setattr(caches, "free_bytes", lambda device: 0)
    generate(model, 16)
    assert graph.describe(model).reasons == {"too little memory for a cache with fixed addresses": 1}


def test_what_is_taken_off_is_what_was_there() -> None:
    seams = [(seam.owner, seam.name) for seam in install.SEAMS]
    before = [vars(owner)[name] for owner, name in seams]
    model = build()
    settings, attributes = model.generation_config.to_dict(), set(vars(model))
    captured(model)
    generate(model, 12)
    pool = weakref.ref(state.state_of(model).pool(model.device))
    assert model.generation_config.to_dict() == settings
    assert vars(utils.GenerationMixin)["_sample"] is not before[1]
    qf.unpatch(model)
    assert all(vars(owner)[name] is one for (owner, name), one in zip(seams, before, strict=True))
    assert set(vars(model)) == attributes
    assert pool() is None
    assert model.generation_config.to_dict() == settings


def test_nothing_outlives_a_call() -> None:
    model, kept = build(), []
    captured(model)
    own = caches.GrowingCache.__init__

    def noted(self: Any, *args: Any) -> None:
        own(self, *args)
        kept.append(weakref.ref(self.static.layers[-1].keys))

    caches.GrowingCache.__init__ = noted  # type: ignore[method-assign]
    try:
        for batch in (1, 2, 1):
            generate(model, 12, PROMPT[:batch])
    finally:
        caches.GrowingCache.__init__ = own  # type: ignore[method-assign]
    gc.collect()
    assert len(kept) == 3
    assert all(keys() is None for keys in kept)


def test_a_call_that_raises_leaves_nothing() -> None:
    model = build()
    captured(model)

    def stop(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if ids.shape[1] > 12:
            raise KeyError("enough")
        return scores

    with pytest.raises(KeyError, match="enough"):
        generate(model, 20, logits_processor=[stop])
    assert vars(model)[state.STATE].current is None
    assert state.innermost() is None
    assert generate(model, 12).shape[1] == PROMPT.shape[1] + 12


def test_copies_and_pickles_are_upstreams() -> None:
    model = build()
    expected = generate(model, 16)
    captured(model)
    generate(model, 16)
    other = copy.deepcopy(model)
    assert torch.equal(generate(other, 16), expected)
    assert graph.describe(other) is None
    assert pickle.loads(pickle.dumps(vars(model)[state.STATE])) is None
    assert graph.describe(model).captures == 1


def test_a_call_within_a_call() -> None:
    """A processor that asks the same model, by beams and by sampling."""
    model = build()

    def asks(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if ids.shape[1] == 12:
            options = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None}
            bias = model.generate(PROMPT, **options)[:, -1] + model.generate(PROMPT, num_beams=2, **options)[:, -1]
            scores[:, 3] += bias * 0.01
        return scores

    expected = generate(model, 20, logits_processor=[asks])
    captured(model)
    assert torch.equal(generate(model, 20, logits_processor=[asks]), expected)
    found = graph.describe(model)
    assert found.captures == 2
    assert found.reasons == {"a way of generating other than greedy and sampling": 1}


def test_a_call_within_a_call_whose_prompt_comes_in_chunks() -> None:
    """By beams, as many as the outer call has sequences: its chunks are no steps of the outer call."""
    model = build()
    inner: list[torch.Tensor] = []

    def asks(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if ids.shape[1] == 12:
            options = {"num_beams": 2, "prefill_chunk_size": 2, "do_sample": False, "eos_token_id": None}
            inner.append(model.generate(PROMPT[:1], max_new_tokens=9, **options))
        return scores

    expected = generate(model, 20, logits_processor=[asks])
    captured(model)
    assert torch.equal(generate(model, 20, logits_processor=[asks]), expected)
    assert torch.equal(*inner)
    found = graph.describe(model)
    assert (found.captures, found.replays) == (1, 17)


def test_threads_with_the_same_model() -> None:
    model = build()
    prompts = [PROMPT + i for i in range(3)]
    expected = [generate(model, 16, prompt) for prompt in prompts]
    captured(model)
    found: dict[int, torch.Tensor] = {}

    def run(i: int) -> None:
        found[i] = generate(model, 16, prompts[i])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[i], expected[i]) for i in range(3))
    assert graph.describe(model).captures == 3
    # What one thread records is not what another one counts meanwhile.
    assert {layer.fast_steps for layer in qf.status(model).layers} == {3 * 15}


def test_experts_keep_grouped_mm_in_large_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("qwen3_5_moe")
    model.set_experts_implementation("grouped_mm")
    seen: list[str] = []
    own = PreTrainedModel.set_experts_implementation
    monkeypatch.setattr(PreTrainedModel, "device", torch.device("cpu"))
    monkeypatch.setattr(
        PreTrainedModel, "set_experts_implementation", lambda self, to: seen.append(to) or own(self, to)
    )
    captured(model)
    assert call._keeps_grouped(model, 8)
    assert not call._keeps_grouped(model, 7)
    expected = generate(model, 12, PROMPT.repeat(4, 1))
    assert graph.describe(model).grouped_calls == 1
    assert seen == []
    qf.patch(model, backend="torch")
    assert torch.equal(generate(model, 12, PROMPT.repeat(4, 1)), expected)
    assert model.config._experts_implementation == "grouped_mm"


def test_everything_serves_models_that_come_later() -> None:
    qf.patch(backend="torch", cuda_graph=True)
    model, excluded = build(), build(USUAL, seed=1)
    qf.unpatch(excluded)
    for one in (model, excluded):
        generate(one, 16)
    assert graph.describe(model).replays == 13
    assert graph.describe(excluded) is None
    qf.unpatch()
    assert not install._installed
    generate(model, 16)
    assert graph.describe() is None


def test_a_block_within_a_block() -> None:
    model = build()
    with qf.patched(model, backend="torch"):
        with qf.patched(model, backend="torch", cuda_graph=True):
            generate(model, 16)
            assert qf.status(model).graphs.replays == 13
        generate(model, 16)
        assert qf.status(model).graphs is None
        assert not install._installed


PROGRAM = """
import sys
sys.path.insert(0, {tests!r})
from models import build, generate
import qwen_fastdecode
for _ in range(2):
    generate(build(), 12)
print(qwen_fastdecode.status().graphs)
"""


@pytest.mark.slow
def test_a_program_that_is_not_edited(tmp_path: Path) -> None:
    """On this machine without a GPU it says so, of each call."""
    (tmp_path / "program.py").write_text(PROGRAM.format(tests=str(Path(__file__).parent.parent)))
    command = [
        sys.executable,
        "-m",
        "qwen_fastdecode",
        "run",
        "--backend",
        "torch",
        "--cuda-graph",
        "--report",
        "program.py",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "cuda_graph: eager: the model is not on a CUDA device: 2" in done.stdout, done.stderr
