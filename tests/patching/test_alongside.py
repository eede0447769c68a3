"""What a patched model meets in use: adapters, threads, replicas, inference mode, another dtype, being saved."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from models import LINEAR, PROMPT, build, forward, generate, linear_layers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import qwen_fastdecode as qf

NEW = 6
STEPS = LINEAR * (NEW - 1)


class Adapted(nn.Module):
    """A projection with a low-rank adapter beside it: its weight alone is not what it computes."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(base.in_features, 2), nn.Linear(2, base.out_features)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.base(hidden_states) + self.up(self.down(hidden_states))


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5"])
@pytest.mark.parametrize("patched_first", [False, True])
def test_projections_are_called_as_modules(family: str, patched_first: bool) -> None:
    model, plain = build(family), generate(build(family), NEW)
    if patched_first:
        qf.patch(model)
    torch.manual_seed(1)
    for layer in linear_layers(model):
        for name, module in list(layer.named_children()):
            if isinstance(module, nn.Linear):
                setattr(layer, name, Adapted(module))
    with pytest.MonkeyPatch.context() as off:
        off.setenv("QWEN_FASTDECODE", "0")
        expected = generate(model, NEW)
    assert not torch.equal(expected, plain)
    qf.patch(model)
    assert torch.equal(generate(model, NEW), expected)
    assert qf.status(model).fast_steps == STEPS


def test_threads_share_a_patched_model() -> None:
    model, prompts = build(), [PROMPT + i for i in range(4)]
    expected = [generate(model, NEW, prompt) for prompt in prompts]
    qf.patch(model)
    with ThreadPoolExecutor(4) as pool:
        actual = list(pool.map(lambda prompt: generate(model, NEW, prompt), prompts))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert qf.status(model).fast_steps == 4 * STEPS


def test_threads_meet_at_the_first_use_under_patch_of_everything() -> None:
    expected = generate(build(), NEW)
    qf.patch()
    model = build()
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(tokens, expected) for tokens in pool.map(lambda _: generate(model, NEW), range(4)))
    assert qf.status(model).fast_steps == 4 * STEPS


def test_inference_mode_leaves_nothing_behind_for_other_modes() -> None:
    model = build()
    expected = generate(model, NEW)
    qf.patch(model)
    with torch.inference_mode():
        assert torch.equal(generate(model, NEW), expected)
    assert torch.equal(generate(model, NEW), expected)
    assert qf.status(model).fast_steps == 2 * STEPS


def test_a_model_may_change_its_dtype_after_patching() -> None:
    model = build()
    qf.patch(model)
    generate(model, NEW)
    model.to(torch.bfloat16)
    generate(model, NEW)
    assert qf.status(model).fast_steps == 2 * STEPS


def test_a_patched_model_saves_what_an_unpatched_one_saves(tmp_path: Path) -> None:
    model = build()
    expected = generate(model, NEW)
    model.save_pretrained(tmp_path / "before")
    qf.patch(model)
    generate(model, NEW)
    model.save_pretrained(tmp_path / "patched")
    before, patched = ({f.name: f.read_bytes() for f in (tmp_path / when).iterdir()} for when in ("before", "patched"))
    assert patched == before
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "patched")
    assert torch.equal(generate(again, NEW), expected)
    assert qf.status(again).fast_steps == 0
    qf.patch(again)
    assert torch.equal(generate(again, NEW), expected)
    assert qf.status(again).fast_steps == STEPS


def replica(model: PreTrainedModel) -> PreTrainedModel:
    """As DataParallel makes one for each GPU: shallow copies of the modules, whose weights are plain tensors."""
    copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, copied in copies.items():
        for name, child in module.named_children():
            setattr(copied, name, copies[child])
        for name, parameter in module._parameters.items():
            setattr(copied, name, None if parameter is None else parameter.detach().clone())
    return copies[model]


@torch.no_grad()
def two_steps(model: nn.Module) -> Tensor:
    first = model(PROMPT, use_cache=True)
    return model(PROMPT[:, :1], past_key_values=first.past_key_values).logits


def test_data_parallel_and_its_replicas() -> None:
    model = build()
    _, cache = forward(model, PROMPT)
    expected, _ = forward(model, PROMPT[:, :1], cache)
    qf.patch(model)
    for each in (nn.DataParallel(model), replica(model)):
        assert torch.equal(two_steps(each).argmax(-1), expected.argmax(-1))
    assert qf.status(model).fast_steps == 2 * LINEAR  # replicas count on the plan that they share
    assert qf.status(nn.DataParallel(model)).covered == LINEAR
