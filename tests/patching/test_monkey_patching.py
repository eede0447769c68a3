"""`transformers.monkey_patching` swaps classes while a model is built; a swapped layer is a class of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from models import LINEAR, TRAINED, generate, linear_layers, load, prompt
from torch import Tensor
from transformers import monkey_patching

import qwen_fastdecode as qf

NEW = 6


@pytest.fixture(autouse=True)
def _nothing_registered() -> Iterator[None]:
    yield
    monkey_patching.clear_patch_mapping()


def swap(checkpoint: str, **members: Any) -> type:
    """Registers a subclass of the checkpoint's layer class with these members."""
    upstream = type(linear_layers(load(checkpoint))[0])
    swapped = type(f"Swapped{upstream.__name__}", (upstream,), members)
    monkey_patching.register_patch_mapping({upstream.__name__: swapped})
    return swapped


@pytest.mark.parametrize("checkpoint", TRAINED)
@pytest.mark.parametrize("patched_first", [False, True])
def test_a_swapped_class_that_inherits_forward_is_fast(checkpoint: str, patched_first: bool) -> None:
    expected = generate(load(checkpoint), NEW, prompt(checkpoint)[:1])
    if patched_first:
        other = load(checkpoint)
        qf.patch(other)
    swapped = swap(checkpoint)
    model = load(checkpoint)
    assert {type(layer) for layer in linear_layers(model)} == {swapped}
    assert torch.equal(generate(model, NEW, prompt(checkpoint)[:1]), expected)
    assert qf.status(model).fast_steps == 0
    qf.patch(model)
    assert torch.equal(generate(model, NEW, prompt(checkpoint)[:1]), expected)
    assert qf.status(model).fast_steps == (NEW - 1) * LINEAR
    qf.unpatch(model)
    assert "forward" not in vars(swapped)
    assert torch.equal(generate(model, NEW, prompt(checkpoint)[:1]), expected)


@pytest.mark.parametrize("checkpoint", TRAINED)
def test_a_swapped_class_with_a_forward_of_its_own_is_refused(checkpoint: str) -> None:
    upstream = type(linear_layers(load(checkpoint))[0])

    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        return 2 * upstream.forward(self, *args, **kwargs)

    swap(checkpoint, forward=forward)
    model = load(checkpoint)
    expected = generate(model, NEW, prompt(checkpoint)[:1])
    with pytest.raises(qf.LayerNotCovered, match=r"Swapped.* overrides forward"):
        qf.patch(model)
    assert qf.patch(model, strict=False).covered == 0
    assert torch.equal(generate(model, NEW, prompt(checkpoint)[:1]), expected)
    assert qf.status(model).fast_steps == 0


@pytest.mark.parametrize("inside", [False, True])
def test_patching_while_classes_are_swapped_can_be_undone(inside: bool) -> None:
    checkpoint = TRAINED[1]
    expected = generate(load(checkpoint), NEW, prompt(checkpoint)[:1])
    swapped = swap(checkpoint)
    model = load(checkpoint)
    with monkey_patching.apply_patches():
        qf.patch(model)
        if inside:
            qf.unpatch(model)
    qf.unpatch(model)
    assert "forward" not in vars(swapped)
    assert torch.equal(generate(model, NEW, prompt(checkpoint)[:1]), expected)
    qf.patch(model)
    generate(model, NEW, prompt(checkpoint)[:1])
    assert qf.status(model).fast_steps == (NEW - 1) * LINEAR
