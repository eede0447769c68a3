"""`qwen-fastdecode doctor`: what it prints, and its exit code, in every state that it tells apart."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from drift import drift, modeling

from qwen_fastdecode.cli import doctor
from qwen_fastdecode.cli.doctor import Diagnosis, Serving
from qwen_fastdecode.cli.main import main
from qwen_fastdecode.layer import review as guard
from qwen_fastdecode.ops import backends
from qwen_fastdecode.ops.step import Recipe, Step
from qwen_fastdecode.ops.triton import clusters
from qwen_fastdecode.upstream import seams
from qwen_fastdecode.upstream.seams import Seam, load_seams, tomllib, upstream_classes

MODULE, LAYER = modeling("qwen3_5"), "Qwen3_5GatedDeltaNet"
REMARK = ("beta = b.sigmoid()", "beta = b.sigmoid()  # of every head")


def examine(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> tuple[int, str, str]:
    """The exit code, the verdict and all that came before it."""
    guard._verdicts.clear()  # as in a process of its own
    monkeypatch.setenv("COLUMNS", "80")
    capsys.readouterr()
    code = main(["doctor"])
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "\x1b" not in printed.out  # plain, as it is no terminal
    titles = ("All well.", "Works, with warnings:", "Cannot patch:")
    before, title, verdict = printed.out.rpartition(titles[code])
    assert title == titles[code]
    return code, " ".join(verdict.split()), before


def test_all_is_well(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, verdict, before = examine(capsys, monkeypatch)
    assert (code, verdict) == (0, "")
    assert max(map(len, before.splitlines())) <= 80
    assert "[[seam]]" not in before
    for name, version in {"transformers": transformers.__version__, "torch": torch.__version__}.items():
        assert [line.split() for line in before.splitlines() if line.startswith(f"{name} ")] == [[name, version]]
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in before.splitlines() if "│" in line]
    here = {upstream.family for upstream in upstream_classes(import_missing=True)}
    states = {row[0]: row[1] for row in rows if len(row) == 3 and row[0] in {seam.family for seam in load_seams()}}
    assert states == {s.family: "reviewed" if s.family in here else "not in this release" for s in load_seams()}
    checked = {(row[1], row[2], row[5]) for row in rows if len(row) == 6}
    assert checked == {(name, dtype, "right") for name in ("torch", "triton") for dtype in ("float32", "bfloat16")}
    assert "it runs in its interpreter" in before


def test_a_gpu_with_clusters_under_a_triton_that_is_not_known_for_them_is_said_to_be_slower(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert doctor._few_sequences(torch.device("cpu")) == ""
    monkeypatch.setattr(clusters, "device_reason", lambda _: None)
    assert doctor._few_sequences(torch.device("cuda")) == ""
    reason = "the launcher of Triton 9.9 was not reviewed"
    monkeypatch.setattr(clusters, "launcher_reason", lambda: reason)
    assert doctor._few_sequences(torch.device("cuda")).endswith(f"slower than it could be at batch 1 to 8, as {reason}")
    monkeypatch.setattr(clusters, "device_reason", lambda _: "no clusters")
    assert doctor._few_sequences(torch.device("cuda")) == ""


def test_verified_code_is_a_warning_with_the_entry_to_add(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    drift(monkeypatch, MODULE, LAYER, REMARK)
    reviewed = [seam.transformers for seam in load_seams() if seam.layer == LAYER]
    code, verdict, before = examine(capsys, monkeypatch)
    assert code == 1
    releases = f"{reviewed[0].partition(',')[0]},{reviewed[-1].rpartition(',')[2]}"  # without a gap: as one range
    assert f"{LAYER}.forward differs from every reviewed release ({releases})" in verdict
    assert "It was verified at run time" in verdict
    _, _, entry = before.partition("Once reviewed, to be added to patches/qwen3_5.toml:\n")
    (added,) = tomllib.loads(entry)["seam"]

    # With that entry in the file, the release is a reviewed one.
    known = (*load_seams(), Seam("qwen3_5", MODULE.__name__, LAYER, **added))
    monkeypatch.setattr(seams, "load_seams", lambda: known)
    monkeypatch.setattr(doctor, "load_seams", lambda: known)
    monkeypatch.setattr(guard, "_verdicts", {})
    code, verdict, before = examine(capsys, monkeypatch)
    assert (code, verdict) == (0, "")


def test_refused_code_cannot_be_patched(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    drift(monkeypatch, MODULE, LAYER, ("beta = b.sigmoid()", "beta = 2 * b.sigmoid()"))
    code, verdict, before = examine(capsys, monkeypatch)
    assert code == 2
    assert "and the self-test failed: in float32 these differ from upstream's: output by" in verdict
    assert "Upgrade qwen-fastdecode" in verdict
    assert "[[seam]]" not in before  # pasted, it would bless what is wrong


def test_somebody_elses_patch_cannot_be_patched(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = vars(getattr(MODULE, LAYER))["forward"]

    def theirs(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(getattr(MODULE, LAYER), "forward", theirs)
    code, verdict, before = examine(capsys, monkeypatch)
    assert code == 2
    assert f"{LAYER}.forward is patched by somebody else" in verdict
    assert "[[seam]]" not in before  # nothing to review


def negated(right: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: -right(*args, **kwargs)


def without_window(right: Callable[..., Any]) -> Callable[..., Any]:
    def decode(step: Step, recipe: Recipe) -> Any:
        before = step.states.conv.clone()
        out = right(step, recipe)
        step.states.conv.copy_(before)
        return out

    return decode


@pytest.mark.parametrize(("spoil", "cell"), [(negated, "wrong"), (without_window, "wrong conv state")])
def test_a_wrong_result_on_this_machine_is_found(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, spoil: Callable[..., Any], cell: str
) -> None:
    for upstream in upstream_classes(import_missing=True):
        guard.review(upstream)  # passes its self-test now, and is remembered
    monkeypatch.setattr(backends, "decode_torch", spoil(backends.decode_torch))
    code, verdict, before = examine(capsys, monkeypatch)
    assert code == 2
    assert "the torch backend is wrong on cpu in float32" in verdict
    assert f"{LAYER} was reviewed, but the self-test failed" in verdict
    assert cell in before.replace("│", " ")
    assert "the triton backend is wrong" not in verdict


def test_the_kill_switch_is_a_warning(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN_FASTDECODE", "0")
    assert examine(capsys, monkeypatch)[:2] == (1, "- QWEN_FASTDECODE=0 is set: the fast path is switched off.")


def test_one_json_object(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN_FASTDECODE", "0")
    assert main(["doctor", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["schema_version"], found["exit_code"], found["problems"]) == (1, 1, [])
    assert found["warnings"] == ["QWEN_FASTDECODE=0 is set: the fast path is switched off"]
    assert found["versions"]["torch"] == torch.__version__
    assert {family["family"] for family in found["families"]} == {seam.family for seam in load_seams()}
    assert all(row["right"] for row in found["numeric"])


def test_a_block_to_paste_into_an_issue(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--issue"]) == 0
    block = capsys.readouterr().out
    assert block.startswith("<details><summary>qwen-fastdecode doctor</summary>\n\n```\n")
    assert block.endswith("All well.\n```\n\n</details>\n")


def test_a_gpu_that_pytorch_serves_is_a_warning() -> None:
    serving = Serving(torch.device("cuda", 0), "Old GPU", "torch", "Triton needs compute capability 8.0")
    found = Diagnosis({}, [doctor.Seam("qwen3_5", "reviewed")], [serving], [])
    doctor._judge(found)
    assert found.exit_code == 1
    assert found.warnings == ["cuda:0 (Old GPU) is served by PyTorch, slowly. Triton needs compute capability 8.0"]


def test_a_release_without_any_family_cannot_be_patched(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "upstream_classes", lambda import_missing: iter(()))
    code, verdict, _ = examine(capsys, monkeypatch)
    assert (code, verdict) == (2, "- this release of Transformers has none of the supported families.")


def test_a_missing_extra_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "rich" else find_spec(name))
    assert main(["doctor"]) == 2
    assert capsys.readouterr().err == "qwen-fastdecode: rich not installed: pip install rich\n"
