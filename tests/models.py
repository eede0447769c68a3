"""Tiny models of every supported family, and what the tests read off them."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from qwen_fastdecode.layer.review import review
from qwen_fastdecode.upstream.seams import unwrap, upstream_classes

CHECKPOINTS = Path(__file__).parent.parent / "examples" / "checkpoints"
PROMPT = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])  # [2, 6]
LINEAR = 3  # gated DeltaNet layers of each tiny model; the fourth layer is full attention

COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": LINEAR + 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "initializer_range": 0.2,  # at 0.02 so small a model says the same token for ever
    "pad_token_id": 0,
    "eos_token_id": None,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
}
FEW_HEADS = {"linear_num_key_heads": 1, "linear_num_value_heads": 2}  # for Triton's interpreter: it takes each in turn
DENSE = {"intermediate_size": 48}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
}


def _heads(value_heads: int, value_size: int) -> dict[str, int]:
    return {"linear_num_value_heads": value_heads, "linear_value_head_dim": value_size}


def _qwen3_next(**changes: Any) -> PreTrainedModel:
    config = transformers.Qwen3NextConfig(**COMMON | DENSE | EXPERTS | _heads(4, 16) | changes)
    return transformers.Qwen3NextForCausalLM(config)


def _qwen3_5(**changes: Any) -> PreTrainedModel:
    config = transformers.Qwen3_5TextConfig(**COMMON | DENSE | _heads(6, 24) | changes)
    return transformers.Qwen3_5ForCausalLM(config)


def _qwen3_5_moe(**changes: Any) -> PreTrainedModel:
    config = transformers.Qwen3_5MoeTextConfig(**COMMON | EXPERTS | _heads(2, 24) | changes)
    return transformers.Qwen3_5MoeForCausalLM(config)


def _with_vision(name: str, text: dict[str, Any]) -> PreTrainedModel:
    config = getattr(transformers, f"{name}Config")(text_config=text, vision_config=VISION, pad_token_id=0)
    return getattr(transformers, f"{name}ForConditionalGeneration")(config)


def _qwen4_exp(gate: str) -> PreTrainedModel:
    config = transformers.Qwen4ExpTextConfig(**COMMON | EXPERTS | _heads(4, 16) | QWEN4 | {"output_gate_type": gate})
    return transformers.Qwen4ExpForCausalLM(config)


def _lara_mini(**changes: Any) -> PreTrainedModel:
    kinds = {"layer_types": ["linear_attention"] * LINEAR + ["full_attention"]}
    config = transformers.LaraMiniConfig(**COMMON | EXPERTS | _heads(4, 16) | kinds | changes)
    return transformers.LaraMiniForCausalLM(config)


def _olmo_hybrid(**changes: Any) -> PreTrainedModel:
    sizes = {name: size for name, size in COMMON.items() if name != "head_dim"}
    config = transformers.OlmoHybridConfig(**sizes | DENSE | _heads(4, 24) | changes)
    return transformers.OlmoHybridForCausalLM(config)


QWEN4 = {
    "hc_count": 2,
    "hc_lowrank": 8,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}
BUILDERS: dict[str, Callable[..., PreTrainedModel]] = {
    "qwen3_next": _qwen3_next,
    "qwen3_5": _qwen3_5,
    "qwen3_5_moe": _qwen3_5_moe,
    "qwen3_5 with vision": lambda: _with_vision("Qwen3_5", COMMON | DENSE | _heads(4, 16)),
    "qwen3_5_moe with vision": lambda: _with_vision("Qwen3_5Moe", COMMON | EXPERTS | _heads(4, 16)),
    "qwen4_exp": lambda: _qwen4_exp("silu"),
    "qwen4_exp, sigmoid gate": lambda: _qwen4_exp("sigmoid"),
    "lara_mini": _lara_mini,
    "olmo_hybrid": _olmo_hybrid,
    "olmo_hybrid, positive eigenvalues": lambda: _olmo_hybrid(linear_allow_neg_eigval=False),
}


def _has(family: str) -> bool:
    """Whether the installed Transformers has the family, in the form that is supported."""
    module = f"transformers.models.{family}"
    if importlib.util.find_spec(module) is None:
        return False
    older = family == "olmo_hybrid"  # which had another layer by the same name up to 5.14
    return not older or hasattr(importlib.import_module(f"{module}.modeling_{family}"), "causal_conv1d_update")


# What the installed Transformers has: qwen3_next from 4.57 on, qwen3_5 and its kin from 5.2 on, qwen4_exp from 5.16 on,
# lara_mini from 5.24 on.
FAMILIES = [name for name in BUILDERS if _has(name.split()[0].rstrip(","))]
TRAINED = tuple(f"{family}-tiny" for family in ("qwen3_next", "qwen3_5") if _has(family))
USUAL = "qwen3_5" if _has("qwen3_5") else "qwen3_next"  # the family of a test that is about no family


def build(family: str = USUAL, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random float32 model in evaluation mode, with memories of all lengths and a convolution that matters."""
    torch.manual_seed(seed)
    model = BUILDERS[family](**changes).eval()
    for layer in linear_layers(model):
        nn.init.uniform_(layer.dt_bias, -6, 1)  # upstream's constant forgets within a token or two
        nn.init.normal_(layer.conv1d.weight)
        nn.init.normal_((layer.o_norm if hasattr(layer, "o_norm") else layer.norm).weight, mean=1.0)
    return model


def load(checkpoint: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """One of the trained checkpoints, in evaluation mode."""
    return AutoModelForCausalLM.from_pretrained(CHECKPOINTS / checkpoint, dtype=dtype).eval()


def prompt(checkpoint: str) -> Tensor:
    """Beginnings of the text that a checkpoint was not trained on: [4, 12]."""
    text = (CHECKPOINTS / checkpoint / "held_out.txt").read_text(encoding="utf-8")
    tokens = AutoTokenizer.from_pretrained(CHECKPOINTS / checkpoint)(text, verbose=False)["input_ids"]
    return torch.tensor(tokens[: 4 * 12]).view(4, 12)


def linear_layers(model: nn.Module) -> list[Any]:
    """The gated DeltaNet layers, in order."""
    return [module for module in model.modules() if type(module).__name__.endswith("GatedDeltaNet")]


def generate(model: PreTrainedModel, new_tokens: int = 8, prompt: Tensor = PROMPT, **options: Any) -> Tensor:
    """Exactly `new_tokens` tokens a sequence, greedy unless the options say otherwise: [B, prompt + new_tokens]."""
    defaults = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": new_tokens}
    tokens = model.generate(prompt, attention_mask=torch.ones_like(prompt), **defaults | options)
    assert tokens.shape[1] == prompt.shape[1] + new_tokens
    return tokens


@torch.no_grad()
def forward(model: PreTrainedModel, tokens: Tensor, cache: Any = None, **options: Any) -> tuple[Tensor, Any]:
    """Logits [B, T, vocabulary] and the cache after them."""
    output = model(tokens, past_key_values=cache, use_cache=True, **options)
    return output.logits, output.past_key_values


def call_layer(layer: nn.Module, hidden_states: Tensor, cache: Any) -> Tensor:
    """A gated DeltaNet layer's output [B, T, hidden size], called as the decoder layer of this release calls it."""
    names = inspect.signature(unwrap(type(layer).forward)).parameters
    arguments = {"cache" if "cache" in names else "cache_params": cache, "attention_mask": None}
    if "cache_position" in names:  # up to 5.3, where it says no more than that there is one
        arguments["cache_position"] = torch.zeros(hidden_states.shape[1], dtype=torch.int64)
    return layer(hidden_states=hidden_states, **arguments)


def cache_tensors(cache: Any) -> Iterator[Tensor]:
    """Copies of every tensor that a cache holds, layer by layer."""
    if not hasattr(cache, "layers"):  # up to 5.4: lists, one tensor a layer
        for held in (cache.conv_states, cache.recurrent_states, cache.key_cache, cache.value_cache):
            yield from (tensor.clone() for tensor in held if tensor is not None)
        return
    for layer in cache.layers:
        for name in ("conv_states", "recurrent_states", "keys", "values"):
            held = getattr(layer, name, None)
            for tensor in held.values() if isinstance(held, dict) else [held]:
                if tensor is not None:
                    yield tensor.clone()


def judge_upstream() -> None:
    """Has every class of this release judged by the self-test now: a test may break a backend afterwards."""
    for upstream in upstream_classes(import_missing=True):
        review(upstream)


def fingerprint(model: nn.Module) -> str:
    """A hash of the names, shapes, dtypes and bytes of all weights."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def llama() -> PreTrainedModel:
    sizes = {name: value for name, value in (COMMON | DENSE).items() if not name.startswith("linear")}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()
