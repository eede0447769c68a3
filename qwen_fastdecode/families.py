"""The only place that knows upstream's projections and gated norms: from a layer's modules to the op's arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn


@dataclass(frozen=True)
class HeadSizes:
    """Head counts and sizes of one layer, computed once; `_per_tp` is what one tensor-parallel rank works on."""

    num_k_heads: int
    num_v_heads: int
    head_k_dim: int
    head_v_dim: int
    conv_kernel_size: int
    tp_size: int = 1
    v_heads_per_k_head: int = field(init=False)
    num_k_heads_per_tp: int = field(init=False)
    num_v_heads_per_tp: int = field(init=False)
    key_dim_per_tp: int = field(init=False)
    value_dim_per_tp: int = field(init=False)
    conv_channels: int = field(init=False)

    def __post_init__(self) -> None:
        for name, value in {
            "v_heads_per_k_head": self.num_v_heads // self.num_k_heads,
            "num_k_heads_per_tp": self.num_k_heads // self.tp_size,
            "num_v_heads_per_tp": self.num_v_heads // self.tp_size,
            "key_dim_per_tp": self.num_k_heads // self.tp_size * self.head_k_dim,
            "value_dim_per_tp": self.num_v_heads // self.tp_size * self.head_v_dim,
            "conv_channels": 2 * self.num_k_heads * self.head_k_dim + self.num_v_heads * self.head_v_dim,
        }.items():
            object.__setattr__(self, name, value)

    @classmethod
    def of(cls, layer: nn.Module, tp_size: int = 1) -> HeadSizes:
        """Reads them off a gated DeltaNet layer, whose attributes have these names in every family."""
        names = ("num_k_heads", "num_v_heads", "head_k_dim", "head_v_dim", "conv_kernel_size")
        return cls(tp_size=tp_size, **{name: int(getattr(layer, name)) for name in names})


class DecodeViews(NamedTuple):
    """Views of the projections' outputs for one token a sequence, without a copy (DESIGN of the op: `ops.decode`)."""

    q: Tensor  # [B, HK, DK]
    k: Tensor  # [B, HK, DK]
    v: Tensor  # [B, HK, R, DV]
    z: Tensor  # [B, HK, R, DV]
    b: Tensor  # [B, HK, R]
    a: Tensor  # [B, HK, R]


class GatedNorm(NamedTuple):
    """What a gated RMSNorm computes: weight * rmsnorm(x, eps) * gate(z)."""

    eps: float
    gate: str


@dataclass(frozen=True)
class Family:
    """One upstream model family: how its gated DeltaNet layers project a token."""

    name: str
    projections: tuple[str, ...]
    project: Callable[[Any, Tensor, HeadSizes], DecodeViews]
    rows_are_heads: tuple[str, ...]  # the projections of which an n-th of the rows are an n-th of the heads

    def projection_sizes(self, s: HeadSizes) -> tuple[int, ...]:
        """How many features each of `projections` gives."""
        key, value, heads = s.num_k_heads * s.head_k_dim, s.num_v_heads * s.head_v_dim, s.num_v_heads
        if len(self.projections) == 2:
            return 2 * key + 2 * value, 2 * heads
        return 2 * key + value, value, heads, heads


def project_grouped(layer: Any, hidden_states: Tensor, s: HeadSizes) -> DecodeViews:
    """qwen3_next: the features of one key head lie together, [q | k | v of its R heads | z of its R heads]."""
    B, R, DK, DV = hidden_states.shape[0], s.v_heads_per_k_head, s.head_k_dim, s.head_v_dim
    qkvz = layer.in_proj_qkvz(hidden_states).view(B, -1, 2 * DK + 2 * R * DV)  # HK heads, or those of a rank
    ba = layer.in_proj_ba(hidden_states).view(B, -1, 2, R)
    q, k, v, z = qkvz.split((DK, DK, R * DV, R * DV), dim=2)
    b, a = ba.unbind(2)
    return DecodeViews(q, k, v.unflatten(2, (R, DV)), z.unflatten(2, (R, DV)), b, a)


def project_split(layer: Any, hidden_states: Tensor, s: HeadSizes) -> DecodeViews:
    """qwen3_5 and later: q, k, v side by side over all heads; z, b and a each from a projection of their own."""
    B, HK, R, DK, DV = hidden_states.shape[0], s.num_k_heads, s.v_heads_per_k_head, s.head_k_dim, s.head_v_dim
    qkv = layer.in_proj_qkv(hidden_states).view(B, s.conv_channels)
    q, k, v = qkv.split((HK * DK, HK * DK, HK * R * DV), dim=1)
    return DecodeViews(
        q.view(B, HK, DK),
        k.view(B, HK, DK),
        v.view(B, HK, R, DV),
        layer.in_proj_z(hidden_states).view(B, -1, R, DV),  # HK heads, or those of a rank
        layer.in_proj_b(hidden_states).view(B, -1, R),
        layer.in_proj_a(hidden_states).view(B, -1, R),
    )


_GROUPED = (("in_proj_qkvz", "in_proj_ba"), project_grouped, ("in_proj_qkvz", "in_proj_ba"))
_SPLIT = (
    ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"),
    project_split,
    ("in_proj_z", "in_proj_b", "in_proj_a"),
)

FAMILIES = {
    family.name: family
    for family in (
        Family("qwen3_next", *_GROUPED),
        Family("qwen3_5", *_SPLIT),
        Family("qwen3_5_moe", *_SPLIT),
        Family("qwen4_exp", *_SPLIT),
    )
}


def read_norm(norm: Any) -> GatedNorm | None:
    """What `norm` computes, or None if it is not one of the gated norms that these families use.

    Upstream's own class keeps its epsilon as `variance_epsilon`; flash-linear-attention's, which upstream takes up to
    5.14 where that package is installed, as `eps`.
    """
    epsilons = {"transformers": "variance_epsilon", "fla": "eps"}
    eps = getattr(norm, epsilons.get(type(norm).__module__.partition(".")[0], ""), None)
    if not type(norm).__name__.endswith("RMSNormGated") or eps is None or getattr(norm, "bias", None) is not None:
        return None
    gate = {"silu": "silu", "swish": "silu", "sigmoid": "sigmoid"}.get(getattr(norm, "activation", "silu"))
    return None if gate is None else GatedNorm(float(eps), gate)
