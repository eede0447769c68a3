"""Why a call of `generate` stays eager: asked before anything is done, so that such a call is upstream's own."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import transformers
from packaging.version import Version
from torch import Tensor, nn

from ..switch import switched_off
from ..upstream.protocols import CausalLM
from ..upstream.sharding import Ranks, is_part, is_split_otherwise, local_part
from .reasons import Eager

OLDEST = Version("5.13")
MODES = ("greedy_search", "sample")
ATTENTION = ("sdpa", "eager", None)
FEWEST = 6  # decode steps in which a capture, compared with an eager step, has paid for itself


def device_is_supported(device: torch.device) -> bool:
    """Tests replace this function."""
    return device.type == "cuda" and torch.version.hip is None


def is_old() -> bool:
    """Whether this release of Transformers is from before the oldest that is captured."""
    return Version(transformers.__version__) < OLDEST


def group_is_supported(ranks: Ranks) -> bool:
    """Whether the collectives of these ranks can be captured. Tests replace this function."""
    return "nccl" in dist.get_backend_config(ranks.group)


def config_reason(config: Any, mode: Any, use_cache: bool, cache_given: bool) -> Eager | None:
    """What the caller asked for, which is respected."""
    if getattr(mode, "value", mode) not in MODES or getattr(config, "is_assistant", False):
        return Eager.MODE
    if cache_given:
        return Eager.USER_CACHE
    if not use_cache:
        return Eager.NO_CACHE
    if config.cache_implementation is not None:
        return Eager.CACHE_IMPLEMENTATION
    if config.compile_config is not None:
        return Eager.COMPILE_CONFIG
    if config.disable_compile:
        return Eager.COMPILE_DISABLED
    return None


def model_reason(model: CausalLM, synced_ranks: bool, ranks: Ranks | None = None) -> Eager | None:
    """What the model is and how it lies, the cheapest questions first. ranks: that it is tensor parallel over."""
    if is_old():
        return Eager.OLD_TRANSFORMERS
    if switched_off():
        return Eager.SWITCHED_OFF
    if torch.is_grad_enabled():
        return Eager.GRAD_ENABLED
    device = model.device
    if torch.is_autocast_enabled(device.type):
        return Eager.AUTOCAST
    if synced_ranks or is_split_otherwise(model, ranks):
        return Eager.SEVERAL_RANKS
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not quantizer.is_compileable:
        return Eager.QUANTIZED
    return _weights_reason(model, device, ranks) or _modules_reason(model) or _settings_reason(model)


def _weights_reason(model: nn.Module, device: torch.device, ranks: Ranks | None) -> Eager | None:
    devices = {local_part(tensor).device for tensor in (*model.parameters(), *model.buffers())}
    if any(found.type in ("cpu", "meta") for found in devices) and any(found.type == "cuda" for found in devices):
        return Eager.OFFLOADED
    if len({(found.type, found.index) for found in devices}) > 1:
        return Eager.SEVERAL_DEVICES
    if not device_is_supported(device):
        return Eager.NOT_ON_GPU
    others = [weight for weight in model.parameters() if type(weight) not in (nn.Parameter, Tensor)]
    if any(ranks is None or not is_part(weight, ranks) for weight in others):
        return Eager.WEIGHT_TYPE
    if ranks is not None and not group_is_supported(ranks):
        return Eager.GROUP
    return None


def _modules_reason(model: nn.Module) -> Eager | None:
    hooks = nn.modules.module
    if hooks._global_forward_pre_hooks or hooks._global_forward_hooks:
        return Eager.HOOKS
    for module in model.modules():
        if module.training:
            return Eager.TRAINING
        if any(map(_is_foreign, (*module._forward_pre_hooks.values(), *module._forward_hooks.values()))):
            return Eager.HOOKS
        hook = vars(module).get("_hf_hook")
        if hook is not None and type(hook).__name__ != "AlignDevicesHook":
            return Eager.HOOKS
        if hook is not None and hook.offload:
            return Eager.OFFLOADED
    return None


def _is_foreign(hook: Any) -> bool:
    """Transformers collects hidden states with hooks of its own, which a capture records like everything else."""
    return not str(getattr(hook, "__module__", "")).startswith("transformers.")


def _settings_reason(model: CausalLM) -> Eager | None:
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "_attn_implementation", None) not in ATTENTION:
        return Eager.ATTENTION
    reads_host = getattr(config, "_experts_implementation", None) == "eager"
    if reads_host and any(type(module).__name__.endswith("Experts") for module in model.modules()):
        return Eager.EXPERTS
    return None
