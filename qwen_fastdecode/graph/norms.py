"""Plain RMSNorms while a step is recorded: one kernel in the place of ten, with the bits that upstream's have.

Of some 1,500 kernels in a decode step of Qwen3.5-4B, 810 are those of 81 norms, and at small batches each costs its
launch. A norm is stood in for only while a step is recorded, and only where its class has shown on this device, for as
many rows of this width and dtype, that the results are equal to the bit.
"""

from __future__ import annotations

import copy
import functools
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.backends import triton_unavailable
from ..ops.library import rms_norm_registered
from ..upstream.norms import ZeroCentredNorm, zero_centred_norm
from ..upstream.protocols import CausalLM

ROWS = 64  # of the proof, at least: where rows are few, so are the chances of a different bit
DIFFERS = "other bits than upstream's"


class StandIn:
    """The forward of a norm while this thread records a step; other threads, which may run the model, get upstream's.

    in_one: by number of rows, whether one kernel gives upstream's bits, or three. What is not there is upstream's too.
    """

    def __init__(self, norm: ZeroCentredNorm, upstream: Callable[[Tensor], Tensor], in_one: dict[int, bool]):
        self._norm = norm
        self._upstream = upstream
        self._in_one = in_one
        self._thread = threading.get_ident()

    def __call__(self, x: Tensor) -> Tensor:
        from ..ops.triton.rms_norm import takes

        weight, eps = self._norm
        in_one = self._in_one.get(x.numel() // weight.numel())
        if in_one is None or threading.get_ident() != self._thread or x.dtype != weight.dtype or not takes(x, weight):
            return self._upstream(x)
        return rms_norm_registered(x, weight, eps, in_one)


class Norms:
    """Those of a model that are stood in for at a batch size: `in_one` and `in_three` kernels each; `reasons` says how
    many others are upstream's, and why."""

    def __init__(self, model: CausalLM, batch: int):
        self.in_one = self.in_three = 0
        self.reasons: Counter[str] = Counter()
        self._stand_ins: list[tuple[nn.Module, StandIn]] = []
        config = model.config.get_text_config(decoder=True)
        heads = [batch * config.num_attention_heads, batch * config.num_key_value_heads]
        for module in model.modules():
            norm = zero_centred_norm(module)
            if norm is None:
                continue
            rows = [batch] if norm.weight.numel() == config.hidden_size else heads
            in_one, reason = _ways(module, norm, rows)
            if reason is None:
                self._stand_ins.append((module, StandIn(norm, module.forward, in_one)))
                self.in_one += all(in_one.values())
                self.in_three += not all(in_one.values())
            else:
                self.reasons[reason] += 1

    def stood_in_for(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """`step`, with the stand-ins in their places."""

        def stepped(**inputs: Any) -> Any:
            try:
                for module, stand_in in self._stand_ins:
                    vars(module)["forward"] = stand_in
                return step(**inputs)
            finally:
                for module, _ in self._stand_ins:
                    vars(module).pop("forward", None)

        return stepped


def _ways(module: nn.Module, norm: ZeroCentredNorm, rows: list[int]) -> tuple[dict[int, bool], str | None]:
    """`StandIn.in_one` for a norm, or why it has to be upstream's."""
    unavailable = triton_unavailable(norm.weight.device)
    if unavailable is not None:
        return {}, unavailable
    from ..ops.triton.rms_norm import WIDEST

    found = {}
    ways = (True, False) if norm.weight.numel() < WIDEST else (False,)
    for count in rows:
        try:
            way = next((in_one for in_one in ways if _shown(module, norm, count, in_one)), None)
        except Exception as error:  # whatever a compiler or a device may raise: upstream's norm is there
            return {}, f"{type(error).__name__}: {error}"
        if way is None:
            return {}, DIFFERS
        found[count] = way
    return found, None


# What has been compared, and whether the bits were equal.
_known: dict[Any, bool] = {}
_one_at_a_time = threading.Lock()


def _shown(module: nn.Module, norm: ZeroCentredNorm, rows: int, in_one: bool) -> bool:
    """Whether a way gives the bits of this class's norms, by its code as it is now."""
    weight, eps = norm
    code = vars(type(module))
    key = type(module), code["forward"], code["_norm"], weight.device, weight.dtype, weight.shape, eps, rows, in_one
    with _one_at_a_time:
        if key in _known:
            return _known[key]
        _known[key] = all(_same_bits(module, norm, rows, in_one, seed) for seed in range(-(-ROWS // rows)))
        return _known[key]


@torch.no_grad()
def _same_bits(module: nn.Module, norm: ZeroCentredNorm, rows: int, in_one: bool, seed: int) -> bool:
    """Upstream's forward beside the stand-in, with weights and numbers of many magnitudes."""
    weight, eps = norm
    device, width = weight.device, weight.numel()
    numbers = torch.Generator(device).manual_seed(seed)  # not the one that somebody samples with
    randn = functools.partial(torch.randn, generator=numbers, device=device)
    sizes = 10 ** (3 * randn(rows, 1).clamp(-2, 1))
    x = (randn(rows, 2 * width) * sizes).to(weight.dtype)[:, None, :width]  # [rows, 1, width], of wider rows
    probe = copy.copy(module)  # its code and its settings, without its weight
    vars(probe)["_parameters"] = {"weight": nn.Parameter(randn(width).to(weight.dtype))}
    return torch.equal(rms_norm_registered(x, probe.weight, eps, in_one), probe.forward(x))
