"""Answers to many prompts, split between processes by accelerate; a run that was interrupted goes on where it stopped.

    accelerate launch --config_file examples/accelerate/gpu_2.yaml examples/accelerate_generate.py \
        MODEL --prompts prompts.jsonl --out answers.jsonl

Both files hold one JSON object a line: {"prompt": ...} and {"index": ..., "prompt": ..., "answer": ...}. At any moment
the answers are the beginning of the finished file: a round of prompts is split, answered and gathered, and the main
process appends it. So a later run, with as many processes as it likes, needs to know no more than how many there are.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import qwen_fastdecode

UNPAIRED = re.compile("[\ud800-\udfff]")  # half a character: JSON has an escape for it, no tokenizer has a token


class Refused(Exception):
    """The user has to change something; the message is one line."""


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Greedy answers to the prompts of a JSONL file, on several processes.")
    add = parser.add_argument
    add("model", metavar="MODEL", help="a folder with a checkpoint, or its name on the Hugging Face Hub")
    add("--prompts", metavar="FILE", type=Path, required=True, help='one JSON object with a "prompt" a line')
    add("--out", metavar="FILE", type=Path, required=True, help="the answers; continued if it is there")
    add("--batch", metavar="N", type=positive, default=8, help="prompts of one process at a time (default: 8)")
    add("--new-tokens", metavar="N", type=positive, default=64, help="at most, for each prompt (default: 64)")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="default: the checkpoint's")
    add("--cpu", action="store_true", help="even where there is a GPU")
    return parser.parse_args(argv)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return int(text)


def read_prompts(path: Path) -> list[str]:
    """The prompts of a JSONL file, in order; empty lines do not count."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # JSON may hold other ends of lines
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"cannot read {path}: {error}") from error
    prompts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise Refused(f"{path}, line {number} is not JSON: {error}") from error
        prompt = record.get("prompt") if isinstance(record, dict) else None
        if not isinstance(prompt, str) or not prompt or UNPAIRED.search(prompt):
            raise Refused(f'{path}, line {number}: expected an object with a text as "prompt", got {line.strip()[:80]}')
        prompts.append(prompt)
    if not prompts:
        raise Refused(f"{path} holds no prompt")
    return prompts


class Answers:
    """The file of answers, of which `done` are there. Only the main process has one, and only one run at a time."""

    def __init__(self, path: Path, prompts: Sequence[str], job: dict[str, Any]):
        """Raises Refused where the file is not the beginning of this job's answers. Removes a half-written line."""
        self.path = path
        try:
            self.file = path.open("a+b")
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # given back when the process ends, however it ends
        except BlockingIOError as error:
            raise Refused(f"another run is writing {path}") from error
        except OSError as error:
            raise Refused(f"cannot write {path}: {error.strerror}") from error
        *lines, rest = path.read_bytes().split(b"\n")
        self._check_job(path.with_name(f"{path.name}.job.json"), job, bool(lines or rest))
        for index, line in enumerate(lines):
            if not self._answers(line, index, prompts):
                raise Refused(f"{path}, line {index + 1} is not the answer to prompt {index}: use another --out")
        self.file.truncate(sum(len(line) + 1 for line in lines))
        self.done = len(lines)

    def _check_job(self, path: Path, job: dict[str, Any], begun: bool) -> None:
        """Answers of other prompts, or of another model, must not end up in one file."""
        if not begun:
            partial = path.with_name(f"{path.name}.new")
            partial.write_text(json.dumps(job, indent=2) + "\n", encoding="utf-8")
            partial.replace(path)
        elif not path.exists():
            raise Refused(
                f"{self.path} is there, but not {path.name}, which this script puts beside it: use another --out"
            )
        else:
            before = json.loads(path.read_text(encoding="utf-8"))
            changed = [name for name in job if before.get(name) != job[name]]
            if changed:
                raise Refused(f"{self.path} was begun with other {' and '.join(changed)}: use another --out")

    @staticmethod
    def _answers(line: bytes, index: int, prompts: Sequence[str]) -> bool:
        try:
            record = json.loads(line)
        except ValueError:
            return False
        whose = (record.get("index"), record.get("prompt")) if isinstance(record, dict) else None
        return index < len(prompts) and whose == (index, prompts[index])

    def append(self, records: Sequence[dict[str, Any]]) -> None:
        """On return they are on the disk."""
        self.file.write(b"".join(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records))
        self.file.flush()
        os.fsync(self.file.fileno())


def begin(args: argparse.Namespace) -> tuple[list[str], Answers]:
    prompts = read_prompts(args.prompts)
    digest = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()
    job = {"model": args.model, "prompts": digest, "new tokens": args.new_tokens, "dtype": args.dtype}
    return prompts, Answers(args.out, prompts, job)


def agree(state: PartialState, args: argparse.Namespace) -> tuple[list[str], int, Answers | None]:
    """What all processes begin with: the prompts, and how many are answered. Where one is refused, all exit with 2."""
    answers, shared = None, [None, None, None]
    if state.is_main_process:
        try:
            prompts, answers = begin(args)
            shared = [prompts, answers.done, None]
        except Refused as error:
            print(f"accelerate_generate.py: {error}", file=sys.stderr)
            shared = [None, None, "refused"]
    prompts, done, refused = broadcast_object_list(shared)
    if refused:
        sys.exit(2)
    return prompts, done, answers


def load(args: argparse.Namespace, device: torch.device) -> tuple[Any, Any]:
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype).eval().to(device)
    qwen_fastdecode.patch(model)
    return model, tokenizer


def answer(model: Any, tokenizer: Any, prompts: Sequence[str], new_tokens: int) -> list[str]:
    if not prompts:  # the last round may have fewer prompts than there are processes
        return []
    inputs = tokenizer(list(prompts), return_tensors="pt", padding=True).to(model.device)
    tokens = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    return tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    state = PartialState(cpu=args.cpu or not torch.accelerator.is_available())
    prompts, done, answers = agree(state, args)
    model, tokenizer = load(args, state.device)
    numbered = list(enumerate(prompts))
    size = args.batch * state.num_processes  # of a round
    with tqdm(total=len(prompts), initial=done, unit="prompt") as bar:  # on the main process alone
        for start in range(done, len(prompts), size):
            with state.split_between_processes(numbered[start : start + size]) as mine:
                texts = answer(model, tokenizer, [prompt for _, prompt in mine], args.new_tokens)
                records = [{"index": i, "prompt": p, "answer": text} for (i, p), text in zip(mine, texts, strict=True)]
            gathered = gather_object(records)  # in the order of the processes, which is that of the prompts
            if answers is not None:
                answers.append(gathered)
            bar.update(len(gathered))
    fast_steps = gather_object([qwen_fastdecode.status(model).fast_steps])
    state.print(
        f"{len(prompts)} answers in {args.out}, {done} of them from before; fast steps of each process: {fast_steps}"
    )
    state.destroy_process_group()


if __name__ == "__main__":
    main()
