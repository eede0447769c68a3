"""`patch(model, deferred_state=True)`: whoever reads or changes a state in between finds what upstream has there."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import FAMILIES, FEW_HEADS, LINEAR, build, cache_tensors, forward, generate, linear_layers
from small_rings import N, small_rings
from tolerances import BFLOAT16_STATE, FLOAT32_MODEL, relative_rms
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import Cache

import qwen_fastdecode as qf
from qwen_fastdecode.ops.ring import advance, pending
from qwen_fastdecode.steps import deferred
from qwen_fastdecode.steps.deferred import HASTY, RingDebt
from qwen_fastdecode.upstream.caches import ARE_WATCHED
from qwen_fastdecode.upstream.unsettled import debt_of, own_class

pytestmark = [
    pytest.mark.usefixtures(small_rings.__name__),
    pytest.mark.skipif(not ARE_WATCHED, reason="this release's caches are lists of tensors"),
]
TOKENS = torch.randint(1, 64, (2, 40), generator=torch.Generator().manual_seed(0))
Read = Callable[[PreTrainedModel, Cache], Cache]


def patch(model: PreTrainedModel, backend: str = "torch", **options: Any) -> None:
    qf.patch(model, backend=backend, deferred_state=True, **options)


def linear(model: PreTrainedModel, cache: Cache) -> list[Any]:
    """The cache layers of the gated DeltaNet layers."""
    return [cache.layers[layer.layer_idx] for layer in linear_layers(model)]


def recurrent(cache_layer: Any) -> Tensor:
    """As a user reads it: a dictionary from 5.14 on."""
    held = cache_layer.recurrent_states
    return held[0] if isinstance(held, dict) else held


def owing(model: PreTrainedModel, cache: Cache) -> int:
    """Cache layers in whose rings something waits."""
    debts = [debt_of(layer) for layer in linear(model, cache)]
    return sum(isinstance(debt, RingDebt) and bool(pending(debt.ring)[0].any()) for debt in debts)


# What may come between two steps. Each gets a model and its cache, and returns the cache to go on with.


def read(model: PreTrainedModel, cache: Cache) -> Cache:
    assert all(recurrent(layer).isfinite().all() for layer in linear(model, cache))
    assert owing(model, cache) == 0
    return cache


def write(model: PreTrainedModel, cache: Cache) -> Cache:
    for layer in linear(model, cache):
        recurrent(layer).mul_(0.5)
    return cache


def replace(model: PreTrainedModel, cache: Cache) -> Cache:
    for layer in linear(model, cache):
        if isinstance(layer.recurrent_states, dict):
            layer.recurrent_states[0] = recurrent(layer).flip(0)
        else:
            layer.recurrent_states = layer.recurrent_states.flip(0)
    return cache


def several_tokens(model: PreTrainedModel, cache: Cache) -> Cache:
    forward(model, TOKENS[:, :3], cache)
    return cache


def reorder(model: PreTrainedModel, cache: Cache) -> Cache:
    cache.reorder_cache(torch.tensor([1, 0]))
    return cache


def select(model: PreTrainedModel, cache: Cache) -> Cache:
    """Upstream's linear layers have no `batch_select_indices`: by hand, as a user would. The batch changes."""
    for layer in linear(model, cache):
        for name in ("conv_states", "recurrent_states"):
            held = getattr(layer, name)
            if isinstance(held, dict):
                held[0] = held[0][[1]]
            else:
                setattr(layer, name, held[[1]])
    for layer in cache.layers:
        if getattr(layer, "keys", None) is not None:
            layer.keys, layer.values = layer.keys[[1]], layer.values[[1]]
    return cache


def reset(model: PreTrainedModel, cache: Cache) -> Cache:
    cache.reset()
    forward(model, TOKENS[:, 3:8], cache)
    return cache


def offload(model: PreTrainedModel, cache: Cache) -> Cache:
    for layer in linear(model, cache):
        layer.offload()
        layer.prefetch()
    return cache


def deepcopy(model: PreTrainedModel, cache: Cache) -> Cache:
    return copy.deepcopy(cache)


def original_of_deepcopy(model: PreTrainedModel, cache: Cache) -> Cache:
    other = copy.deepcopy(cache)
    forward(model, TOKENS[:, :1], other)
    return cache


def pickled(model: PreTrainedModel, cache: Cache) -> Cache:
    cache.layers = pickle.loads(pickle.dumps(cache.layers))
    return cache


def saved(model: PreTrainedModel, cache: Cache) -> Cache:
    file = io.BytesIO()
    torch.save(cache.layers, file)
    file.seek(0)
    cache.layers = torch.load(file, weights_only=False)
    return cache


def state_dictionary(model: PreTrainedModel, cache: Cache) -> Cache:
    """Made again by hand, as serializers do that know `__getstate__` (of every object from Python 3.11 on)."""
    for layer in linear_layers(model):
        old = cache.layers[layer.layer_idx]
        new = cache.layers[layer.layer_idx] = own_class(old).__new__(own_class(old))
        vars(new).update(old.__getstate__() if hasattr(object, "__getstate__") else vars(copy.copy(old)))
    return cache


def another_class(model: PreTrainedModel, cache: Cache) -> Cache:
    for layer in linear(model, cache):
        own = own_class(layer)
        layer.__class__ = type(own.__name__, (own,), {})
        recurrent(layer).mul_(0.5)
    return cache


def unpatched(model: PreTrainedModel, cache: Cache) -> Cache:
    qf.unpatch(model)
    assert owing(model, cache) == 0
    return cache


def patched_otherwise(model: PreTrainedModel, cache: Cache) -> Cache:
    if qf.status(model).covered:
        with qf.patched(model, backend="torch"):
            forward(model, TOKENS[:, :1], cache)
    else:
        forward(model, TOKENS[:, :1], cache)
    return cache


def with_gradients(model: PreTrainedModel, cache: Cache) -> Cache:
    """Upstream's own step."""
    with torch.enable_grad():
        model(TOKENS[:, :1], past_key_values=cache, use_cache=True)
    for layer in cache.layers:  # as a user must: what he goes on with has no history
        for name in ("keys", "values"):
            if getattr(layer, name, None) is not None:
                setattr(layer, name, getattr(layer, name).detach())
    for layer in linear(model, cache):
        for name in ("conv_states", "recurrent_states"):
            held = getattr(layer, name)
            if isinstance(held, dict):
                held[0] = held[0].detach()
            else:
                setattr(layer, name, held.detach())
    return cache


READERS = [
    read,
    write,
    replace,
    several_tokens,
    reorder,
    select,
    reset,
    offload,
    deepcopy,
    original_of_deepcopy,
    pickled,
    saved,
    state_dictionary,
    another_class,
    unpatched,
    patched_otherwise,
    with_gradients,
]


def story(model: PreTrainedModel, between: Read, before: int, after: int = 6) -> tuple[Tensor, list[Tensor]]:
    """Logits of the steps around `between`, and what the cache holds in the end."""
    cache: Any = DynamicCache(config=model.config)
    forward(model, TOKENS[:, :5], cache)
    logits = [forward(model, TOKENS[:, 5 + i : 6 + i], cache)[0] for i in range(before)]
    cache = between(model, cache)
    rows = next(cache_tensors(cache)).shape[0]
    logits += [forward(model, TOKENS[:rows, 20 + i : 21 + i], cache)[0] for i in range(after)]
    return torch.cat([step.flatten() for step in logits]), list(cache_tensors(cache))


@pytest.mark.parametrize("between", READERS)
@pytest.mark.parametrize("before", [1, 3, N, N + 1, 2 * N + 3])
def test_whatever_comes_between_two_steps(between: Read, before: int) -> None:
    model = build()
    logits, held = story(model, between, before)
    patch(model)
    found, holds = story(model, between, before)
    assert relative_rms(found, logits) <= FLOAT32_MODEL
    assert all(relative_rms(a, b) <= FLOAT32_MODEL for a, b in zip(holds, held, strict=True))
    if between is not unpatched:
        assert qf.status(model).deferred_steps >= (before + 6) * LINEAR


@pytest.mark.parametrize("between", READERS)
def test_whatever_comes_between_two_steps_that_a_graph_holds(between: Read) -> None:
    """The debts last, as they do where a CUDA graph has recorded the steps."""

    def held(model: PreTrainedModel, cache: Cache) -> Cache:
        for debt in filter(None, map(debt_of, linear(model, cache))):
            debt.hold()
        cache = between(model, cache)
        return between(model, cache) if between in (read, reorder, pickled, deepcopy) else cache

    model = build()
    logits, holds = story(model, held, 3)
    patch(model)
    found, own = story(model, held, 3)
    assert relative_rms(found, logits) <= FLOAT32_MODEL
    assert all(relative_rms(a, b) <= FLOAT32_MODEL for a, b in zip(own, holds, strict=True))


def test_a_graph_of_somebodys_own_needs_a_ring_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ring made while a graph records would be emptied by every replay."""
    model = build()
    cache, begun = DynamicCache(config=model.config), DynamicCache(config=model.config)
    patch(model)
    for each in (cache, begun):
        forward(model, TOKENS[:, :5], each)
    forward(model, TOKENS[:, 5:6], begun)
    monkeypatch.setattr(deferred, "captured", lambda states: True)
    with pytest.raises(qf.PatchError, match="make one decode step with this cache before capturing"):
        forward(model, TOKENS[:, 5:6], cache)
    forward(model, TOKENS[:, 6:7], begun)
    debts = [debt_of(layer) for layer in linear(model, begun)]
    assert all(debt is not None and debt.lasts for debt in debts)


def test_what_a_replay_leaves_is_settled_though_nobody_said_so() -> None:
    """A step that Python does not see, as a captured graph makes it: straight into the ring."""
    model = build()
    cache = DynamicCache(config=model.config)
    patch(model)
    forward(model, TOKENS[:, :5], cache)
    forward(model, TOKENS[:, 5:6], cache)
    layer = linear(model, cache)[0]
    debt: Any = debt_of(layer)
    debt.hold()
    for _ in range(3):
        before = recurrent(layer).clone()
        assert not pending(debt.ring)[0].any()
        debt.ring.k[:, :, 0], debt.ring.d[:, :, 0], debt.ring.w[..., 0], debt.ring.w[..., -1] = 1.0, 2.0, 1.0, 0.5
        advance(debt.ring)
        assert torch.allclose(recurrent(layer), 0.5 * before + 2.0)
    debt.release()
    recurrent(layer)
    assert debt_of(layer) is None


@pytest.mark.parametrize("between", [read, pytest.param(several_tokens, marks=pytest.mark.slow), reset])
def test_by_the_kernels(between: Read) -> None:
    model = build(**FEW_HEADS)
    logits, held = story(model, between, N + 1)
    patch(model, "triton")
    found, holds = story(model, between, N + 1)
    assert relative_rms(found, logits) <= FLOAT32_MODEL
    assert all(relative_rms(a, b) <= FLOAT32_MODEL for a, b in zip(holds, held, strict=True))
    assert qf.status(model).deferred_steps >= (N + 7) * LINEAR


def test_what_waits_is_what_is_missing() -> None:
    """The tensor itself is behind, which proves that the readers above settled something."""
    model = build()
    patch(model)
    cache = DynamicCache(config=model.config)
    forward(model, TOKENS[:, :5], cache)
    before = [recurrent(layer).clone() for layer in linear(model, cache)]
    forward(model, TOKENS[:, 5:6], cache)
    tensors = [vars(layer)["recurrent_states"] for layer in linear(model, cache)]
    stale = [held[0] if isinstance(held, dict) else held for held in tensors]
    assert all(torch.equal(a, b) for a, b in zip(stale, before, strict=True))
    assert owing(model, cache) == LINEAR
    read(model, cache)
    assert not any(torch.equal(a, b) for a, b in zip(stale, before, strict=True))


def test_the_kill_switch_in_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    def off(model: PreTrainedModel, cache: Cache) -> Cache:
        monkeypatch.setenv("QWEN_FASTDECODE", "0")
        forward(model, TOKENS[:, :1], cache)
        monkeypatch.delenv("QWEN_FASTDECODE")
        return cache

    model = build()
    expected, _ = story(model, off, 3)
    patch(model)
    assert relative_rms(story(model, off, 3)[0], expected) <= FLOAT32_MODEL
    assert qf.status(model).fallbacks["switched off by QWEN_FASTDECODE=0"] == LINEAR


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_says_the_same(family: str) -> None:
    model = build(family)
    expected = generate(model, 14)
    patch(model)
    assert torch.equal(generate(model, 14), expected)
    assert qf.status(model).deferred_steps == 13 * len(linear_layers(model))


@pytest.mark.parametrize(
    "options", [{}, pytest.param({"cache_implementation": "static", "disable_compile": True}, marks=pytest.mark.slow)]
)
def test_generating_with_the_kernels(options: dict[str, Any]) -> None:
    model = build(**FEW_HEADS)
    expected = generate(model, 14, **options)
    patch(model, "triton")
    assert torch.equal(generate(model, 14, **options), expected)
    found = qf.status(model)
    assert found.deferred_steps == found.fast_steps == 13 * LINEAR


def test_inference_mode_and_none_in_turn() -> None:
    model = build()

    def logits() -> Tensor:
        cache = DynamicCache(config=model.config)
        forward(model, TOKENS[:, :5], cache)
        found = []
        for i in range(12):
            with torch.inference_mode(i % 3 == 1):
                found.append(forward(model, TOKENS[:, 5 + i : 6 + i], cache)[0].clone())
                if i % 5 == 4:
                    read(model, cache)
        return torch.cat(found)

    expected = logits()
    patch(model)
    assert relative_rms(logits(), expected) <= FLOAT32_MODEL


def test_beam_search_is_upstreams_and_soon_takes_two_passes() -> None:
    """It reorders the states at every step: deferring them would only add to the work."""
    model = build()
    expected = generate(model, 12, num_beams=3)
    patch(model)
    assert torch.equal(generate(model, 12, num_beams=3), expected)
    found = qf.status(model)
    assert found.fast_steps == 11 * LINEAR
    assert found.deferred_steps == HASTY * LINEAR
    assert "somebody reads or reorders the states between steps" in str(found)


def test_bfloat16_states() -> None:
    model = build()
    expected, _ = story(model, read, 7)
    patch(model, state_dtype=torch.bfloat16)
    found, _ = story(model, read, 7)
    assert 0 < relative_rms(found, expected) < BFLOAT16_STATE
    assert qf.status(model).deferred_steps == 13 * LINEAR


def test_a_state_is_converted_with_what_waits() -> None:
    """Patched again, with another dtype for the states, in the middle of a text."""
    model = build()
    expected, _ = story(model, lambda model, cache: cache, 6)
    patch(model)

    def again(model: PreTrainedModel, cache: Cache) -> Cache:
        patch(model, state_dtype=torch.bfloat16)
        return cache

    found, _ = story(model, again, 6)
    assert 0 < relative_rms(found, expected) < BFLOAT16_STATE


def test_two_caches_and_two_batches_in_turn() -> None:
    model = build()

    def logits() -> Tensor:
        caches = [DynamicCache(config=model.config) for _ in range(2)]
        rows = [TOKENS, TOKENS[:1]]
        found = []
        for i in range(9):
            for cache, tokens in zip(caches, rows, strict=True):
                chunk = tokens[:, :4] if i == 0 else tokens[:, 3 + i : 4 + i]
                found.append(forward(model, chunk, cache)[0][:, -1].flatten())
        return torch.cat(found)

    expected = logits()
    patch(model)
    assert relative_rms(logits(), expected) <= FLOAT32_MODEL


def test_a_ring_is_one_a_cache_layer_is_counted_and_goes_with_its_cache() -> None:
    model = build()
    patch(model)
    cache = DynamicCache(config=model.config)
    forward(model, TOKENS[:, :5], cache)
    forward(model, TOKENS[:, 5:6], cache)
    rings = [debt.ring for debt in map(debt_of, linear(model, cache)) if isinstance(debt, RingDebt)]
    gone = [weakref.ref(ring.k) for ring in rings]
    size = sum(ring.nbytes for ring in rings)
    assert len(rings) == LINEAR
    assert qf.status(model).ring_bytes == size > 0
    read(model, cache)
    cache.reset()
    forward(model, TOKENS[:, :5], cache)
    forward(model, TOKENS[:, 5:6], cache)
    assert [debt.ring for debt in map(debt_of, linear(model, cache)) if isinstance(debt, RingDebt)] == rings
    assert qf.status(model).ring_bytes == size
    del rings, cache
    gc.collect()
    assert qf.status(model).ring_bytes == 0
    assert all(ring() is None for ring in gone)


def test_unpatching_gives_the_memory_back() -> None:
    model = build()
    with qf.patched(model, backend="torch", deferred_state=True):
        cache = forward(model, TOKENS[:, :5])[1]
        forward(model, TOKENS[:, 5:6], cache)
        ring = weakref.ref(debt_of(linear(model, cache)[0]).ring.k)  # type: ignore[union-attr]
    gc.collect()
    assert ring() is None
    assert all(type(layer).__mro__[1].__name__ != type(layer).__name__ for layer in linear(model, cache))


def test_a_replaced_tensor_is_the_state_whatever_waited() -> None:
    """Through a dictionary that somebody kept, which nothing can watch: he set the state, and nothing is added."""
    model = build()
    cache = StaticCache(config=model.config, max_cache_len=48)
    patch(model)
    forward(model, TOKENS[:, :5], cache)
    kept = [layer.recurrent_states for layer in linear(model, cache)]
    if not isinstance(kept[0], dict):
        pytest.skip("one tensor a layer in this release")
    forward(model, TOKENS[:, 5:7], cache)
    for i in range(3):
        forward(model, TOKENS[:, 7 + i : 8 + i], cache)
    for held in kept:
        held[0] = torch.zeros_like(held[0])
    forward(model, TOKENS[:, 11:12], cache)
    for layer in linear(model, cache):
        norms = torch.linalg.matrix_norm(recurrent(layer).double(), ord=2)  # of rank one: k delta^T alone
        whole = torch.linalg.matrix_norm(recurrent(layer).double())
        assert torch.allclose(norms, whole, rtol=1e-5)
