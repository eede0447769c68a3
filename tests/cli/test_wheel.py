"""The wheel: built, installed into an empty environment, and used there, with nothing of the source tree in reach."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PROGRAM = """
import pathlib, sys
import torch, transformers
import qwen_fastdecode

assert pathlib.Path(qwen_fastdecode.__file__).is_relative_to(sys.prefix), qwen_fastdecode.__file__
config = transformers.Qwen3_5TextConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2, head_dim=16,
    num_key_value_heads=1, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16,
    linear_value_head_dim=16, pad_token_id=0, eos_token_id=None,
)
model = transformers.Qwen3_5ForCausalLM(config).eval()
prompt = torch.tensor([[3, 1, 4, 1, 5]])
upstream = model.generate(prompt, max_new_tokens=6, do_sample=False)
report = qwen_fastdecode.patch(model)
assert torch.equal(model.generate(prompt, max_new_tokens=6, do_sample=False), upstream)
print(report.covered, qwen_fastdecode.status(model).fast_steps)
"""


def run(*command: str | Path, cwd: Path) -> str:
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # the source tree, perhaps
    result = subprocess.run([*map(str, command)], cwd=cwd, env=clean, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", folder, cwd=ROOT)
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_carries_the_seams(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for data in ROOT.glob("patches/*.toml"):
        assert f"qwen_fastdecode/patches/{data.name}" in names
    assert "qwen_fastdecode/ops/triton/tiles.toml" in names
    assert "qwen_fastdecode/py.typed" in names
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"qwen_fastdecode"}


def test_its_description_is_the_readme_with_links_that_work_outside_the_repository(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        about = message_from_bytes(archive.read(name))
    text = about.get_payload()
    assert about["Description-Content-Type"] == "text/markdown"
    assert text.startswith("# qwen_fastdecode\n")
    assert re.findall(r"\]\((?!https://)[^)]*\)", text) == []
    assert "](https://example.invalid/qwen-fastdecode/docs/tokens.svg)" in text
    assert {"License-Expression", "Author", "Project-URL", "Requires-Python", "Keywords"} <= {*about.keys()}


@pytest.mark.slow
def test_the_wheel_patches_a_model_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip()
    # The dependencies come from the test's own environment; a path line does not follow its editable installs.
    Path(site, "dependencies.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    assert run(python, "-c", PROGRAM, cwd=tmp_path).split() == ["3", "15"]
    assert "compare" in run(tmp_path / "venv" / "bin" / "qwen-fastdecode", "--help", cwd=tmp_path)
