"""Whether a call of a layer's forward is a decode step that the fast path may serve, and if not, why not.

Nothing here changes anything; every answer is a `Reason`.
"""

from __future__ import annotations

import torch
from accelerate.hooks import AlignDevicesHook
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as _every_module
from torch.utils._device import DeviceContext

from ..ops.step import States
from ..reasons import Reason
from ..switch import switched_off
from ..upstream.caches import read_states
from ..upstream.calls import Call
from ..upstream.families import Parts
from ..upstream.known import Known
from ..upstream.protocols import GatedDeltaNet, Module
from .plan import Plan

_PLAIN = (nn.Parameter, Tensor)
_PROXY = torch._C._TorchDispatchModeKey.PROXY  # of make_fx, which records a graph


def decode_step(plan: Plan, layer: GatedDeltaNet, hidden_states: Tensor, call: Call) -> tuple[Parts, States] | Reason:
    """What a fast step takes of the layer and the states to update, or why this call is none. Cheap questions first."""
    if hidden_states.shape[1] != 1:
        return Reason.SEVERAL_TOKENS
    if call.cache is None:
        return Reason.NO_CACHE
    reason = _call_reason(hidden_states, call)
    if reason is not None:
        return reason
    parts = _usable_parts(plan, layer, hidden_states.device)
    if isinstance(parts, Reason):
        return parts
    states = read_states(call.cache, layer.layer_idx)
    if isinstance(states, Reason):
        return states
    if type(states.conv) not in _PLAIN or type(states.recurrent) not in _PLAIN:
        return Reason.STATE_TYPE
    if not states_fit(plan, states, hidden_states):
        return Reason.UNEXPECTED_STATE
    return parts, states


def _call_reason(hidden_states: Tensor, call: Call) -> Reason | None:
    if switched_off():
        return Reason.SWITCHED_OFF
    if call.without_position:
        return Reason.NO_CACHE_POSITION
    if call.attention_mask is not None:
        return Reason.ATTENTION_MASK
    if call.others.get("cu_seq_lens_q") is not None or call.others.get("seq_idx") is not None:
        return Reason.PACKED_SEQUENCES
    if torch.is_grad_enabled():
        return Reason.GRAD_ENABLED
    if hidden_states.is_meta:
        return Reason.META_DEVICE
    if torch.is_autocast_enabled(hidden_states.device.type):
        return Reason.AUTOCAST
    if torch.compiler._is_exporting_flag:  # is_exporting() itself is True in all that Dynamo of torch 2.11 traces
        return Reason.EXPORTING
    if type(hidden_states) not in _PLAIN:
        return Reason.TENSOR_TYPE
    return None if torch.compiler.is_compiling() else _eager_reason()


def _eager_reason() -> Reason | None:
    """Who records or changes what is computed here, function by function: a kernel would pass him by."""
    if torch.jit.is_tracing() or torch._C._get_dispatch_mode(_PROXY) is not None:
        return Reason.EXPORTING
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return Reason.TRANSFORMED
    if torch._C._len_torch_function_stack():
        modes = torch.overrides._get_current_function_mode_stack()
        if any(type(mode) is not DeviceContext for mode in modes):  # that says where new tensors are, and no more
            return Reason.TRANSFORMED
    return None


def _usable_parts(plan: Plan, layer: GatedDeltaNet, device: torch.device) -> Parts | Reason:
    """The layer's parts, if a fast step may stand in for them now."""
    compiling = torch.compiler.is_compiling()
    known = None if compiling else plan.known  # Dynamo guards what a full look reads
    same = None if known is None else known.parts_of(layer)
    parts = _checked_parts(plan, layer) if same is None else same
    if isinstance(parts, Reason):
        return parts
    lookups = plan.lookups
    if not (lookups.find_the_same_in_a_graph() if compiling else lookups.find_the_same()):
        return Reason.CHANGED_UPSTREAM
    if _every_module._global_forward_hooks or _every_module._global_forward_pre_hooks:
        return Reason.GLOBAL_HOOKS
    if _is_hooked(parts.conv1d) or _is_hooked(parts.norm):
        return Reason.HOOKED_SUBMODULE
    for weight in parts.weights:
        if weight.device != device:
            return Reason.WEIGHTS_ELSEWHERE
    return parts


def _checked_parts(plan: Plan, layer: GatedDeltaNet) -> Parts | Reason:
    """The layer's parts, after a look at all that the plan was made from. Eager calls then know the layer again."""
    known = None if torch.compiler.is_compiling() else Known.of(layer, plan.family)
    if plan.family.facts(layer) != plan.facts:
        return Reason.CHANGED_LAYER
    parts = plan.family.parts(layer)
    if any(type(weight) not in _PLAIN for weight in parts.weights):
        return Reason.WEIGHT_TYPE
    if known is not None:
        plan.known = known
    return parts


def _is_hooked(module: Module) -> bool:
    """Whether calling `module` does more than its class's forward: the fast path reads its weight and calls nothing.

    accelerate puts a hook on every module of a dispatched model; one that only names the execution device is harmless.
    """
    if module._forward_pre_hooks or module._forward_hooks or module.__dict__.get("_compiled_call_impl") is not None:
        return True
    hook = module.__dict__.get("_hf_hook")
    if hook is not None:
        return type(hook) is not AlignDevicesHook or bool(hook.offload)
    forward = module.__dict__.get("forward")  # the class's own is what accelerate leaves when it takes a hook away
    return forward is not None and getattr(forward, "__func__", None) is not type(module).forward


def states_fit(plan: Plan, states: States, hidden_states: Tensor) -> bool:
    """Whether the states have the shapes that the plan expects of this batch, on its device. (Strides are the op's.)"""
    B, device = hidden_states.shape[0], hidden_states.device
    conv, recurrent = states
    return (
        conv.shape == (B, *plan.conv_shape)
        and recurrent.shape == (B, *plan.recurrent_shape)
        and conv.device == device
        and recurrent.device == device
    )
