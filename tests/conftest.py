"""Set up before Transformers is imported: quiet, offline, one thread; fresh memory holds NaN, not lucky zeros."""

from __future__ import annotations

import os

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: its kernels run on the CPU

import gc
import importlib.util
from collections.abc import Iterator

import pytest
import torch

import qwen_fastdecode

if importlib.util.find_spec("triton") is not None:
    from interpreter import hasten

    hasten()
torch.set_num_threads(1)  # tests run side by side
torch.use_deterministic_algorithms(True)  # fills torch.empty and its kin: whoever reads before writing reads NaN


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first, so that no worker begins one when the others have nothing left."""
    items.sort(key=lambda item: "slow" not in item.keywords and "ranks" not in item.path.parts)
    gc.collect()
    gc.freeze()  # a million objects of imported modules, which each collection would look at, and `patch()` as well


@pytest.fixture(autouse=True)
def _nothing_patched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test begins and ends with upstream as it is."""
    monkeypatch.delenv("QWEN_FASTDECODE", raising=False)
    yield
    qwen_fastdecode.unpatch()
