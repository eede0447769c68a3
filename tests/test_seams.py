"""Drift and foreign patches: code of Transformers that was not reviewed is recognised, whoever changed it and how."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from models import FAMILIES, LINEAR, build, generate, linear_layers

import qwen_fastdecode as qf
from qwen_fastdecode import seams
from qwen_fastdecode.seams import load_seams, upstream_classes

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


@pytest.mark.parametrize("name", ["Qwen3_5GatedDeltaNet.forward", "Qwen3_5RMSNormGated.forward", "l2norm"])
def test_a_release_that_was_not_reviewed_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    model = build()
    changed = seams._find(MODULE, name)
    hashes = seams._source_hash
    monkeypatch.setattr(seams, "_source_hash", lambda function: "0" if function is changed else hashes(function))
    with pytest.raises(qf.UnknownUpstream) as refusal:
        qf.patch(model)
    for part in (
        MODULE.__name__,
        f"Transformers {transformers.__version__}",
        f"{name} differs",
        "Upgrade qwen-fastdecode",
    ):
        assert part in str(refusal.value)
    assert qf.patch(model, strict=False).covered == 0


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


def test_the_entries_for_the_installed_release_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    seams.main()
    printed = capsys.readouterr().out
    assert f'transformers = "{transformers.__version__}"' in printed
    reviewed = {digest for seam in load_seams() for digest in seam.sources.values()}
    digests = [line.partition(" = ")[2].strip('"') for line in printed.splitlines() if '" = "' in line]
    assert digests
    assert set(digests) <= reviewed


@pytest.mark.parametrize("family", sorted({"olmo_hybrid"} & set(FAMILIES)))
def test_an_older_layer_by_the_same_name_is_of_no_family(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to 5.14 olmo_hybrid was another step: neither patched nor in the way of a `patch()` of everything."""
    model = build(family)
    monkeypatch.delattr(sys.modules[type(linear_layers(model)[0]).__module__], "causal_conv1d_update")
    with pytest.raises(qf.NothingToPatch, match="OlmoHybridGatedDeltaNet is of no supported family"):
        qf.patch(model)
    assert family not in {layer.family for layer in qf.patch().layers}
