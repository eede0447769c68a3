"""Other projects' kernels for the same step, where they are installed. Nothing of theirs is copied.

What these rows are not: their servers keep the state as [V, K] with the values' rows first, and the convolution's taps
channel by channel, each in a pool of slots. Here each layer has a pool of its own, in their layout and without gaps, so
that nothing is converted while the clock runs. The step takes them three launches, ours one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from benchmarks.op.gpu_layers import Stack
from benchmarks.op.gpu_step import Step, pick, picked, worst_error
from qwen_fastdecode.ops.reference import decode_reference


@dataclass(frozen=True)
class Peer:
    """Where a package keeps the three kernels of its decode step."""

    convolution: str
    recurrence: str
    norm: str


PEERS = {
    "sglang": Peer(
        "sglang.srt.layers.attention.mamba.causal_conv1d_triton.causal_conv1d_update",
        "sglang.srt.layers.attention.fla.fused_recurrent.fused_recurrent_gated_delta_rule_packed_decode",
        "sglang.srt.layers.attention.fla.layernorm_gated.RMSNorm",
    ),
    "vllm": Peer(
        "vllm.model_executor.layers.mamba.ops.causal_conv1d.causal_conv1d_update",
        "vllm.third_party.flash_linear_attention.ops.fused_recurrent_gated_delta_rule_packed_decode",
        "vllm.third_party.flash_linear_attention.ops.RMSNormGated",
    ),
}


def installed_peers() -> list[str]:
    return [name for name in PEERS if find_spec(name) is not None]


def peer_calls(name: str, stack: Stack) -> list[Callable[[], Tensor]]:
    """One decode step of each layer by a peer's kernels, on copies of the stack's states in the peer's layout."""
    functions = [_resolve(path) for path in (PEERS[name].convolution, PEERS[name].recurrence, PEERS[name].norm)]
    return [_call(stack, stack.step(i), *functions) for i in range(len(stack.layers))]


def check_peer(stack: Stack, call: Callable[[], Tensor], limit: float) -> dict[str, float]:
    """Its first two outputs on layer 0 against float64: the second one shows that both states were updated."""
    sequences = picked(stack.step(0))
    law, errors = pick(stack.step(0), sequences), {}
    for name in ("first out", "second out"):
        expected = law.run(decode_reference)
        out = call().view(stack.workload.B, -1)[sequences]
        errors[name] = worst_error(out[None], expected[None], 2)
        assert errors[name] <= limit, f"{name}: relative error {errors[name]:.2e}, at most {limit:.1e} is right"
    return errors


def _resolve(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def _call(stack: Stack, step: Step, convolve: Any, recur: Any, norm_class: Any) -> Callable[[], Tensor]:
    w = stack.workload
    q, k, v, z, b, a, conv_state, state, conv_weight, A_log, dt_bias, norm_weight = step.tensors
    qkv = torch.cat([x.flatten(1) for x in (q, k, v)], dim=1)  # [B, C], as the projection gives it in qwen3_5
    z, b, a = z.reshape(w.B, w.HV, w.D), b.flatten(1), a.flatten(1)
    # A slot more than there are sequences: the first one stands for "no sequence" in vllm.
    slots = torch.arange(1, w.B + 1, dtype=torch.int32, device=q.device)
    taps = conv_state.new_zeros(w.B + 1, 3, w.C).transpose(1, 2)  # [slots, C, 3], the channels side by side
    taps[1:] = conv_state[..., 1:]
    values = state.new_zeros(w.B + 1, w.HV, w.D, w.D)  # [slots, HV, V, K]
    values[1:] = state.transpose(2, 3)
    norm = norm_class(w.D, eps=step.options["eps"], norm_before_gate=True, device=q.device, dtype=w.dtype)
    norm.weight.data.copy_(norm_weight)

    def call() -> Tensor:
        mixed = convolve(qkv, taps, conv_weight, None, "silu", conv_state_indices=slots)
        o = torch.empty(w.B, 1, w.HV, w.D, dtype=w.dtype, device=qkv.device)
        recur(mixed, a, b, A_log, dt_bias, w.D**-0.5, values, o, slots, use_qk_l2norm_in_kernel=True)
        return norm(o.view(w.B, w.HV, w.D), z).view(w.B, 1, -1)

    return call
