"""What this package relies on in Transformers' objects: a gated DeltaNet layer, and a cache's layer."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor


class GatedDeltaNet(Protocol):
    """A layer of any supported family. Its projections, norm and reordering have the family's own names."""

    layer_idx: int
    conv1d: Any
    activation: str
    num_k_heads: int
    num_v_heads: int
    head_k_dim: int
    head_v_dim: int
    conv_kernel_size: int
    A_log: Tensor  # [HV]
    dt_bias: Tensor  # [HV]


class CacheLayer(Protocol):
    """The states of one layer, from Transformers 5.5 on; from 5.14 on each is a dict by the number of the state."""

    conv_states: Any
    recurrent_states: Any
    has_previous_state: Any
