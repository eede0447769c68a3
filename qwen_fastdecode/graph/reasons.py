"""Why decode steps of a `generate` call run eagerly. The texts are the keys of `describe(model).reasons`."""

from __future__ import annotations

from enum import Enum


class Eager(str, Enum):
    """A call, or the rest of one, that was not captured, by its cause."""

    OLD_TRANSFORMERS = "Transformers before 5.13, whose generate has no static cache of these layers"
    SWITCHED_OFF = "switched off by QWEN_FASTDECODE=0"
    NOT_ON_GPU = "the model is not on a CUDA device"
    SEVERAL_DEVICES = "weights lie on several devices"
    OFFLOADED = "weights are offloaded"
    SEVERAL_RANKS = "several ranks run the model together, and not by a tensor-parallel plan alone"
    GROUP = "ranks that are not joined by NCCL"
    ANOTHER_RANK = "another rank of the model goes on eagerly"
    WEIGHT_TYPE = "weights of a tensor subclass"
    QUANTIZED = "a quantization that Transformers says cannot be compiled"
    TRAINING = "the model is in training mode"
    AUTOCAST = "autocast is on"
    GRAD_ENABLED = "gradients are enabled"
    HOOKS = "hooks on the model's modules"
    ATTENTION = "an attention implementation other than sdpa and eager"
    EXPERTS = "experts run by the implementation 'eager', which reads the host"
    USER_CACHE = "the caller passed a cache"
    CACHE_IMPLEMENTATION = "the caller chose a cache_implementation"
    COMPILE_CONFIG = "the caller chose a compile_config"
    COMPILE_DISABLED = "the caller set disable_compile"
    NO_CACHE = "the caller set use_cache=False"
    MODE = "a way of generating other than greedy and sampling"
    UNKNOWN_CACHE = "a cache of layers that were not reviewed"
    MEMORY = "too little memory for a cache with fixed addresses"
    FEW_TOKENS = "too few tokens to be worth a capture"
    CAPTURE_FAILED = "the step could not be captured"
    FAILED_BEFORE = "capturing this model failed twice before"
    SIDE_EFFECT = "the step changes Python state, which a replay would not"
    DIFFERS = "the first replay differed from the eager step"
    NOT_FASTER = "replaying was no faster than the eager step"
    CHANGING = "the model or its cache kept changing during the call"
    UNPATCHED = "the patch was taken off during the call"

    def __str__(self) -> str:
        return self.value
