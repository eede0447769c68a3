"""What takes the place of projections: adapters of peft, and weights of 8 and 4 bits by torchao and bitsandbytes."""

from __future__ import annotations

from pathlib import Path

import bitsandbytes
import pytest
import torch
from models import FAMILIES, LINEAR, TRAINED, build, generate, linear_layers, load, prompt
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torchao.core.config import AOBaseConfig
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_
from torchao.utils import TorchAOBaseTensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

import qwen_fastdecode as qf

NEW = 12
STEPS = LINEAR * (NEW - 1)


def say(model: nn.Module, checkpoint: str) -> list[list[int]]:
    return generate(model, NEW, prompt(checkpoint)[:2]).tolist()


def adapt(model: PreTrainedModel) -> PeftModel:
    """A random adapter on every projection of the gated DeltaNet layers."""
    projections = [name for name, part in linear_layers(model)[0].named_children() if isinstance(part, nn.Linear)]
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=projections, init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(model, config).eval()


@pytest.mark.parametrize("checkpoint", TRAINED)
@pytest.mark.parametrize("patched_first", [False, True])
def test_an_adapter_on_off_merged_and_gone(checkpoint: str, patched_first: bool) -> None:
    plain, expected = say(load(checkpoint), checkpoint), say(adapt(load(checkpoint)), checkpoint)
    assert plain != expected
    model = load(checkpoint)
    if patched_first:
        qf.patch(model)
    adapted = adapt(model)
    assert qf.patch(adapted).covered == LINEAR
    assert say(adapted, checkpoint) == expected
    with adapted.disable_adapter():
        assert say(adapted, checkpoint) == plain
    adapted.merge_adapter()
    assert say(adapted, checkpoint) == expected
    adapted.unmerge_adapter()
    assert say(adapted.merge_and_unload(), checkpoint) == expected
    assert qf.status(model).fast_steps == 4 * STEPS
    assert qf.status(model).fallbacks == {"more than one token": 4 * LINEAR}


WEIGHTS = {
    "int8": Int8WeightOnlyConfig(),
    "int4": IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(16)),
}


@pytest.mark.parametrize("checkpoint", TRAINED)
@pytest.mark.parametrize("config", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("patched_first", [False, True])
def test_projections_of_few_bits(checkpoint: str, config: AOBaseConfig, patched_first: bool) -> None:
    reference = load(checkpoint)
    quantize_(reference, config)
    model = load(checkpoint)
    for act in (qf.patch, lambda model: quantize_(model, config))[:: 1 if patched_first else -1]:
        act(model)
    weights = [part.weight for part in linear_layers(model)[0].children() if isinstance(part, nn.Linear)]
    assert len(weights) > 2
    assert all(isinstance(weight, TorchAOBaseTensor) for weight in weights)
    assert say(model, checkpoint) == say(reference, checkpoint)
    assert qf.status(model).fast_steps == STEPS
    assert qf.status(model).fallbacks == {"more than one token": LINEAR}


LOADED = {
    "Linear8bitLt": BitsAndBytesConfig(load_in_8bit=True),
    "Linear4bit": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    ),
}
# On CPUs with avx512_bf16, bitsandbytes packs weights of 4 bits in blocks of 32 outputs and 64 inputs, and refuses
# others, the gate of a shared expert with its one output among them. So every layer is dense here, and 32 is the least
# number of value heads: b and a have one output each.
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "head_dim": 32,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
DENSE = {"qwen3_next": {"mlp_only_layers": [*range(LINEAR + 1)]}, "qwen3_5": {}}


@pytest.mark.parametrize("family", [family for family in DENSE if family in FAMILIES])
@pytest.mark.parametrize("kind", LOADED)
def test_a_checkpoint_loaded_in_few_bits(family: str, kind: str, tmp_path: Path) -> None:
    build(family, **SIZES, **DENSE[family]).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, quantization_config=LOADED[kind], device_map={"": "cpu"}
    ).eval()
    projections = [part for part in linear_layers(model)[0].children() if isinstance(part, nn.Linear)]
    assert len(projections) > 2
    assert all(isinstance(part, getattr(bitsandbytes.nn, kind)) for part in projections)
    expected = generate(model, NEW)
    qf.patch(model)
    assert torch.equal(generate(model, NEW), expected)
    assert qf.status(model).fast_steps == STEPS
    assert qf.status(model).fallbacks == {"more than one token": LINEAR}
