"""Why a call is not a fast decode step. The texts are the keys of `status().fallbacks`."""

from __future__ import annotations

from enum import Enum


class Reason(str, Enum):
    """A call that upstream's own forward serves, by its cause."""

    SWITCHED_OFF = "switched off by QWEN_FASTDECODE=0"
    SEVERAL_TOKENS = "more than one token"
    NO_CACHE = "no cache"
    NO_CACHE_POSITION = "no cache position"  # up to Transformers 5.3, whose models pass one
    NO_PREVIOUS_STATE = "no previous state"
    RECORDING_PAST = "the cache is recording past states"
    ATTENTION_MASK = "an attention mask is given"
    PACKED_SEQUENCES = "packed sequences (cu_seq_lens_q or seq_idx)"
    GRAD_ENABLED = "gradients are enabled"
    META_DEVICE = "tensors without data, on the meta device"
    AUTOCAST = "autocast is on"
    EXPORTING = "the model is being exported or traced"
    TRANSFORMED = "a function transform, forward-mode gradients or a TorchFunctionMode"
    UNKNOWN_CACHE = "a cache of unknown type"
    UNEXPECTED_STATE = "a state of unexpected shape, strides or device"
    WEIGHTS_ELSEWHERE = "weights are on another device than the hidden states"
    TENSOR_TYPE = "hidden states of a tensor subclass"
    STATE_TYPE = "states of a tensor subclass"
    WEIGHT_TYPE = "weights of a tensor subclass"
    HOOKED_SUBMODULE = "hooks on conv1d or norm"
    GLOBAL_HOOKS = "hooks on every module of the process"
    CHANGED_LAYER = "the layer was changed after patching"
    CHANGED_UPSTREAM = "Transformers' own functions were replaced after patching"
    UNSUPPORTED_STEP = "a step that the backend does not compute"

    def __str__(self) -> str:
        return self.value
