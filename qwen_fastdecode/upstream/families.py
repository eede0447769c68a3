"""The only place that knows upstream's projections and gated norms: from a layer's modules to the op's arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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


@dataclass(frozen=True, eq=False)
class Family:
    """One upstream model family: what its gated DeltaNet layers are made of, and how they project a token.

    projections: the name of each input projection, and which of q, k, v, z, b and a it gives.
    project: calls them, as modules (layer, hidden_states [B, 1, hidden size], sizes).
    rows_are_heads: the projections of which an n-th of the rows are an n-th of the heads.
    norm, out_proj: the names of the gated norm and of the output projection.
    beta_scale: what a layer multiplies beta by.
    """

    name: str
    projections: Mapping[str, str]
    project: Callable[[Any, Tensor, HeadSizes], DecodeViews]
    rows_are_heads: tuple[str, ...] = ()
    norm: str = "norm"
    out_proj: str = "out_proj"
    beta_scale: Callable[[Any], float] = lambda layer: 1.0

    def projection_sizes(self, s: HeadSizes) -> tuple[int, ...]:
        """How many features each of `projections` gives."""
        key, value, heads = s.num_k_heads * s.head_k_dim, s.num_v_heads * s.head_v_dim, s.num_v_heads
        features = {"q": key, "k": key, "v": value, "z": value, "b": heads, "a": heads}
        return tuple(sum(features[part] for part in parts) for parts in self.projections.values())

    def missing_parts(self, layer: nn.Module) -> list[str]:
        """Which modules and parameters of this family `layer` does not have."""
        names = (*self.projections, "conv1d", self.norm, self.out_proj, "A_log", "dt_bias")
        return [name for name in names if not hasattr(layer, name)]

    def read_modules(self, layer: Any) -> tuple[Any, Any]:
        """conv1d and the gated norm: a fast step reads their weights and does not call them."""
        return layer.conv1d, getattr(layer, self.norm)

    def weights(self, layer: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """In the op's order: conv_weight [C, W], A_log [HV], dt_bias [HV], norm_weight [DV]."""
        conv1d, norm = self.read_modules(layer)
        return conv1d.weight.squeeze(1), layer.A_log, layer.dt_bias, norm.weight

    def project_out(self, layer: Any, out: Tensor) -> Tensor:
        """The op's result [B, HV * DV] -> the layer's output [B, 1, hidden size]."""
        return getattr(layer, self.out_proj)(out.unsqueeze(1))


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


def project_apart(layer: Any, hidden_states: Tensor, s: HeadSizes) -> DecodeViews:
    """olmo_hybrid: each from a projection of its own; g_proj gives what the gated norm takes, our z."""
    B, HK, R, DK, DV = hidden_states.shape[0], s.num_k_heads, s.v_heads_per_k_head, s.head_k_dim, s.head_v_dim
    return DecodeViews(
        layer.q_proj(hidden_states).view(B, HK, DK),
        layer.k_proj(hidden_states).view(B, HK, DK),
        layer.v_proj(hidden_states).view(B, HK, R, DV),
        layer.g_proj(hidden_states).view(B, HK, R, DV),
        layer.b_proj(hidden_states).view(B, HK, R),
        layer.a_proj(hidden_states).view(B, HK, R),
    )


def _two_where_negative(layer: Any) -> float:
    """olmo_hybrid: twice beta lets the state's transition have negative eigenvalues."""
    return 2.0 if layer.allow_neg_eigval else 1.0


_GROUPED = (
    {"in_proj_qkvz": "qkvz", "in_proj_ba": "ba"},
    project_grouped,
    ("in_proj_qkvz", "in_proj_ba"),
)
_SPLIT = (
    {"in_proj_qkv": "qkv", "in_proj_z": "z", "in_proj_b": "b", "in_proj_a": "a"},
    project_split,
    ("in_proj_z", "in_proj_b", "in_proj_a"),
)
_APART = (
    {"q_proj": "q", "k_proj": "k", "v_proj": "v", "g_proj": "z", "b_proj": "b", "a_proj": "a"},
    project_apart,
)

FAMILIES = {
    family.name: family
    for family in (
        Family("qwen3_next", *_GROUPED),
        Family("qwen3_5", *_SPLIT),
        Family("qwen3_5_moe", *_SPLIT),
        Family("qwen4_exp", *_SPLIT),
        Family("olmo_hybrid", *_APART, norm="o_norm", out_proj="o_proj", beta_scale=_two_where_negative),
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
