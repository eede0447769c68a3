"""The ways of running one model that are compared, by name."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import qwen_fastdecode
from benchmarks.op.gpu_layers import installed_kernels, pytorch_functions
from qwen_fastdecode import graph
from qwen_fastdecode.cli.compare.generation import Batch
from qwen_fastdecode.cli.compare.sides import compiled

Choices = list[Any]  # what each call of a router gave, in the order of the calls


@dataclass(frozen=True)
class Side:
    """Transformers, with what is not its default."""

    patch: dict[str, Any] | None = None  # arguments of `patched`; None: not patched
    compiled: bool = False  # a static cache, which Transformers compiles the decode step for, with CUDA graphs
    fla: bool = False  # flash-linear-attention's kernels where Transformers uses them, in prompts as well

    @contextmanager
    def entered(self, model: Any) -> Iterator[None]:
        """The side is on. Raises AssertionError at the end where the patch served nothing or nothing was captured."""
        with ExitStack() as stack:
            if not self.fla:
                stack.enter_context(pytorch_functions(source_of(model)))
            if self.compiled:
                stack.enter_context(compiled(model))
            if self.patch is not None:
                stack.enter_context(qwen_fastdecode.patched(model, backend=_backend(model), **self.patch))
            yield
            self._check(model)

    @property
    def kernels(self) -> str:
        """Whose kernels its gated DeltaNet steps are to run."""
        return OURS if self.patch is not None else FLA if self.fla else PYTORCH

    def _check(self, model: Any) -> None:
        if self.patch is None or self.compiled or model.device.type != "cuda":  # no counter sees a compiled step
            return
        status = qwen_fastdecode.status(model)
        assert status.fast_steps, f"no step was served fast:\n{status}"
        found = graph.describe(model)
        assert found is None or found.replays, f"nothing was replayed: {found}"


PYTORCH, FLA, OURS = "PyTorch", "flash-linear-attention", "qwen_fastdecode"
SIDES = {
    "eager": Side(),
    "fla": Side(fla=True),
    "patched": Side(patch={}),
    "cuda_graph": Side(patch={"cuda_graph": True}),
    "compiled": Side(compiled=True),
    "patched_compiled": Side(patch={}, compiled=True),
}


def _backend(model: Any) -> Any:
    return "triton" if model.device.type == "cuda" else "torch"


def source_of(model: Any) -> ModuleType:
    """The module of Transformers that the model's gated DeltaNet layers are from."""
    layer = next(module for module in model.modules() if type(module).__name__.endswith("GatedDeltaNet"))
    return sys.modules[type(layer).__module__]


def chosen(names: str, model: Any) -> dict[str, Side]:
    """The sides of a list "eager,patched"; "" is all. Raises ValueError for one that is not known or cannot run."""
    asked = names.split(",") if names else [*SIDES]
    unknown = {*asked} - {*SIDES}
    if unknown:
        raise ValueError(f"--sides: {', '.join(sorted(unknown))}: expected some of {', '.join(SIDES)}")
    if any(SIDES[name].fla for name in asked) and not installed_kernels(source_of(model)):
        raise ValueError("flash-linear-attention is not installed: put it on PYTHONPATH, or name other --sides")
    return {name: side for name, side in SIDES.items() if name in asked}


def distance(found: Tensor, expected: Tensor) -> float:
    """Relative RMS."""
    return ((found - expected).norm() / expected.norm()).item()


def prompts(model: Any, batch: int, length: int) -> Batch:
    """The same random prompts [batch, length] at every call."""
    torch.manual_seed(1)
    ids = torch.randint(1, model.config.get_text_config().vocab_size, (batch, length), device=model.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def forced_tokens(model: Any, batch: int, count: int) -> Tensor:
    """The same random tokens [batch, count] at every call."""
    torch.manual_seed(2)
    return torch.randint(1, model.config.get_text_config().vocab_size, (batch, count), device=model.device)


@contextmanager
def recorded_choices(model: Any, into: Choices) -> Iterator[None]:
    """What the model's routers give is kept."""
    with _router_hook(model, lambda router, args, output: into.append(output)):
        yield


@contextmanager
def replayed_choices(model: Any, choices: Choices) -> Iterator[None]:
    """The model's routers give what they gave then."""
    left = deque(choices)
    with _router_hook(model, lambda router, args, output: left.popleft()):
        yield
    assert not left, f"{len(left)} choices of routers were not asked for"


@contextmanager
def _router_hook(model: Any, hook: Any) -> Iterator[None]:
    routers = (module for module in model.modules() if type(module).__name__.endswith("TopKRouter"))
    handles = [router.register_forward_hook(hook) for router in routers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
