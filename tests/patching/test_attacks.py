"""What somebody else does to the process around a patch: other patches, threads, forks, modes, odd arguments."""

from __future__ import annotations

import gc
import os
import signal
import threading
from typing import Any

import pytest
import torch
from models import FEW_HEADS, LINEAR, PROMPT, build, cache_tensors, forward, generate, linear_layers
from tolerances import FLOAT32_MODEL, relative_rms
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.models.qwen3_5 import modeling_qwen3_5

import qwen_fastdecode as qf
from qwen_fastdecode.ops.triton import tiles

NEW = 4
STEPS = (NEW - 1) * LINEAR
LAYER = modeling_qwen3_5.Qwen3_5GatedDeltaNet


def fast_steps(model: nn.Module) -> int:
    """Of one more call of `generate`."""
    before = qf.status(model).fast_steps
    generate(model, NEW)
    return qf.status(model).fast_steps - before


def test_blocks_that_overlap_end_each_by_itself() -> None:
    """Two tasks with one model: the first one to leave takes nothing from the other, and nothing stays on."""
    model = build()
    first, second = qf.patched(model), qf.patched(model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert fast_steps(model) == STEPS
    second.__exit__(None, None, None)
    assert qf.status(model).covered == 0
    assert not any(name.startswith("_qwen_fastdecode") for layer in linear_layers(model) for name in vars(layer))


def test_a_block_of_everything_that_ends_within_another_block_is_over() -> None:
    model, other = build(), build()
    everything, one = qf.patched(), qf.patched(model)
    everything.__enter__()
    one.__enter__()
    everything.__exit__(None, None, None)
    assert (qf.status(model).covered, qf.status(other).covered) == (LINEAR, 0)
    one.__exit__(None, None, None)
    assert (qf.status(model).covered, qf.status(build()).covered) == (0, 0)


def test_a_patch_within_a_block_outlasts_it() -> None:
    model = build()
    with qf.patched(model, state_dtype=torch.bfloat16):
        qf.patch(model)
    assert fast_steps(model) == STEPS


def test_our_own_dispatcher_put_back_by_somebody_is_known_again() -> None:
    original, model = vars(LAYER)["forward"], build()
    qf.patch(model)
    ours = vars(LAYER)["forward"]

    def theirs(self: Any, *args: Any, **kwargs: Any) -> Any:
        return ours(self, *args, **kwargs)

    LAYER.forward = theirs  # another library, over ours
    with pytest.warns(UserWarning, match="was patched again after qwen_fastdecode"):
        qf.unpatch(model)
    LAYER.forward = ours  # it goes, and leaves what it found
    try:
        assert qf.patch(model).covered == LINEAR
        assert fast_steps(model) == STEPS
        qf.unpatch(model)
        assert vars(LAYER)["forward"] is original
    finally:
        LAYER.forward = original


def test_unpatching_finds_layers_whatever_became_of_their_classes_name(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    qf.patch(model)
    monkeypatch.setattr(modeling_qwen3_5, LAYER.__name__, type("Other", (nn.Module,), {}))
    qf.unpatch(model)
    assert not any("_qwen_fastdecode_plan" in vars(layer) for layer in linear_layers(model))
    assert qf.patch(model).covered == LINEAR  # by the name that it was made with


def test_a_class_that_cannot_be_hashed_is_no_obstacle() -> None:
    class Unhashable(type):
        __hash__ = None  # type: ignore[assignment]

        def __eq__(cls, other: Any) -> bool:
            return cls is other

    thing = Unhashable("Thing", (), {})()
    assert gc.is_tracked(thing)
    model = build()
    qf.patch()
    assert fast_steps(model) == STEPS


def test_a_fork_while_another_thread_asks_for_the_status() -> None:
    model = build()
    qf.patch(model)
    done = threading.Event()

    def poll() -> None:
        while not done.is_set():
            qf.status(model)

    thread = threading.Thread(target=poll)
    thread.start()
    try:
        for _ in range(20):
            child = os.fork()
            if child == 0:
                signal.alarm(30)  # ends a child that hangs
                qf.status()
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        done.set()
        thread.join()


def test_fake_tensors_leave_nothing_behind() -> None:
    """The first decode of a process under FakeTensorMode, then a real one."""
    model = build()
    qf.patch(model)
    expected = generate(build(), NEW)
    tokens = ((1, 2, 24), (1, 2, 24), (1, 2, 1, 24), (1, 2, 1, 24), (1, 2, 1), (1, 2, 1))
    sizes = (*tokens, (1, 144, 4), (1, 2, 24, 24), (144, 4), (2,), (2,), (24,))
    real = [torch.randn(*size) for size in sizes]
    mode = FakeTensorMode()
    fake = [mode.from_tensor(x) for x in real]
    with mode, torch.no_grad():
        qf.ops.gated_delta_decode(*fake, backend="torch")
    with torch.no_grad():
        assert type(qf.ops.gated_delta_decode(*real, backend="torch")) is torch.Tensor
    assert torch.equal(generate(model, NEW), expected)


def test_new_environment_variables_compile_nothing_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    qf.patch(model)
    _, cache = forward(model, PROMPT)
    layer, hidden_states = linear_layers(model)[0], torch.randn(2, 1, 32)
    step = torch.compile(layer, backend="eager", fullgraph=True)
    with torch.no_grad():
        step(hidden_states=hidden_states, cache_params=cache, attention_mask=None)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for i in range(3):
                monkeypatch.setenv(f"SOMETHING_NEW_{i}", "1")
                step(hidden_states=hidden_states, cache_params=cache, attention_mask=None)


@pytest.mark.parametrize("word", ["0", "false", "off", "no", "OFF", " No "])
def test_every_word_for_off_switches_off(monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    model = build()
    qf.patch(model)
    monkeypatch.setenv("QWEN_FASTDECODE", word)
    assert fast_steps(model) == 0


def test_a_word_that_means_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN_FASTDECODE", "maybe")
    with pytest.warns(UserWarning, match="QWEN_FASTDECODE='maybe' means nothing"):
        qf.patch(build())


class Pipeline:
    def __init__(self, model: nn.Module) -> None:
        self.model = model


@pytest.mark.parametrize("act", [qf.patch, qf.unpatch, qf.status, lambda x: qf.patched(x).__enter__()])
def test_what_is_no_model_is_said(act: Any) -> None:
    model = build()
    for argument, message in {
        Pipeline(model): r"got a Pipeline, expected a torch.nn.Module or None \(everything\). Pass its .model",
        "a/name": "got a str, .* Pass the model that generates",
        type(model): "got the class Qwen3",
        (model,): "got a tuple",
    }.items():
        with pytest.raises(TypeError, match=f"model: {message}"):
            act(argument)


def test_states_kept_by_a_stranger_are_verified_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Upstream's caches changed consistently: stored doubled, halved on reading. Only running it can tell."""
    from transformers import cache_utils

    from qwen_fastdecode.layer import review
    from qwen_fastdecode.upstream import caches

    layer, cache = cache_utils.LinearAttentionLayer, cache_utils.Cache
    update, get = layer.update_recurrent_state, cache.get_recurrent_state

    def doubled(self: Any, states: Any, *args: Any, **options: Any) -> Any:
        return update(self, 2 * states, *args, **options) / 2

    def halved(self: Any, *args: Any, **options: Any) -> Any:
        states = get(self, *args, **options)
        return None if states is None else states / 2

    monkeypatch.setattr(layer, "update_recurrent_state", doubled)
    monkeypatch.setattr(cache, "get_recurrent_state", halved)
    with pytest.raises(qf.UnknownUpstream, match="patched by somebody else"):
        qf.patch(build())
    # As if a release came so: the functions are its own.
    monkeypatch.setitem(caches._OF_LAYER, "update_recurrent_state", doubled)
    monkeypatch.setitem(caches._OF_CACHE, "get_recurrent_state", halved)
    monkeypatch.setattr(review, "foreign_patch", lambda current: None)
    with pytest.raises(qf.UnknownUpstream, match=r"was reviewed, but the self-test failed: .*recurrent state"):
        qf.patch(build())


def test_tiles_that_cannot_be_read_are_no_tiles(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    table = tmp_path / "qwen_fastdecode" / "tiles.json"
    table.parent.mkdir()
    for content in ("{", '{"tile": [1]}', '{"tile": [{"device": "x"}]}'):
        table.write_text(content)
        tiles.tuned.cache_clear()
        with pytest.warns(UserWarning, match="the shipped tiles are used"):
            assert tiles.tuned() == {}
    table.unlink()
    table.mkdir()  # whatever else cannot be read
    tiles.tuned.cache_clear()
    with pytest.warns(UserWarning, match="the shipped tiles are used"):
        assert tiles.tuned() == {}
    tiles.tuned.cache_clear()


def test_a_user_without_a_home_has_no_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as where the user is in no table
    tiles.tuned.cache_clear()
    assert tiles.cache_file() is None
    assert tiles.tuned() == {}
    tiles.tuned.cache_clear()


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5"])
def test_projections_that_return_transposed_products(family: str, backend: str) -> None:
    """(weight @ x^T)^T: the same numbers, features a batch apart."""
    model = build(family, **FEW_HEADS)
    expected = generate(model, 8)
    for layer in linear_layers(model):
        for name, module in layer.named_children():
            if name.startswith("in_proj"):
                module.forward = lambda x, weight=module.weight: (weight @ x.flatten(0, 1).T).T.unflatten(
                    0, x.shape[:2]
                )
    qf.patch(model, backend=backend)
    assert torch.equal(generate(model, 8), expected)
    assert qf.status(model).fast_steps == 7 * LINEAR


@pytest.mark.parametrize("what", ["projection", "rates", "recurrent_states", "conv_states"])
def test_memory_that_is_not_what_a_tensor_says(what: str) -> None:
    """Lazily negated tensors (`torch.is_neg`): the kernel reads memory."""

    def negated(x: torch.Tensor) -> torch.Tensor:
        return torch._neg_view(-x)

    def decode(model: Any) -> list[torch.Tensor]:
        _, cache = forward(model, PROMPT)
        forward(model, PROMPT[:, 1:2], cache)  # what is prepared here is not for the next step
        for layer, kept in zip(linear_layers(model), cache.layers, strict=False):
            if what == "projection":
                layer.in_proj_b.register_forward_hook(lambda module, args, output: negated(output))
            elif what == "rates":
                rates = negated(layer.A_log.detach())
                del layer.A_log
                layer.A_log = rates
            else:
                states = getattr(kept, what)
                states[0] = negated(states[0])
        return [forward(model, PROMPT[:, :1], cache)[0], *(x.resolve_neg() for x in cache_tensors(cache))]

    expected = decode(build("qwen3_5"))
    model = build("qwen3_5")
    qf.patch(model, backend="triton")
    assert max(map(relative_rms, decode(model), expected)) <= FLOAT32_MODEL
    assert qf.status(model).fallbacks["a step that the backend does not compute"] == LINEAR
    assert "got a lazily negated tensor" in str(qf.status(model))


@pytest.mark.parametrize("wide", ["model", "rates"])
def test_what_triton_does_not_compute_is_upstreams(wide: str) -> None:
    """float64 weights, of all of a model or of one parameter: a fallback that says so, not an error in `generate`."""
    model = build("qwen3_5")
    if wide == "model":
        model.double()
    else:
        for layer in linear_layers(model):
            layer.A_log.data = layer.A_log.data.double()
    expected = generate(model, NEW)
    qf.patch(model, backend="triton")
    assert torch.equal(generate(model, NEW), expected)
    status = qf.status(model)
    assert (status.fast_steps, status.fallbacks["a step that the backend does not compute"]) == (0, STEPS)
    assert "computes in float32: got a float64 argument" in str(status)
