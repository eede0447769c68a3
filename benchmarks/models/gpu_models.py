"""Random-weight models of real shapes, built on the device: their speed is that of trained ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig
from transformers.models.qwen3_next.configuration_qwen3_next import Qwen3NextConfig

TINY = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 64,
}
TINY_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


@dataclass(frozen=True)
class ModelShape:
    """A model to build: what it is like, and its configuration."""

    name: str
    config: Any


def dense(layers: int, tiny: bool) -> ModelShape:
    """Qwen3.5 of 4B parameters at 32 layers: three gated DeltaNet layers to one of full attention."""
    sizes = TINY if tiny else {"hidden_size": 2560, "intermediate_size": 9216}
    config = Qwen3_5TextConfig(num_hidden_layers=layers, layer_types=_types(layers), tie_word_embeddings=True, **sizes)
    return ModelShape(f"qwen3_5, hidden {config.hidden_size}, {layers} layers", config)


def experts(layers: int, tiny: bool) -> ModelShape:
    """The first layers of Qwen3-Next 80B-A3B: 48 of them would not fit."""
    sizes = {**TINY, **TINY_EXPERTS, "shared_expert_intermediate_size": 16} if tiny else {}
    config = Qwen3NextConfig(num_hidden_layers=layers, layer_types=_types(layers), **sizes)
    return ModelShape(f"qwen3_next, hidden {config.hidden_size}, {layers} of 48 layers", config)


def _types(layers: int) -> list[str]:
    return ["full_attention" if i % 4 == 3 else "linear_attention" for i in range(layers)]


def build(shape: ModelShape, device: torch.device, dtype: torch.dtype) -> Any:
    """The model on `device`, in evaluation mode."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(shape.config, dtype=dtype)
    return model.eval()


MODELS = {"dense": dense, "experts": experts}
