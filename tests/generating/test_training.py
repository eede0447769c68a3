"""Training between generates: to the bit as without the patch, gradient checkpointing or not."""

from __future__ import annotations

import pytest
import torch
from models import LINEAR, PROMPT, build, fingerprint, generate
from transformers import PreTrainedModel

import qwen_fastdecode as qf

NEW, ROUNDS = 5, 3
STEPS = LINEAR * (NEW - 1)


def train(model: PreTrainedModel, checkpointing: bool) -> list[object]:
    """Losses, what was said after each step, and the weights that came of it."""
    torch.manual_seed(5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    seen: list[object] = []
    for _ in range(ROUNDS):
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        loss = model(PROMPT, labels=PROMPT, use_cache=False).loss
        loss.backward()
        seen += [loss.item(), [parameter.grad.clone() for parameter in model.parameters()]]
        optimizer.step()
        optimizer.zero_grad()
        model.gradient_checkpointing_disable()
        model.eval()
        seen.append(generate(model, NEW))
    return [*seen, fingerprint(model)]


def same(actual: object, expected: object) -> bool:
    """Equal to the bit."""
    if isinstance(expected, list):
        return all(map(same, actual, expected)) and len(actual) == len(expected)
    return torch.equal(actual, expected) if isinstance(expected, torch.Tensor) else actual == expected


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_between_generates_is_bit_identical(family: str, checkpointing: bool) -> None:
    expected = train(build(family), checkpointing)
    assert expected[0] != expected[3]  # losses: it does learn
    model = build(family)
    qf.patch(model)
    assert same(train(model, checkpointing), expected)
    assert qf.status(model).fast_steps == ROUNDS * STEPS
    passes = 3 if checkpointing else 2  # the loss (once more in the backward pass), and the prompt of the text
    assert qf.status(model).fallbacks == {"more than one token": ROUNDS * passes * LINEAR}


def test_a_model_in_training_mode_decodes_fast_without_gradients() -> None:
    model = build().train()
    expected = generate(model, NEW)
    qf.patch(model)
    assert torch.equal(generate(model, NEW), expected)
    assert qf.status(model).fast_steps == STEPS
