"""The self-test of a layer class: upstream's own forward beside the fast step, on a small layer of that class.

It sees what a decode step computes and leaves in the cache. It cannot see what an argument would do that it does not
pass; a forward that names such an argument fails.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.utils.import_utils import is_causal_conv1d_available, is_flash_linear_attention_available

from ..ops.step import States
from ..reasons import Reason
from ..upstream.caches import cache_layer, new_cache, read_states
from ..upstream.calls import KNOWN
from ..upstream.protocols import Forward, GatedDeltaNet, ModelCache
from ..upstream.seams import Upstream, unwrap
from .eligibility import states_fit
from .plan import Plan, Settings, make_plan

PROMPT, STEPS = 5, 3  # tokens of the prefill (more than the convolution has taps), and fast steps after it
# Of each sequence's hidden states: an epsilon in the wrong place shows on small ones only, a gate on large ones.
MAGNITUDES = (1e-3, 1.0, 4.0)
HIDDEN = 32
SIZES = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],  # some configurations ask for one of either
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
}
NAMES = ("output", "conv state", "recurrent state")  # of what a step gives
# Largest distance of the fast step from upstream's: relative RMS over all sequences and steps, each of which counts
# the same. float32: both round at every operation, and the gates' exponentials amplify it (3e-7 is usual). bfloat16:
# upstream rounds at every operation, the fast step once at the end.
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


class SelfTest(NamedTuple):
    """`failure`: what differs or what is missing, None if the class passed; `near`: the largest distance then."""

    failure: str | None
    near: str = ""


class _Failed(Exception):
    """Why the class does not pass; never leaves this module."""


def self_test(upstream: Upstream, forward: Forward) -> SelfTest:
    """Runs prefill and decode steps in float32 and bfloat16; `forward` is upstream's, whatever the class has now.

    Touches no model, no patched class, no global generator and no default; takes some hundredths of a second.
    """
    distances = {}
    try:
        _check_arguments(forward)
        for dtype in LIMITS:
            with _apart(_device()):
                distances[dtype] = _compare(upstream, forward, dtype)
    except _Failed as failure:
        return SelfTest(str(failure))
    return SelfTest(None, ", ".join(f"{distance:.0e} in {dtype_name(dtype)}" for dtype, distance in distances.items()))


def _check_arguments(forward: Forward) -> None:
    """The dispatcher hands on what it does not know, but a fast step would ignore it."""
    if new := [name for name in _named_arguments(forward) if name not in KNOWN]:
        raise _Failed(f"its forward takes arguments that the fast step does not know: {', '.join(new)}")


def _named_arguments(forward: Forward) -> list[str]:
    parameters = inspect.signature(unwrap(forward)).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD]


def _device() -> torch.device:
    """Where upstream's functions run: those of the packages that it prefers, where installed, on a GPU only."""
    on_gpu = is_flash_linear_attention_available() or is_causal_conv1d_available()
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


@contextlib.contextmanager
def _apart(device: torch.device) -> Iterator[None]:
    """Whatever the caller has switched on, and without a trace in the global generators."""
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        torch.device(device),
        torch.no_grad(),
        torch.autocast(device.type, enabled=False),
    ):
        yield


def _compare(upstream: Upstream, forward: Forward, dtype: torch.dtype) -> float:
    """The largest distance between both sides; raises _Failed where it is too large or a side cannot run."""
    random = torch.Generator().manual_seed(0)
    with _doing("a small layer cannot be built"):
        layer, theirs = _build(upstream, dtype, random)
    with _doing("its parts cannot be read"):
        plan = make_plan(layer, "self-test", upstream, Settings(backend="torch"))
    if isinstance(plan, str):
        raise _Failed(plan)
    hidden_states = _hidden_states(random).to(layer.A_log.device, dtype)
    prompt, *tokens, last = hidden_states.split([PROMPT, *[1] * STEPS, 1], dim=1)
    with _doing("upstream's prefill cannot run"):
        _upstream_step(forward, layer, prompt, theirs, 0)
        ours = copy.deepcopy(theirs)
    expected, got = [], []
    for i, token in enumerate(tokens):
        with _doing("upstream's decode step cannot run"):
            out = _upstream_step(forward, layer, token, theirs, PROMPT + i)
            expected.append((out, *_copies(_states(plan, layer, theirs, token))))
        with _doing("the fast step cannot run"):
            its_cache = cache_layer(ours, layer.layer_idx)
            out = plan.strategy.run(plan.family.parts(layer), token, its_cache, _states(plan, layer, ours, token))
            got.append((out, *_copies(_states(plan, layer, ours, token))))
    with _doing("upstream's decode step cannot run after fast steps"):  # it may keep more in the cache than we know
        after = [_upstream_step(forward, layer, last, cache, PROMPT + STEPS) for cache in (ours, theirs)]
    return _judge(got, expected, after, dtype)


def _judge(
    got: list[tuple[Tensor, ...]], expected: list[tuple[Tensor, ...]], after: list[Tensor], dtype: torch.dtype
) -> float:
    """The largest distance, of NAMES step by step and of upstream's output after them; raises _Failed above LIMITS."""
    distances = {
        name: _distance(name, a, b)
        for name, a, b in zip(NAMES, zip(*got, strict=True), zip(*expected, strict=True), strict=True)
    }
    distances["upstream's own output after fast steps"] = _distance("output", after[:1], after[1:])
    far = [f"{name} by {distance:.1e}" for name, distance in distances.items() if not distance <= LIMITS[dtype]]  # NaN
    if far:
        limit = f"relative RMS; at most {LIMITS[dtype]:.0e} is allowed"
        raise _Failed(f"in {dtype_name(dtype)} these differ from upstream's: {', '.join(far)} ({limit})")
    return max(distances.values())


@contextlib.contextmanager
def _doing(what: str) -> Iterator[None]:
    """Upstream's code is unknown here: whatever it raises is the reason to refuse it."""
    try:
        yield
    except _Failed:
        raise
    except Exception as error:
        raise _Failed(f"{what}: {type(error).__name__}: {' '.join(str(error).split())}") from error


def _build(upstream: Upstream, dtype: torch.dtype, random: torch.Generator) -> tuple[GatedDeltaNet, ModelCache]:
    """A layer with random weights, and an empty cache."""
    modeling = sys.modules[upstream.layer_class.__module__]
    prefix = upstream.layer_class.__name__.removesuffix("GatedDeltaNet")
    config_class = getattr(modeling, f"{prefix}TextConfig", None) or getattr(modeling, f"{prefix}Config")
    config = config_class(**SIZES)
    layer = upstream.layer_class(config, layer_idx=0).eval().to(dtype)
    for weight in layer.parameters():
        if weight.dim() == 2:  # of a projection
            weight.copy_(_normal(weight.shape, random) / weight.shape[1] ** 0.5)
        else:
            weight.copy_(2 * torch.rand(weight.shape, generator=random, device="cpu") - 1)
    return layer, new_cache(config, modeling)


def _hidden_states(random: torch.Generator) -> Tensor:
    """One sequence of every magnitude: [B, T, hidden size]."""
    shape = len(MAGNITUDES), PROMPT + STEPS + 1, HIDDEN
    return _normal(shape, random) * torch.tensor(MAGNITUDES, device="cpu").view(-1, 1, 1)


def _normal(shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=random, dtype=torch.float32, device="cpu")


def _upstream_step(
    forward: Forward, layer: GatedDeltaNet, hidden_states: Tensor, cache: ModelCache, position: int
) -> Tensor:
    """As the decoder layer calls it: everything by keyword, the mask None."""
    names = _named_arguments(forward)
    arguments = {"hidden_states": hidden_states, "attention_mask": None}
    arguments["cache" if "cache" in names else "cache_params"] = cache
    if "cache_position" in names:
        arguments["cache_position"] = torch.arange(position, position + hidden_states.shape[1])
    return forward(layer, **arguments)


def _states(plan: Plan, layer: GatedDeltaNet, cache: ModelCache, hidden_states: Tensor) -> States:
    states = read_states(cache, layer.layer_idx)
    if isinstance(states, Reason):
        raise _Failed(f"its cache, {type(cache).__name__}, cannot be served: {states}")
    if not states_fit(plan, states, hidden_states):
        shapes = f"conv {tuple(states.conv.shape)}, recurrent {tuple(states.recurrent.shape)}"
        raise _Failed(f"its states have shapes {shapes}, not {plan.conv_shape}, {plan.recurrent_shape} a sequence")
    return states


def _copies(states: States) -> States:
    return States(*(state.clone() for state in states))  # either side may go on in place


def _distance(name: str, actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Relative RMS over the tensors [B, ...] of all steps; raises _Failed where they are no such thing."""
    for a, b in zip(actual, expected, strict=True):
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            raise _Failed(f"its {name} is {a.dtype} {tuple(a.shape)}, upstream's {b.dtype} {tuple(b.shape)}")
    a, b = (torch.stack(tuple(side)).double().flatten(2) for side in (actual, expected))  # [steps, B, values]
    return ((a - b).norm(dim=2) / b.norm(dim=2)).square().mean().sqrt().item()


def dtype_name(dtype: torch.dtype) -> str:
    """Without the module."""
    return str(dtype).removeprefix("torch.")
