"""The reviewed seams, and somebody else's patch over upstream's code: recognised however it hides."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from models import FAMILIES, LINEAR, build, generate, linear_layers
from transformers.cache_utils import Cache, LinearAttentionLayer

import qwen_fastdecode as qf
from qwen_fastdecode.upstream import seams
from qwen_fastdecode.upstream.seams import load_seams, tomllib, upstream_classes

NEW = 4
LAYER = type(linear_layers(build())[0])
MODULE = sys.modules[LAYER.__module__]
NORM = MODULE.Qwen3_5RMSNormGated
CONVOLUTION = "torch_causal_conv1d_update" if hasattr(MODULE, "torch_causal_conv1d_update") else "causal_conv1d_update"


def rewrite(function: Callable[..., Any]) -> Callable[..., Any]:
    """Another function of the same signature, as in a release that was not reviewed: its source differs."""

    def forward(self: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        return function(self, hidden_states, *args, **kwargs)

    return forward


def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
    """Somebody's patch that hides behind functools.wraps: inspect finds upstream's source."""
    return functools.wraps(function)(rewrite(function))


class Callee:
    def __init__(self, function: Callable[..., Any]):
        self.function = function

    def __get__(self, layer: Any, owner: type) -> Any:
        return functools.partial(self.function, layer)


@pytest.mark.parametrize(
    ("owner", "name", "patch", "complaint"),
    [
        (LAYER, "forward", rewrite, r"Qwen3_5GatedDeltaNet\.forward .*rewrite.* in .*test_seams\.py"),
        (LAYER, "forward", wrap, r"Qwen3_5GatedDeltaNet\.forward .*rewrite.* in .*test_seams\.py"),
        (LAYER, "forward", Callee, r"Qwen3_5GatedDeltaNet\.forward .*it is a Callee, not a function"),
        (NORM, "forward", rewrite, r"Qwen3_5RMSNormGated\.forward .*rewrite.* in .*test_seams\.py"),
        (NORM, "forward", wrap, r"Qwen3_5RMSNormGated\.forward .*rewrite.* in .*test_seams\.py"),
        (MODULE, CONVOLUTION, wrap, rf"{CONVOLUTION} .*rewrite.* in .*test_seams\.py"),
        (MODULE, "torch_recurrent_gated_delta_rule", wrap, r"torch_recurrent_gated_delta_rule .*test_seams\.py"),
        (LinearAttentionLayer, "update_conv_state", wrap, r"LinearAttentionLayer\.update_conv_state .*test_seams\.py"),
        (Cache, "update_recurrent_state", rewrite, r"Cache\.update_recurrent_state .*rewrite.* in .*test_seams\.py"),
    ],
)
def test_somebody_elses_patch_is_refused(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, patch: Callable[..., Any], complaint: str
) -> None:
    model = build()
    monkeypatch.setattr(owner, name, patch(vars(owner)[name]))
    theirs = vars(LAYER)["forward"]
    expected = generate(model, NEW)
    with pytest.raises(qf.UnknownUpstream, match=rf"{complaint}.*Undo that patch first.*strict=False"):
        qf.patch(model)
    with pytest.raises(qf.UnknownUpstream, match=complaint):
        qf.patch()
    assert vars(LAYER)["forward"] is theirs

    report = qf.patch(model, strict=False)
    assert report.covered == 0
    assert "patched by somebody else" in str(report)
    assert torch.equal(generate(model, NEW), expected)
    assert vars(LAYER)["forward"] is theirs


def test_patch_of_everything_leaves_an_unknown_family_and_covers_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    unknown, known = build("qwen3_5"), build("qwen3_next")
    monkeypatch.setattr(NORM, "forward", rewrite(NORM.forward))
    report = qf.patch(strict=False)
    assert "Qwen3_5RMSNormGated.forward is patched by somebody else" in "\n".join(report.notes)
    generate(unknown, NEW)
    generate(known, NEW)
    assert (qf.status(unknown).fast_steps, qf.status(known).fast_steps) == (0, LINEAR * (NEW - 1))


def test_the_kernels_package_is_not_somebody_elses_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    function = seams._find(MODULE, CONVOLUTION)

    class Func(torch.nn.Module):  # what that package makes of each function that upstream offers it
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

    Func.__module__ = "kernels.layer.layer"
    monkeypatch.setattr(MODULE, CONVOLUTION, Func())
    assert qf.patch(build()).covered == LINEAR


def test_a_patch_over_ours_is_told_and_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    monkeypatch.setattr(LAYER, "forward", vars(LAYER)["forward"])  # to be put back at the end
    qf.patch(model)
    theirs = wrap(vars(LAYER)["forward"])
    LAYER.forward = theirs
    with pytest.raises(qf.LayerNotCovered, match="overrides forward"):
        qf.patch(model)
    with pytest.warns(UserWarning, match=r"Qwen3_5GatedDeltaNet\.forward was patched again after qwen_fastdecode"):
        qf.unpatch()
    assert vars(LAYER)["forward"] is theirs
    expected = generate(build(), NEW)
    assert torch.equal(generate(model, NEW), expected)
    with pytest.raises(qf.UnknownUpstream, match="patched by somebody else"):
        qf.patch(model)


def test_every_family_of_this_release_was_reviewed() -> None:
    families = {upstream.family for upstream in upstream_classes(import_missing=True)}
    assert families == {name.split()[0].rstrip(",") for name in FAMILIES}
    for family in families:
        qf.patch(build(family))


def test_seams_are_data_about_code_that_exists() -> None:
    for seam in load_seams():
        assert seam.transformers.startswith(">=")
        assert f"{seam.layer}.forward" in seam.sources
        assert all(len(digest) == 64 for digest in seam.sources.values())


def test_the_entries_for_the_installed_release_are_the_reviewed_ones() -> None:
    reviewed = {seam.module: [] for seam in load_seams()}
    for seam in load_seams():
        reviewed[seam.module].append(seam.sources)
    for upstream in upstream_classes(import_missing=True):
        current = seams.current_sources(upstream, upstream.layer_class.forward)
        entry = tomllib.loads(seams.toml_lines(upstream, current))["seam"][0]
        assert transformers.__version__.startswith(entry["transformers"].split(",")[0].removeprefix(">="))
        assert entry["sources"] in reviewed[upstream.layer_class.__module__]


@pytest.mark.parametrize("family", sorted({"olmo_hybrid"} & set(FAMILIES)))
def test_an_older_layer_by_the_same_name_is_of_no_family(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to 5.14 olmo_hybrid was another step: neither patched nor in the way of a `patch()` of everything."""
    model = build(family)
    monkeypatch.delattr(sys.modules[type(linear_layers(model)[0]).__module__], "causal_conv1d_update")
    with pytest.raises(qf.NothingToPatch, match="OlmoHybridGatedDeltaNet is of no supported family"):
        qf.patch(model)
    assert family not in {layer.family for layer in qf.patch().layers}


def test_the_forward_under_a_decorator_that_hides_it_is_what_was_reviewed() -> None:
    def hide(forward_func: Callable[..., Any]) -> Callable[..., Any]:  # as Transformers does up to 5.15

        def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
            return forward_func(self, *args, **kwargs)

        return wrapped

    forward = seams.unwrap(LAYER.forward)
    assert forward.__name__ == "forward"
    assert seams.unwrap(hide(forward)) is forward
    assert seams._source_hash(hide(forward)) == seams._source_hash(forward)
