"""What each release of Transformers can do for each family, with the patch and without: the rows of the table.

Every feature runs on two models of the same weights, one of them patched. Where upstream alone raises, the patched
model must raise the very same: the table then says that upstream fails, and with which words.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from models import FAMILIES, LINEAR, PROMPT, USUAL, build, forward, generate, linear_layers
from packaging.version import Version
from tolerances import FLOAT32_MODEL, relative_rms
from torch import Tensor
from transformers import CompileConfig, PreTrainedModel

import qwen_fastdecode as qf
from qwen_fastdecode.upstream.calls import cache_name

NEW = 8


def sampled(model: PreTrainedModel) -> Tensor:
    torch.manual_seed(7)
    return generate(model, NEW, do_sample=True, temperature=0.8, top_k=20)


def left_padded(model: PreTrainedModel) -> Tensor:
    mask = torch.ones_like(PROMPT)
    mask[0, :3] = 0
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(PROMPT * mask, attention_mask=mask, **options)


class NotServed(RuntimeError):
    """Upstream accepted what was asked for, and did something else."""


def static(model: PreTrainedModel) -> Tensor:
    caches: set[str] = set()

    def look(layer: Any, args: Any, kwargs: dict[str, Any]) -> None:
        caches.add(type(kwargs[cache_name(kwargs)]).__name__)

    with linear_layers(model)[0].register_forward_pre_hook(look, with_kwargs=True):
        tokens = generate(model, NEW, cache_implementation="static", disable_compile=True)
    if caches != {"StaticCache"}:
        raise NotServed(f"generate took {', '.join(caches)} instead of a StaticCache")
    return tokens


def compiled(model: PreTrainedModel) -> Tensor:
    """`generate` with a static cache compiles its decode step: one graph, with our operator once a layer if patched."""
    operators: list[int] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        operators.append(sum("gated_delta_decode" in str(node.target) for node in graph.graph.nodes))
        return graph.forward

    config = CompileConfig(fullgraph=True, dynamic=None, backend=keep, mode=None)
    config._compile_all_devices = True
    tokens = generate(model, NEW, cache_implementation="static", compile_config=config)
    if not operators:
        raise NotServed("generate compiled nothing")
    assert operators == [LINEAR if qf.status(model).covered else 0]
    return tokens


def turns(model: PreTrainedModel) -> Tensor:
    """A conversation that keeps its cache: a prompt, two steps, three tokens at once, a step. Logits [B, 12, V]."""
    tokens = torch.randint(1, 64, (2, 12), generator=torch.Generator().manual_seed(1))
    cache, logits = None, []
    for start, stop in [(0, 6), (6, 7), (7, 8), (8, 11), (11, 12)]:
        chunk, cache = forward(model, tokens[:, start:stop], cache)
        logits.append(chunk)
    return torch.cat(logits, dim=1)


def reset(model: PreTrainedModel) -> Tensor:
    """A cache that is used again. Logits [B, 14, V]."""
    cache, logits = None, []
    for _ in range(2):
        for tokens in (PROMPT, PROMPT[:, :1]):
            chunk, cache = forward(model, tokens, cache)
            logits.append(chunk)
        cache.reset()
    return torch.cat(logits, dim=1)


@dataclass(frozen=True)
class Feature:
    """`run` gives what must be the same; `steps`: how many decode steps each layer must serve fast, as counted."""

    run: Callable[[PreTrainedModel], Tensor]
    steps: int = NEW - 1


FEATURES = {
    "greedy": Feature(lambda model: generate(model, NEW)),
    "sampled": Feature(sampled),
    "beam search": Feature(lambda model: generate(model, NEW, num_beams=3)),
    "left padding": Feature(left_padded),
    "decode loop, several turns": Feature(turns, 3),
    "reset": Feature(reset, 2),
    "static cache": Feature(static),
    "torch.compile": Feature(compiled, 0),  # compiled steps are not counted, but in the graph
}


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def outcome(feature: Feature, model: PreTrainedModel) -> Tensor | Exception:
    """What the feature gives, or whatever it raises: both are compared."""
    try:
        return feature.run(model)
    except Exception as error:
        return error


def words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


@pytest.mark.parametrize(
    ("family", "feature"),
    [
        pytest.param(family, feature, marks=[pytest.mark.slow] if "compile" in feature and family != USUAL else [])
        for family in FAMILIES
        for feature in FEATURES
    ],
)
def test_feature(family: str, feature: str, record_property: Callable[[str, Any], None]) -> None:
    expected = outcome(FEATURES[feature], build(family))
    model = build(family)
    qf.patch(model)
    actual = outcome(FEATURES[feature], model)
    if isinstance(expected, Exception):
        if isinstance(expected, AssertionError):  # a test's own complaint is nobody's failure but the test's
            raise expected
        assert isinstance(actual, Exception)
        assert words(actual) == words(expected)
        record_property("upstream fails", words(expected))
        return
    if isinstance(actual, Exception):
        raise actual
    if expected.is_floating_point():
        assert relative_rms(actual, expected) < FLOAT32_MODEL
    else:
        assert torch.equal(actual, expected)
    assert qf.status(model).fast_steps == FEATURES[feature].steps * LINEAR


@pytest.mark.parametrize("family", FAMILIES)
def test_lifecycle(family: str) -> None:
    model, other = build(family), build(family, seed=1)
    layer_class = type(linear_layers(model)[0])
    upstream, attributes = vars(layer_class)["forward"], set(vars(linear_layers(model)[0]))
    expected = generate(model, NEW)
    with qf.patched(model):
        twin = copy.deepcopy(model)
        for each in (model, twin, other):
            generate(each, NEW)
        steps = [qf.status(each).fast_steps for each in (model, twin, other)]
    assert steps == [LINEAR * (NEW - 1), 0, 0]
    assert vars(layer_class)["forward"] is upstream
    assert set(vars(linear_layers(model)[0])) == attributes
    assert torch.equal(generate(model, NEW), expected)
    qf.patch()
    assert torch.equal(generate(model, NEW), expected)
    assert qf.status(model).fast_steps == LINEAR * (NEW - 1)


def test_cuda_graph_where_nothing_can_be_captured() -> None:
    """It is no error, and `status` says why: a release that is too old, or a CPU."""
    family = FAMILIES[0]
    expected, model = generate(build(family), NEW), build(family)
    qf.patch(model, cuda_graph=True)
    assert torch.equal(generate(model, NEW), expected)
    old = Version(transformers.__version__) < Version("5.13")
    reason = "Transformers before 5.13" if old else "the model is not on a CUDA device"
    assert [key.partition(",")[0] for key in qf.status(model).graphs.reasons] == [reason]
    qf.unpatch(model)
    assert torch.equal(generate(model, NEW), expected)
