"""What the user gave, checked before anything long begins."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ...errors import BadInput
from ..arguments import DTYPES

DEFAULT_PROMPTS = ("The for statement is used to iterate over the elements of",)
PLOT_FORMATS = (".png", ".svg", ".pdf")
GATED = "{} is gated: accept its terms on the Hub, then `hf auth login`"
HUB_TIMEOUT = 10.0  # seconds; loading would try again and again for half a minute, and say nothing


def require(*packages: str) -> None:
    """Raises BadInput if a package is not installed: one of the extra `compare`, or an installation without its own."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise BadInput(f"{' and '.join(missing)} not installed: pip install {' '.join(missing)}")


def read_prompts(given: Sequence[str], file: Path | None) -> list[str]:
    """The prompts given, then those of `file`; without either, a default.

    A file holds one prompt a line, or, where its name ends in .jsonl, one JSON object with a "prompt" a line.
    """
    if file is None:
        return list(given or DEFAULT_PROMPTS)
    try:
        lines = file.read_text(encoding="utf-8").split("\n")  # JSON may hold other ends of lines
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read the prompts in {file}: {_first_line(error)}") from error
    numbered = [(i, line.rstrip("\r")) for i, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise BadInput(f"{file} holds no prompt: it should have one a line")
    if file.suffix.lower() == ".jsonl":
        return [*given, *(_prompt_of(line, f"{file}, line {i}") for i, line in numbered)]
    return [*given, *(line for _, line in numbered)]


def _prompt_of(line: str, where: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise BadInput(f"{where} is not JSON: {error}") from error
    prompt = record.get("prompt") if isinstance(record, dict) else None
    if not isinstance(prompt, str):
        raise BadInput(f'{where}: expected an object with a text as "prompt", got {line.strip()[:80]}')
    return prompt


def in_chat(tokenizer: Any, prompts: Sequence[str]) -> list[str]:
    """Each prompt as what a user says, in the tokenizer's chat template, up to where the answer begins."""
    if not getattr(tokenizer, "chat_template", None):
        raise BadInput("--chat: this model's tokenizer has no chat template")
    turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return [tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) for turn in turns]


def check_batch(prompts: Sequence[str], size: int | None) -> None:
    """Raises BadInput where a batch of `size` leaves prompts out."""
    if size is not None and size < len(prompts):
        raise BadInput(f"--batch {size} is less than the number of prompts, {len(prompts)}")


def fill_batch(prompts: Sequence[str], size: int | None) -> list[str]:
    """`size` prompts, the given ones over and over; None: each of them once."""
    return list(islice(cycle(prompts), size or len(prompts)))


def check_writable(path: Path) -> None:
    """Makes the folder of `path` if it is missing, and opens the file: the only honest test. Leaves no empty file."""
    existed = path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
    except OSError as error:
        raise BadInput(f"cannot write {path}: {error.strerror}") from error
    if not existed:
        path.unlink()


def check_plot(path: Path) -> None:
    """As `check_writable`, for a picture."""
    if path.suffix.lower() not in PLOT_FORMATS:
        raise BadInput(f"--plot {path}: the name should end in {', '.join(PLOT_FORMATS)}")
    check_writable(path)


def find_device(name: str | None) -> torch.device:
    """The device called `name`, once it has answered; None: the first GPU if there is one, else the CPU."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise BadInput(f"device {name!r} cannot be used: {_first_line(error)}") from error
    return device


def load_model(
    name: str,
    dtype: str | None,
    device: torch.device,
    *,
    revision: str | None = None,
    device_map: str | None = None,
) -> tuple[Any, Any]:
    """The model, in eval mode, on `device` or as `device_map` spreads it, and its tokenizer.

    dtype None: float32 on a CPU, else bfloat16.
    """
    at = _find(name, revision)
    weights: dict[str, Any] = {"dtype": getattr(torch, DTYPES[dtype or _usual_dtype(device, device_map)])}
    _load("configuration", AutoConfig, name, **at)  # first: a folder without one holds no model at all
    tokenizer = _load("tokenizer", AutoTokenizer, name, **at)
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what Transformers makes where there are no files of one
        raise BadInput(f"{name} holds no tokenizer (tokenizer.json): save the model's there, with save_pretrained")
    if device_map is not None:
        return _load("weights", AutoModelForCausalLM, name, **at, **weights, device_map=device_map).eval(), tokenizer
    return _load("weights", AutoModelForCausalLM, name, **at, **weights).to(device).eval(), tokenizer


def _usual_dtype(device: torch.device, device_map: str | None) -> str:
    on_cpu = device.type == "cpu" if device_map is None else not torch.accelerator.is_available()
    return "float32" if on_cpu else "bfloat16"


def _find(name: str, revision: str | None) -> dict[str, str]:
    """What `from_pretrained` needs beside the name. Raises BadInput where there is no such model, in seconds."""
    if Path(name).is_dir():
        if revision is not None:
            raise BadInput(f"--revision {revision}: {name} is a folder")
        return {}
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise BadInput(f"no such model: {name} is no folder") from None
    if isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
        return {} if revision is None else {"revision": revision}
    if constants.HF_HUB_OFFLINE:
        raise BadInput(f"no such model: {name} is no folder, and offline not in the cache of the Hugging Face Hub")
    print(f"{name} is no folder; asking the Hugging Face Hub", file=sys.stderr)
    try:
        HfApi().model_info(name, revision=revision, timeout=HUB_TIMEOUT)
    except GatedRepoError as error:
        raise BadInput(GATED.format(name)) from error
    except RepositoryNotFoundError as error:
        raise BadInput(f"no such model: {name} is no folder, and not on the Hugging Face Hub") from error
    except RevisionNotFoundError as error:
        raise BadInput(f"--revision {revision}: {name} has none by that name") from error
    except Exception as error:  # of whichever HTTP client the hub's package uses
        raise BadInput(
            f"{name} is no folder, and the Hugging Face Hub cannot be asked: {_first_line(error)}"
        ) from error
    return {} if revision is None else {"revision": revision}


def _load(what: str, loader: Any, name: str, **kwargs: Any) -> Any:
    try:
        return loader.from_pretrained(name, **kwargs)
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        if isinstance(error.__cause__, GatedRepoError):  # its files are gated; what `_find` asks for is public
            raise BadInput(GATED.format(name)) from error
        raise BadInput(f"cannot load the {what} of {name}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
