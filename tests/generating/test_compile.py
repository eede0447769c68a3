"""torch.compile: one graph a decode step, with one registered operator a layer, and undone as cleanly as it is done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from models import LINEAR, PROMPT, TRAINED, build, generate, load, prompt
from torch import Tensor
from torch._dynamo.backends.registry import lookup_backend
from transformers import CompileConfig, PreTrainedModel, StaticCache
from transformers.activations import ACT2FN

import qwen_fastdecode as qf

NEW = 64
QUICK = (TRAINED[-1], "aot_eager")  # of the ways to compile a whole checkpoint, the one that make test runs


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Recorder:
    """A backend of torch.compile that keeps the graphs it is given."""

    def __init__(self, backend: str = "eager"):
        self.graphs: list[torch.fx.GraphModule] = []
        self.served = 0  # layer steps by our operator: no counter of the package sees inside a graph
        compile_graph = lookup_backend(backend)

        def record(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
            self.graphs.append(graph)
            layers, run = self.operators[-1], compile_graph(graph, inputs)

            def counted(*arguments: Any) -> Any:
                self.served += layers
                return run(*arguments)

            return counted

        self.record = record  # a function: `generate` copies its configuration, and copies no function

    def compile(self, model: PreTrainedModel) -> Callable[..., Any]:
        return torch.compile(model.forward, backend=self.record, fullgraph=True)

    @property
    def operators(self) -> list[int]:
        """How many of our operators each graph holds."""
        return [sum("gated_delta_decode" in str(node.target) for node in graph.graph.nodes) for graph in self.graphs]


@torch.no_grad()
def decode(model: PreTrainedModel, step: Callable[..., Any], new: int = NEW, tokens: Tensor = PROMPT) -> Tensor:
    """Greedy tokens after an eager prefill into a static cache: [B, T + new]."""
    cache = StaticCache(config=model.config, max_cache_len=tokens.shape[1] + NEW)
    logits = model(tokens, past_key_values=cache).logits
    for _ in range(new):
        token = logits[:, -1:].argmax(-1)
        tokens = torch.cat([tokens, token], dim=1)
        logits = step(token, past_key_values=cache).logits
    return tokens


def small(seed: int = 0) -> PreTrainedModel:
    """One gated DeltaNet layer, one of full attention: there is less to trace."""
    return build(seed=seed, num_hidden_layers=2, layer_types=["linear_attention", "full_attention"])


@pytest.mark.parametrize(
    ("checkpoint", "backend"),
    [
        pytest.param(checkpoint, backend, marks=[] if (checkpoint, backend) == QUICK else [pytest.mark.slow])
        for checkpoint in TRAINED
        for backend in ("eager", "aot_eager")
    ],
)
def test_a_decode_step_is_one_graph_for_all_steps(checkpoint: str, backend: str) -> None:
    model, tokens = load(checkpoint), prompt(checkpoint)
    expected = decode(model, model.forward, tokens=tokens)
    qf.patch(model)
    recorder = Recorder(backend)
    assert torch.equal(decode(model, recorder.compile(model), tokens=tokens), expected)
    assert recorder.operators == [LINEAR]  # fullgraph: no break; one graph: no recompile
    assert recorder.served == NEW * LINEAR
    assert qf.status(model).fast_steps == 0
    assert "inside torch.compile" in str(qf.status(model))


@pytest.mark.slow
def test_unpatch_gives_a_compiled_model_back_to_upstream() -> None:
    model, recorder = small(), Recorder()
    step, expected = recorder.compile(model), decode(model, model.forward, 8)
    qf.patch(model)
    assert torch.equal(decode(model, step, 8), expected)
    qf.unpatch(model)
    assert torch.equal(decode(model, step, 8), expected)
    assert recorder.operators == [1, 0]


@pytest.mark.parametrize("everything", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_patching_after_compiling_takes_effect(everything: bool) -> None:
    model, recorder = small(), Recorder()
    step = recorder.compile(model)
    expected = decode(model, step, 8)
    with qf.patched(None if everything else model):
        assert torch.equal(decode(model, step, 8), expected)
    assert torch.equal(decode(model, step, 8), expected)
    assert recorder.operators == [0, 1, 0]


@pytest.mark.slow
def test_another_model_compiled_beside_a_patched_one_stays_upstreams() -> None:
    other, recorder = small(seed=1), Recorder()
    qf.patch(small())
    decode(other, recorder.compile(other), 4)
    assert recorder.operators == [0]


def test_a_compiled_graph_obeys_the_kill_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    model, recorder = small(), Recorder()
    step, expected = recorder.compile(model), decode(model, model.forward, 8)
    qf.patch(model)
    assert torch.equal(decode(model, step, 8), expected)
    monkeypatch.setenv("QWEN_FASTDECODE", "off")
    qf.status(model)  # reads the switch, as any eager pass does (a prompt's in `generate`)
    assert torch.equal(decode(model, step, 8), expected)
    monkeypatch.delenv("QWEN_FASTDECODE")
    qf.status(model)
    assert torch.equal(decode(model, step, 8), expected)
    assert recorder.operators == [1, 0]  # then the first graph serves again


@pytest.mark.slow
def test_patch_of_everything_covers_a_layer_whose_first_use_is_compiled() -> None:
    expected = decode(small(), small().forward, 1)
    qf.patch()
    model, recorder = small(), Recorder()
    step = recorder.compile(model)
    cache = StaticCache(config=model.config, max_cache_len=32)
    with torch.no_grad():
        token = step(PROMPT, past_key_values=cache).logits[:, -1:].argmax(-1)
        step(token, past_key_values=cache)
    assert torch.equal(token, expected[:, -1:])
    assert recorder.operators == [0, 1]  # the prompt's pass, the decode step
    assert qf.status(model).covered == 1


@pytest.mark.slow
def test_a_compiled_graph_notices_an_activation_that_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    class Doubled(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * torch.nn.functional.silu(x)

    model, recorder = small(), Recorder()
    step, expected = recorder.compile(model), decode(model, model.forward, 8)
    with monkeypatch.context() as patching:
        patching.setitem(ACT2FN, "silu", Doubled)
        doubled = decode(model, model.forward, 8)
    assert not torch.equal(doubled, expected)
    qf.patch(model)
    assert torch.equal(decode(model, step, 8), expected)
    monkeypatch.setitem(ACT2FN, "silu", Doubled)
    assert torch.equal(decode(model, step, 8), doubled)
    assert recorder.operators == [1, 0]


def test_generate_compiles_its_own_decode_step() -> None:
    model, recorder = small(), Recorder()
    expected = generate(model, 16)
    qf.patch(model)
    config = CompileConfig(fullgraph=True, dynamic=None, backend=recorder.record, mode=None)
    config._compile_all_devices = True
    assert torch.equal(generate(model, 16, cache_implementation="static", compile_config=config), expected)
    assert recorder.operators == [1]
    assert recorder.served == 15
