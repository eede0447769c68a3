"""The only place that knows upstream's tensor parallel styles: is a layer sharded so, and what does a projection do.

Upstream shards in_proj_* and out_proj by output features and gathers every output ("colwise_gather_output"), so that
each rank runs every head on a full copy of the states. Only what that style itself left on a projection proves it: a
sharded weight alone may be another scheme's (FSDP shards the same dimension, and its ranks have prompts of their own).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor, nn

STYLE = "colwise_gather_output"


class Ranks(NamedTuple):
    """The ranks of a process group, and which of them this process is."""

    group: dist.ProcessGroup
    rank: int
    size: int


def ranks_of(layer: nn.Module, projections: Iterable[str]) -> Ranks | None:
    """The ranks over which upstream's style shards a layer's projections; None where it does not.

    An adapter around a projection hides no mark: it calls what it wraps.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return None
    modules = (module for name in projections for module in getattr(layer, name).modules())
    meshes = [mesh for mesh in map(_mesh, modules) if mesh is not None]
    if not meshes or any(mesh != meshes[0] for mesh in meshes):
        return None
    mesh = meshes[0]
    if mesh.ndim != 1 or mesh.size() == 1:
        return None
    return Ranks(mesh.get_group(), mesh.get_local_rank(), mesh.size())


def _mesh(projection: nn.Module) -> Any:
    """The device mesh over which the style shards a projection's rows; None without its mark."""
    has = getattr(projection, "__dict__", {}).get
    if has("_hf_tp_plan") == STYLE:  # up to 5.15
        return has("_hf_device_mesh")
    weight = getattr(projection, "weight", None)
    if _closed_over(has("forward")) is None:
        return None
    from torch.distributed.tensor import DTensor, Shard

    return weight.device_mesh if isinstance(weight, DTensor) and weight.placements == (Shard(0),) else None


def is_part(weight: Tensor, ranks: Ranks) -> bool:
    """Whether a weight is a plain tensor that is sharded, or kept whole, over exactly these ranks."""
    from torch.distributed.tensor import DTensor

    if not isinstance(weight, DTensor) or weight.device_mesh.ndim != 1:
        return False
    return weight.device_mesh.get_group() is ranks.group and type(local_part(weight)) in (nn.Parameter, Tensor)


def local_part(weight: Tensor) -> Tensor:
    """What this rank holds of a weight: its memory, where a DTensor itself says address 0.

    Not `to_local()`, which makes a new tensor each time, and is asked for hundreds of weights before every replay.
    """
    return getattr(weight, "_local_tensor", weight)


def is_split_otherwise(model: nn.Module, ranks: Ranks | None) -> bool:
    """Whether Transformers runs a model on several ranks by another plan than, or by more than, tensor parallelism over
    `ranks` (None: these found nothing): pipelines, FSDP, experts of one rank only."""
    mesh = getattr(model, "_device_mesh", None)
    if ranks is None:
        return mesh is not None or bool(getattr(model, "_tp_size", None))
    distributed = getattr(getattr(model, "config", None), "distributed_config", None)
    has_own_experts = getattr(distributed, "enable_expert_parallel", False)  # the same as ep_size > 1
    return bool(has_own_experts) or (mesh is not None and mesh.size() != ranks.size)


class ProjectionCall(NamedTuple):
    """All that decides what calling a projection does. A change (an adapter, a hook) makes it another one."""

    kind: type
    plan: str | None  # Transformers up to 5.15 name the style on the module
    forward: Any  # replaced on the instance
    hooks: tuple[Any, ...]
    pre_hooks: tuple[Any, ...]

    def gathers_only(self) -> bool:
        """Whether it is a linear map of this rank's rows and upstream's gather, and nothing else that we know of."""
        if self.kind is not nn.Linear:
            return False
        if self.forward is None:  # up to 5.15: one hook before the module (for gradients) and one after it
            hooks = (*self.hooks, *self.pre_hooks)
            names = {f"{hook.__module__}.{getattr(hook, '__qualname__', '')}" for hook in hooks}
            known = "transformers.integrations.tensor_parallel.distribute_module.<locals>.<lambda>"
            return self.plan == STYLE and len(hooks) == 2 and names == {known}
        return not self.hooks and not self.pre_hooks and _is_gathering_forward(self.forward)


def projection_call(projection: nn.Module) -> ProjectionCall:
    has = vars(projection).get
    hooks, pre_hooks = tuple(projection._forward_hooks.values()), tuple(projection._forward_pre_hooks.values())
    return ProjectionCall(type(projection), has("_hf_tp_plan"), has("forward"), hooks, pre_hooks)


def _is_gathering_forward(forward: Any) -> bool:
    """Whether it is the style's, over nn.Linear's own forward."""
    closed = _closed_over(forward)
    return closed is not None and getattr(closed.get("original_forward"), "__func__", None) is nn.Linear.forward


def _closed_over(forward: Any) -> dict[str, Any] | None:
    """From 5.16 on a style puts a closure over the module's forward: what the gathering style's holds, else None."""
    name = f"{getattr(forward, '__module__', '')}.{getattr(forward, '__qualname__', '')}"
    if name != "transformers.distributed.tensor_parallel.TensorParallelLayer.install_forward.<locals>.tp_forward":
        return None
    from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES

    cells = dict(zip(forward.__code__.co_freevars, (cell.cell_contents for cell in forward.__closure__), strict=True))
    return cells if cells.get("self") is ALL_PARALLEL_STYLES[STYLE] else None
