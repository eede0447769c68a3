"""What this package uses of Transformers' objects, as types: a signature says which of them it takes.

They are for readers and for mypy; nothing is checked against them at run time. What only some releases or families have
is looked up by name, in `families.py` and `caches.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

Projection = Callable[[Tensor], Tensor]  # a module: [B, T, features] to [B, T, other features]
Forward = Callable[..., Tensor]  # of a gated DeltaNet layer: its arguments differ between releases (`calls.py`)


class Module(Protocol):
    """What every `nn.Module` has."""

    _parameters: dict[str, Tensor | None]
    _modules: dict[str, nn.Module | None]
    _forward_hooks: dict[int, Callable[..., Any]]
    _forward_pre_hooks: dict[int, Callable[..., Any]]
    forward: Callable[..., Any]


class Convolution(Module, Protocol):
    """A layer's conv1d, of whose weight a step reads the taps: [C, 1, W]. It is not called."""

    weight: Tensor
    bias: Tensor | None


class GatedNormModule(Module, Protocol):
    """A layer's gated RMSNorm, of which a step reads the weight: [DV]. It is not called. `families.read_norm` says what
    it computes."""

    weight: Tensor


class GatedDeltaNet(Module, Protocol):
    """A layer: what every family has by these names."""

    layer_idx: int
    activation: str
    num_k_heads: int
    num_v_heads: int
    head_k_dim: int
    head_v_dim: int
    conv_kernel_size: int
    conv1d: Convolution
    A_log: Tensor
    dt_bias: Tensor


class CacheLayer(Protocol):
    """What a cache keeps of one gated DeltaNet layer, from 5.5 on: one tensor, and from 5.14 on a dictionary of them.

    Reading an attribute settles what the layer owes (`unsettled.py`); `caches.stored_states` reads past that.
    """

    conv_states: Any
    recurrent_states: Any
    has_previous_state: bool | dict[int, bool]

    def reset(self) -> None: ...

    def reorder_cache(self, beam_idx: Tensor) -> None: ...


class AttentionLayer(Protocol):
    """What a cache keeps of a full attention layer: [B, heads, T, head size]. The lengths are a static one's."""

    keys: Tensor
    values: Tensor
    max_cache_len: int
    cumulative_length: Tensor


class ModelCache(Protocol):
    """A cache as a layer's forward is given it."""

    layers: list[Any]  # from 5.5 on: a CacheLayer or an AttentionLayer for each layer of the model
    conv_states: list[Tensor | None]  # up to 5.4 these three, of all layers
    recurrent_states: list[Tensor | None]
    has_previous_state: Any  # from 5.5 on a method

    def get_seq_length(self) -> int: ...


class TextConfig(Protocol):
    """The configuration of a language model, of whatever release."""

    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    num_hidden_layers: int


class Config(Protocol):
    """A model's configuration, which may have those of other parts beside the text's."""

    def get_text_config(self, decoder: bool | None = None) -> TextConfig: ...


class CausalLM(Protocol):
    """A model that `generate` decodes with."""

    config: Config
    device: torch.device
    dtype: torch.dtype

    def __call__(self, *args: Any, **inputs: Any) -> Any: ...

    def modules(self) -> Iterator[nn.Module]: ...
