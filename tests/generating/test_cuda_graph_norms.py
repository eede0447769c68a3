"""Norms of a recorded step: stood in for where the bits are upstream's, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import FunctionType
from typing import Any

import pytest
import torch
from cuda_graph_stand_in import captured, stand_in_with_norms
from models import PROMPT, build, generate
from transformers.models.qwen3_5 import modeling_qwen3_5
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5RMSNorm

from qwen_fastdecode import graph
from qwen_fastdecode.graph import norms
from qwen_fastdecode.report import GraphStatus
from qwen_fastdecode.upstream.norms import zero_centred_norm

pytestmark = pytest.mark.usefixtures(stand_in_with_norms.__name__)


def counts(model: torch.nn.Module) -> GraphStatus:
    found = graph.describe(model)
    assert found is not None
    return found


def as_upstream_says(model: Any) -> GraphStatus:
    """Captures, and expects the tokens of before."""
    expected = generate(model, 24)
    captured(model)
    assert torch.equal(generate(model, 24), expected)
    return counts(model)


def plain_norms(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_next", "qwen3_5_moe", "qwen3_5 with vision"])
def test_every_norm_is_stood_in_for_while_a_step_is_recorded_and_only_then(family: str) -> None:
    model = build(family)
    found = as_upstream_says(model)
    # In PyTorch's order on a CPU, which is not the one that one kernel adds in.
    assert (found.norms, found.norms_in_three, found.norms_left) == (0, len(plain_norms(model)), {})
    assert found.worst == 0.0
    assert all("forward" not in vars(norm) for norm in plain_norms(model))


def as_upstreams_own(function: Any) -> FunctionType:
    """The function as if it stood in upstream's file."""
    return FunctionType(function.__code__, vars(modeling_qwen3_5))


def rounds_before_it_scales(self: Any, x: Any) -> Any:
    return (1.0 + self.weight) * self._norm(x.float() * 1.5).type_as(x) * 0.5


def forgets_epsilon(self: Any, x: Any) -> Any:
    return x * (x * x).mean(-1, keepdim=True).rsqrt()


@pytest.mark.parametrize(("name", "changed"), [("forward", rounds_before_it_scales), ("_norm", forgets_epsilon)])
def test_norms_that_compute_something_else_are_upstreams(
    name: str, changed: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Qwen3_5RMSNorm, name, as_upstreams_own(changed))
    model = build("qwen3_5")
    for norm in plain_norms(model):
        norm.eps = 0.5
    found = as_upstream_says(model)
    assert (found.norms_in_three, found.norms_left) == (0, {norms.DIFFERS: len(plain_norms(model))})


@pytest.mark.parametrize("name", ["forward", "_norm"])
def test_a_class_that_somebody_wrapped_keeps_what_he_put_there(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own, seen = vars(Qwen3_5RMSNorm)[name], []

    def wrapped(self: Any, x: Any) -> Any:
        seen.append(self)
        return own(self, x)

    monkeypatch.setattr(Qwen3_5RMSNorm, name, wrapped)
    model = build("qwen3_5")
    captured(model)
    generate(model, 24)
    found = counts(model)
    assert (found.captures, found.norms_in_three, found.norms_left) == (1, 0, {})
    eager_steps, recorded = 3, 1  # the prompt, the first step, and the one that the replay is compared with
    assert len(seen) == len(plain_norms(model)) * (eager_steps + recorded)


def test_a_norm_with_a_forward_or_an_epsilon_of_its_own() -> None:
    model = build("qwen3_5")
    mine, other = plain_norms(model)[:2]
    own = mine.forward
    mine.forward = lambda x: 2 * own(x)
    other.eps = 0.5
    found = as_upstream_says(model)
    assert found.norms_in_three == len(plain_norms(model)) - 1
    assert vars(mine)["forward"](torch.ones(1, 1, 32)).equal(2 * own(torch.ones(1, 1, 32)))


def test_a_recording_that_fails_leaves_no_stand_in() -> None:
    model = build("qwen3_5")
    own = model.model.norm.forward
    model.model.norm.forward = lambda x: own(x) * float(x.isfinite().all())  # a host read, at the end of the step
    captured(model)
    with pytest.warns(UserWarning, match="could not be captured"):
        generate(model, 24)
    assert all("forward" not in vars(norm) for norm in plain_norms(model) if norm is not model.model.norm)


def test_the_proof_draws_no_random_numbers_of_the_users() -> None:
    model = build("qwen3_5")
    captured(model)
    norms._known.clear()
    expected = torch.get_rng_state()
    generate(model, 24)
    assert torch.equal(torch.get_rng_state(), expected)


def test_threads_with_the_same_model() -> None:
    """A stand-in that one thread put in a norm's place is no change to the others, and is not theirs."""
    model = build("qwen3_5")
    prompts = [PROMPT + i for i in range(3)]
    expected = [generate(model, 16, prompt) for prompt in prompts]
    captured(model)
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda prompt: generate(model, 16, prompt), prompts))
    assert all(map(torch.equal, found, expected))
    assert (counts(model).captures, counts(model).reasons) == (3, {})


def test_another_thread_that_trains_keeps_its_gradients() -> None:
    norm = plain_norms(build("qwen3_5"))[0]
    facts = zero_centred_norm(norm)
    assert facts is not None
    with ThreadPoolExecutor(1) as recording:
        put_there = recording.submit(norms.StandIn, facts, norm.forward, {2: False}).result()
    out = put_there(torch.ones(2, 1, norm.weight.numel()))
    out.sum().backward()
    assert norm.weight.grad is not None  # our operator has no gradient
