"""What the user gave, checked before anything long begins."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import HFValidationError, validate_repo_id
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ...errors import BadInput

DEFAULT_PROMPTS = ("The for statement is used to iterate over the elements of",)
DTYPES = ("float32", "bfloat16", "float16")
PLOT_FORMATS = (".png", ".svg", ".pdf")


def require(*packages: str) -> None:
    """The packages of the extra `compare`. Raises BadInput if one is not installed."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise BadInput(f"{' and '.join(missing)} not installed: pip install 'qwen-fastdecode[compare]'")


def read_prompts(given: Sequence[str], file: Path | None) -> list[str]:
    """The prompts given, then the non-empty lines of `file`; without either, a default."""
    if file is None:
        return list(given or DEFAULT_PROMPTS)
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read the prompts in {file}: {_first_line(error)}") from error
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise BadInput(f"{file} holds no prompt: it should have one a line")
    return [*given, *prompts]


def fill_batch(prompts: Sequence[str], size: int | None) -> list[str]:
    """`size` prompts, the given ones over and over; None: each of them once."""
    if size is not None and size < len(prompts):
        raise BadInput(f"--batch {size} is less than the number of prompts, {len(prompts)}")
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


def load_model(name: str, dtype: str | None, device: torch.device) -> tuple[Any, Any]:
    """The model, in eval mode on `device`, and its tokenizer. dtype None: float32 on a CPU, else bfloat16."""
    if not Path(name).is_dir() and not _may_be_on_the_hub(name):
        raise BadInput(f"no such model: {name} is no folder")
    weights = {"dtype": getattr(torch, dtype or ("float32" if device.type == "cpu" else "bfloat16"))}
    _load("configuration", AutoConfig, name)  # first: a folder without one holds no model at all
    tokenizer = _load("tokenizer", AutoTokenizer, name)
    return _load("weights", AutoModelForCausalLM, name, **weights).to(device).eval(), tokenizer


def _may_be_on_the_hub(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _load(what: str, loader: Any, name: str, **kwargs: Any) -> Any:
    try:
        return loader.from_pretrained(name, **kwargs)
    except (OSError, ValueError, SafetensorError) as error:
        raise BadInput(f"cannot load the {what} of {name}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
