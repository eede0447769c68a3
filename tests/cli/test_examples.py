"""The programs that people copy, and the subject of `make demo`: each runs as it stands."""

from __future__ import annotations

import io
import runpy
import shutil
import sys
from pathlib import Path

import pytest
from programs import ROOT, TINY, python
from transformers import AutoModelForCausalLM

EXAMPLES = ROOT / "examples"


def run(monkeypatch: pytest.MonkeyPatch, program: Path, *arguments: Path, said: str = "") -> None:
    """In this process, as importing takes seconds."""
    monkeypatch.setattr(sys, "argv", [str(program), *map(str, arguments)])
    monkeypatch.setattr(sys, "stdin", io.StringIO(said))
    runpy.run_path(str(program), run_name="__main__")


def test_a_chat_that_streams(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    (folder / "chat_template.jinja").write_text("{% for turn in messages %}{{ turn.content }}\n{% endfor %}")
    (folder / "generation_config.json").write_text('{"eos_token_id": 0, "pad_token_id": 0, "do_sample": false}')
    program = tmp_path / "chat.py"
    program.write_text((EXAMPLES / "chat.py").read_text().replace("max_new_tokens=512", "max_new_tokens=12"))
    run(monkeypatch, program, folder, said="A class definition\nThe for statement\n\n")
    printed = capsys.readouterr().out
    assert "3 of 3 gated DeltaNet layers covered" in printed
    assert len(printed.splitlines()) > 4


def test_a_chat_without_a_template_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match=f"{TINY} has no chat template; batch.py takes plain prompts"):
        run(monkeypatch, EXAMPLES / "chat.py", TINY)


def test_a_batch_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("The for statement is\n\nA class\n")
    run(monkeypatch, EXAMPLES / "batch.py", TINY, prompts)
    printed = capsys.readouterr()
    assert printed.out.startswith("A class")  # the shorter one comes first
    assert "\n\nThe for statement is" in printed.out
    assert "torch    127" in printed.err


@pytest.mark.slow
def test_a_model_of_real_head_counts(tmp_path: Path) -> None:
    done = python(EXAMPLES / "real_heads.py", tmp_path / "model")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")  # also where torchao is, which complains
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "model").config
    assert (config.linear_num_key_heads, config.linear_num_value_heads, config.linear_value_head_dim) == (16, 32, 128)
