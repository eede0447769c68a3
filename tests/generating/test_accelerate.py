"""accelerate's hooks keep bound copies of a layer's forward, and take weights away between calls."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_submodules
from models import CHECKPOINTS, LINEAR, TRAINED, build, generate, linear_layers, load, prompt
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import qwen_fastdecode as qf

NEW = 5
STEPS = LINEAR * (NEW - 1)


def dispatch(model: PreTrainedModel) -> None:
    """Hooks on every module, as a device map of several devices puts them."""
    dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)


def offload(model: PreTrainedModel) -> None:
    """Weights on the meta device between calls."""
    cpu_offload(model, execution_device=torch.device("cpu"))


def kept_forwards(model: PreTrainedModel) -> set[Any]:
    """The functions that the hooks call."""
    return {vars(layer)["_old_forward"].__func__ for layer in linear_layers(model)}


@pytest.fixture
def upstream() -> Any:
    return vars(type(linear_layers(build())[0]))["forward"]


@pytest.fixture
def expected() -> Tensor:
    return generate(build(), NEW)


@pytest.mark.parametrize("everything", [False, True])
def test_hooks_that_were_there_are_taken_along_and_given_back(
    upstream: Any, expected: Tensor, everything: bool
) -> None:
    model = build()
    dispatch(model)
    assert kept_forwards(model) == {upstream}
    assert qf.patch(None if everything else model).covered >= LINEAR
    assert torch.equal(generate(model, NEW), expected)
    assert qf.status(model).fast_steps == STEPS
    qf.unpatch(None if everything else model)
    assert kept_forwards(model) == {upstream}
    assert torch.equal(generate(model, NEW), expected)


def test_patch_of_everything_takes_along_hooks_put_on_later(upstream: Any, expected: Tensor) -> None:
    qf.patch()
    model = build()
    dispatch(model)
    assert torch.equal(generate(model, NEW), expected)
    assert qf.status(model).fast_steps == STEPS
    qf.unpatch()
    assert kept_forwards(model) == {upstream}


def test_hooks_that_came_after_the_patch_are_given_back(upstream: Any, expected: Tensor) -> None:
    model = build()
    qf.patch(model)
    dispatch(model)
    assert torch.equal(generate(model, NEW), expected)
    assert qf.status(model).fast_steps == STEPS
    qf.unpatch(model)
    assert kept_forwards(model) == {upstream}
    assert torch.equal(generate(model, NEW), expected)
    assert qf.status(model).fast_steps == 0


def test_hooks_removed_under_the_patch(upstream: Any, expected: Tensor) -> None:
    model = build()
    dispatch(model)
    qf.patch(model)
    remove_hook_from_submodules(model)  # leaves a bound forward on the instance
    assert torch.equal(generate(model, NEW), expected)
    assert qf.status(model).fast_steps == STEPS
    qf.unpatch(model)
    assert {vars(layer)["forward"].__func__ for layer in linear_layers(model)} == {upstream}
    qf.patch(model)
    generate(model, NEW)
    assert qf.status(model).fast_steps == STEPS


@pytest.mark.parametrize("offloaded_first", [False, True])
def test_offloaded_weights_are_upstreams_to_load(upstream: Any, expected: Tensor, offloaded_first: bool) -> None:
    model = build()
    for act in (offload, qf.patch) if offloaded_first else (qf.patch, offload):
        act(model)
    assert linear_layers(model)[0].A_log.device.type == "meta"
    assert torch.equal(generate(model, NEW), expected)
    assert qf.status(model).fast_steps == 0
    assert qf.status(model).fallbacks == {"more than one token": LINEAR, "hooks on conv1d or norm": STEPS}
    qf.unpatch(model)
    assert kept_forwards(model) == {upstream}
    assert torch.equal(generate(model, NEW), expected)


def test_a_layer_on_disk_falls_back_and_the_others_do_not(expected: Tensor, tmp_path: Path) -> None:
    model = build()
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{i}": "disk" if i == 1 else "cpu" for i in range(LINEAR + 1)}
    dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path)
    qf.patch(model)
    assert torch.equal(generate(model, NEW), expected)
    assert [layer.fast_steps for layer in qf.status(model).layers] == [NEW - 1, 0, NEW - 1]


def test_a_model_on_disk_is_upstreams_to_load(expected: Tensor, tmp_path: Path) -> None:
    model = build()
    disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    qf.patch(model)
    assert torch.equal(generate(model, NEW), expected)
    assert qf.status(model).fast_steps == 0
    assert qf.status(model).fallbacks == {"more than one token": LINEAR, "hooks on conv1d or norm": STEPS}


@pytest.mark.parametrize(
    ("memory", "fast_layers"), [(None, LINEAR), (2_400_000, 1)], ids=["all in memory", "most on disk"]
)
def test_device_map_auto(memory: int | None, fast_layers: int, tmp_path: Path) -> None:
    """transformers places the layers by the memory that it is given, and hooks those that it offloads."""
    checkpoint = TRAINED[1]
    expected = generate(load(checkpoint), NEW, prompt(checkpoint))
    model = AutoModelForCausalLM.from_pretrained(
        CHECKPOINTS / checkpoint,
        dtype=torch.float32,
        device_map="auto",
        max_memory=None if memory is None else {"cpu": memory},  # bytes
        offload_folder=tmp_path,
    )
    qf.patch(model)
    assert torch.equal(generate(model, NEW, prompt(checkpoint)), expected)
    assert [layer.fast_steps for layer in qf.status(model).layers] == [NEW - 1] * fast_layers + [0] * (
        LINEAR - fast_layers
    )
    offloaded = {"hooks on conv1d or norm": (LINEAR - fast_layers) * (NEW - 1)} if fast_layers < LINEAR else {}
    assert qf.status(model).fallbacks == {"more than one token": LINEAR} | offloaded


class LoadedAtUse(ModelHook):
    """A hook of somebody's own: the weight is what it ought to be only while the module is in use."""

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        module.weight.data.mul_(4)
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        module.weight.data.div_(4)
        return output


def test_a_hook_of_an_unknown_kind_is_upstreams_to_call(expected: Tensor) -> None:
    model = build()
    qf.patch(model)
    for layer in linear_layers(model):
        layer.conv1d.weight.data.div_(4)
        add_hook_to_module(layer.conv1d, LoadedAtUse())
    assert torch.equal(generate(model, NEW), expected)
    assert qf.status(model).fallbacks["hooks on conv1d or norm"] == STEPS


def test_a_copy_with_hooks_is_not_patched_and_can_be(upstream: Any, expected: Tensor) -> None:
    model = build()
    dispatch(model)
    qf.patch(model)
    twin = copy.deepcopy(model)
    qf.unpatch(model)
    assert torch.equal(generate(twin, NEW), expected)
    assert qf.status(twin).fast_steps == 0
    qf.patch(twin)
    generate(twin, NEW)
    assert qf.status(twin).fast_steps == STEPS
    qf.unpatch(twin)
    assert kept_forwards(twin) == {upstream}
