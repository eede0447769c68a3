"""The programs that people copy, and the subject of `make demo`: each runs as it stands."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from programs import ENVIRONMENT, ROOT, TINY, python
from transformers import AutoModelForCausalLM

EXAMPLES = ROOT / "examples"


def test_a_chat_that_streams(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    (folder / "chat_template.jinja").write_text("{% for turn in messages %}{{ turn.content }}\n{% endfor %}")
    (folder / "generation_config.json").write_text('{"eos_token_id": 0, "pad_token_id": 0, "do_sample": false}')
    program = (EXAMPLES / "chat.py").read_text().replace("max_new_tokens=512", "max_new_tokens=12")
    done = subprocess.run(
        [sys.executable, "-c", program, folder],
        input="A class definition\nThe for statement\n\n",
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "3 of 3 gated DeltaNet layers covered" in done.stdout
    assert len(done.stdout.splitlines()) > 4


def test_a_chat_without_a_template_says_what_to_do() -> None:
    done = python(EXAMPLES / "chat.py", TINY)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"{TINY} has no chat template; batch.py takes plain prompts"


def test_a_batch_job(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("The for statement is\n\nA class\n")
    done = python(EXAMPLES / "batch.py", TINY, prompts)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("A class")  # the shorter one comes first
    assert "\n\nThe for statement is" in done.stdout
    assert "torch    127" in done.stderr


def test_a_model_of_real_head_counts(tmp_path: Path) -> None:
    done = python(EXAMPLES / "real_heads.py", tmp_path / "model")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")  # also where torchao is, which complains
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "model").config
    assert (config.linear_num_key_heads, config.linear_num_value_heads, config.linear_value_head_dim) == (16, 32, 128)
