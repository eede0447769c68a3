"""The only place that knows upstream's projections and gated norms: from a layer's modules to a step's tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..errors import UnsupportedStep
from ..ops.step import Sources, Tokens, Weights
from .protocols import Convolution, GatedDeltaNet, GatedNormModule, Projection


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


class GatedNorm(NamedTuple):
    """What a gated RMSNorm computes: weight * rmsnorm(x, eps) * gate(z)."""

    eps: float
    gate: str


GATES = {"silu": "silu", "swish": "silu", "sigmoid": "sigmoid"}  # upstream's names of activations -> ours
_PLAIN = frozenset((Tensor, nn.Parameter))
KEPT_FUNCTIONS = ("causal_conv1d_update", "recurrent_gated_delta_rule")  # on a layer, up to 5.14; it calls them


class Parts(NamedTuple):
    """What a fast step takes of a layer: modules that it calls, and weights of modules that it does not call."""

    projections: tuple[Projection, ...]  # in the order of `Family.projections`
    out_proj: Projection
    conv1d: Convolution
    norm: GatedNormModule
    weights: Weights

    def project(self, hidden_states: Tensor) -> Sources:
        """What the input projections return for hidden_states [B, 1, hidden size], called as modules.

        Adapters, quantised weights and tensor parallelism live in these modules. Features lie side by side in what a
        linear layer returns; what lies otherwise (a transposed product) is copied. Raises UnsupportedStep for what is
        no plain tensor.
        """
        outputs = [projection(hidden_states) for projection in self.projections]
        if not _PLAIN.issuperset(map(type, outputs)):  # a DTensor, say, whose memory is not its value
            kinds = ", ".join(type(x).__name__ for x in outputs)
            raise UnsupportedStep(f"the projections returned {kinds}, expected plain tensors")
        return tuple([x if x.stride(-1) == 1 else x.contiguous() for x in outputs])

    def project_out(self, out: Tensor) -> Tensor:
        """The op's result [B, HV * DV] -> the layer's output [B, 1, hidden size]."""
        return self.out_proj(out.unsqueeze(1))


@dataclass(frozen=True, eq=False)
class Family:
    """One upstream model family: what its gated DeltaNet layers are made of, and how they project a token.

    projections: the name of each input projection, and which of q, k, v, z, b and a it gives.
    read: the tokens in what the projections returned (`Parts.project`), as views, for layers of the given sizes.
    rows_are_heads: the projections of which an n-th of the rows are an n-th of the heads.
    norm, out_proj: the names of the gated norm and of the output projection.
    doubles_beta: the attribute that says whether a layer doubles beta (then the state's transition may have negative
    eigenvalues), where there is one.
    reordering: the method that upstream splits its projections' outputs by, where it has one; `read` stands in for it.
    """

    name: str
    projections: Mapping[str, str]
    read: Callable[[Sources, HeadSizes], Tokens]
    rows_are_heads: tuple[str, ...] = ()
    norm: str = "norm"
    out_proj: str = "out_proj"
    doubles_beta: str | None = None
    reordering: str | None = None

    def projection_sizes(self, s: HeadSizes) -> tuple[int, ...]:
        """How many features each of `projections` gives."""
        key, value, heads = s.num_k_heads * s.head_k_dim, s.num_v_heads * s.head_v_dim, s.num_v_heads
        features = {"q": key, "k": key, "v": value, "z": value, "b": heads, "a": heads}
        return tuple(sum(features[part] for part in parts) for parts in self.projections.values())

    def missing_parts(self, layer: nn.Module) -> list[str]:
        """Which modules and parameters of this family `layer` does not have."""
        names = (*self.projections, "conv1d", self.norm, self.out_proj, "A_log", "dt_bias")
        return [name for name in names if not hasattr(layer, name)]

    def read_modules(self, layer: GatedDeltaNet) -> tuple[Convolution, GatedNormModule]:
        """conv1d and the gated norm: a fast step reads their weights and does not call them."""
        return layer.conv1d, getattr(layer, self.norm)

    def parts(self, layer: GatedDeltaNet) -> Parts:
        """The layer's parts, looked up as upstream's forward does, whatever holds them."""
        conv1d, norm = self.read_modules(layer)
        return Parts(
            tuple([getattr(layer, name) for name in self.projections]),
            getattr(layer, self.out_proj),
            conv1d,
            norm,
            Weights(conv1d.weight, layer.A_log, layer.dt_bias, norm.weight),
        )

    def beta_scale(self, layer: GatedDeltaNet) -> float:
        """What the layer multiplies beta by."""
        return 2.0 if self.doubles_beta is not None and getattr(layer, self.doubles_beta) else 1.0

    def facts(self, layer: GatedDeltaNet) -> tuple[Any, ...]:
        """All that a plan of `layer` was made from, by value, and whose parts by identity: a change shows here."""
        conv1d, norm = self.read_modules(layer)
        has = layer.__dict__
        return (
            type(conv1d),
            conv1d.bias is None,
            type(norm),
            _epsilon(norm),
            getattr(norm, "activation", "silu"),
            _has_bias(norm),
            layer.activation,
            *(getattr(layer, name, None) for name in ("key_dim", "value_dim")),
            layer.num_k_heads,
            layer.num_v_heads,
            layer.head_k_dim,
            layer.head_v_dim,
            layer.conv_kernel_size,
            self.beta_scale(layer),
            # By class and by instance: Dynamo finds no function under a bound method.
            None if self.reordering is None else getattr(type(layer), self.reordering),
            self.reordering in has,
            *map(has.get, KEPT_FUNCTIONS),
        )


@cache
def reader(family: Family, sizes: HeadSizes) -> Callable[[Sources], Tokens]:
    """`family.read` for layers of these sizes: one function for all of them, so that steps of one kind share it."""
    return lambda sources: family.read(sources, sizes)


def read_grouped(sources: Sources, sizes: HeadSizes) -> Tokens:
    """qwen3_next: the features of one key head lie together, [q | k | v of its R heads | z of its R heads]."""
    B, R, DK, DV = sources[0].shape[0], sizes.v_heads_per_k_head, sizes.head_k_dim, sizes.head_v_dim
    qkvz = sources[0].view(B, -1, 2 * DK + 2 * R * DV)  # HK heads, or those of a rank
    q, k, v, z = qkvz.split((DK, DK, R * DV, R * DV), dim=2)
    b, a = sources[1].view(B, -1, 2, R).unbind(2)
    return Tokens(q, k, v.unflatten(2, (R, DV)), z.unflatten(2, (R, DV)), b, a)


def read_split(sources: Sources, sizes: HeadSizes) -> Tokens:
    """qwen3_5 and later: q, k, v side by side over all heads; z, b and a each from a projection of their own."""
    qkv, z, b, a = sources
    B, R, DK, DV = qkv.shape[0], sizes.v_heads_per_k_head, sizes.head_k_dim, sizes.head_v_dim
    key, value = sizes.num_k_heads * DK, sizes.num_v_heads * DV
    q, k, v = qkv.view(B, sizes.conv_channels).split((key, key, value), dim=1)
    return Tokens(
        q.view(B, -1, DK),
        k.view(B, -1, DK),
        v.view(B, -1, R, DV),
        z.view(B, -1, R, DV),  # HK heads, or those of a rank
        b.view(B, -1, R),
        a.view(B, -1, R),
    )


def read_apart(sources: Sources, sizes: HeadSizes) -> Tokens:
    """olmo_hybrid: each from a projection of its own; g_proj gives what the gated norm takes, our z."""
    q, k, v, z, b, a = sources
    B, R, DK, DV = q.shape[0], sizes.v_heads_per_k_head, sizes.head_k_dim, sizes.head_v_dim
    return Tokens(
        q.view(B, -1, DK),
        k.view(B, -1, DK),
        v.view(B, -1, R, DV),
        z.view(B, -1, R, DV),
        b.view(B, -1, R),
        a.view(B, -1, R),
    )


_GROUPED = (
    {"in_proj_qkvz": "qkvz", "in_proj_ba": "ba"},
    read_grouped,
    ("in_proj_qkvz", "in_proj_ba"),
)
_SPLIT = (
    {"in_proj_qkv": "qkv", "in_proj_z": "z", "in_proj_b": "b", "in_proj_a": "a"},
    read_split,
    ("in_proj_z", "in_proj_b", "in_proj_a"),
)
_APART = (
    {"q_proj": "q", "k_proj": "k", "v_proj": "v", "g_proj": "z", "b_proj": "b", "a_proj": "a"},
    read_apart,
)

FAMILIES = {
    family.name: family
    for family in (
        Family("qwen3_next", *_GROUPED, reordering="fix_query_key_value_ordering"),
        Family("qwen3_5", *_SPLIT),
        Family("qwen3_5_moe", *_SPLIT),
        Family("qwen4_exp", *_SPLIT),
        Family("lara_mini", *_SPLIT),
        Family("olmo_hybrid", *_APART, norm="o_norm", out_proj="o_proj", doubles_beta="allow_neg_eigval"),
    )
}


def read_norm(norm: GatedNormModule) -> GatedNorm | None:
    """What `norm` computes, or None if it is not one of the gated norms that these families use."""
    eps = _epsilon(norm)
    if not type(norm).__name__.endswith("RMSNormGated") or eps is None or getattr(norm, "bias", None) is not None:
        return None
    gate = GATES.get(getattr(norm, "activation", "silu"))
    return None if gate is None else GatedNorm(float(eps), gate)


def _has_bias(norm: GatedNormModule) -> bool:
    """Whether there is one, looked for where a module keeps it: `getattr` takes a microsecond to find none."""
    own = norm.__dict__
    kept = (own["_parameters"].get("bias"), own.get("bias"), getattr(type(norm), "bias", None))
    return any(bias is not None for bias in kept)


def _epsilon(norm: GatedNormModule) -> float | None:
    """A gated norm's epsilon: a number, since a tensor could change and stay the same object.

    Upstream's own class keeps it as `variance_epsilon`; flash-linear-attention's, which upstream takes up to 5.14 where
    that package is installed, as `eps`.
    """
    kept_as = {"transformers": "variance_epsilon", "fla": "eps"}.get(type(norm).__module__.partition(".")[0], "")
    eps = getattr(norm, kept_as, None)
    return eps if isinstance(eps, (float, int)) else None
