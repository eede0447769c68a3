"""`qwen-fastdecode doctor`: what is installed, whether it can be patched, what would serve, and whether it is right."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import __version__
from ..layer import install
from ..layer.review import State, review
from ..layer.selftest import dtype_name
from ..ops.backends import Backend, select_backend, triton_unavailable
from ..ops.reference import decode_reference
from ..ops.step import Recipe, Step
from ..switch import KILL_SWITCH, switched_off
from ..upstream.seams import current_sources, load_seams, toml_lines, upstream_classes
from .compare.command import silence_libraries
from .compare.inputs import require
from .machine import cpu_name
from .tune import Heads, random_layer

SCHEMA_VERSION = 1  # of the JSON
OPTIONAL = ("flash-linear-attention", "causal-conv1d")  # upstream's own faster functions
PACKAGES = ("torch", "triton", "transformers", "accelerate", "wrapt", *OPTIONAL)
ABSENT = "not in this release"  # the state of a seam, beside those of `State`
CONV, STATE = 6, 7  # places of the two states in the op's arguments
BATCH, HEADS = 2, Heads(HK=1, R=2, D=128)
# Largest distance of a step from the float64 reference, relative RMS. float32: a sum has some hundred terms of 2^-24.
# bfloat16: the output is rounded once, by 2^-8 at most; the recurrent state stays float32.
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2.0**-8}


class Seam(NamedTuple):
    """A family's layer class: `state` and why; `toml`: the entry to add where the code was not reviewed."""

    family: str
    state: str
    detail: str = ""
    toml: str = ""


class Serving(NamedTuple):
    """Which backend serves on a device, and why the other does not."""

    device: torch.device
    name: str
    backend: str
    others: str


class Numeric(NamedTuple):
    """A backend's step beside the float64 reference: relative RMS of the output and of the recurrent state."""

    device: torch.device
    backend: str
    dtype: torch.dtype
    output: float
    state: float
    conv_equal: bool

    @property
    def right(self) -> bool:
        return self.conv_equal and self.output <= LIMITS[self.dtype] and self.state <= LIMITS[torch.float32]


@dataclass
class Diagnosis:
    """All that was found; `warnings` and `problems` in words for the user."""

    versions: dict[str, str]
    seams: list[Seam]
    serving: list[Serving]
    numeric: list[Numeric]
    warnings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        return 2 if self.problems else 1 if self.warnings else 0

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; docs/compare.md says what is what."""
        return {
            "schema_version": SCHEMA_VERSION,
            "package_version": __version__,
            "exit_code": self.exit_code,
            "problems": self.problems,
            "warnings": self.warnings,
            "versions": self.versions,
            "cpu": cpu_name(),
            "families": [seam._asdict() for seam in self.seams],
            "serving": [{**serving._asdict(), "device": str(serving.device)} for serving in self.serving],
            "numeric": [
                {**x._asdict(), "device": str(x.device), "dtype": dtype_name(x.dtype), "right": x.right}
                for x in self.numeric
            ],
        }


def run(args: argparse.Namespace) -> int:
    """Raises BadInput where a package for the tables is missing."""
    if not args.json:
        require("rich")
    silence_libraries()
    found = diagnose()
    if args.json:
        print(json.dumps(found.to_dict(), indent=2))
        return found.exit_code
    from .doctor_render import render, render_issue

    if args.issue:
        print(render_issue(found))
    else:
        render(found)
    return found.exit_code


def diagnose() -> Diagnosis:
    """Looks at everything; changes nothing."""
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    serving = [_serving(device) for device in devices]
    numeric = [check for device in devices for backend in _backends(device) for check in _check(device, backend)]
    found = Diagnosis(_versions(), list(_seams()), serving, numeric)
    _judge(found)
    return found


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed (not needed)" if package in OPTIONAL else "not installed"
    return versions


def _seams() -> Iterator[Seam]:
    here = {upstream.family: upstream for upstream in upstream_classes(import_missing=True)}
    for family in dict.fromkeys(seam.family for seam in load_seams()):
        if family not in here:
            yield Seam(family, ABSENT)
            continue
        verdict = review(here[family])
        current = current_sources(verdict.upstream, install.original_forward(verdict.upstream.layer_class))
        # Code that passed the self-test may be reviewed and added; of any other an entry would bless what is wrong.
        entry = toml_lines(verdict.upstream, current) if verdict.state is State.VERIFIED else ""
        yield Seam(family, verdict.state.value, verdict.detail or verdict.near, entry)


def _serving(device: torch.device) -> Serving:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    backend = select_backend("auto", device).name
    if backend == "triton":
        return Serving(device, name, backend, "torch: slower on a GPU; serves if asked for" + _few_sequences(device))
    reason = triton_unavailable(device) or "it runs in its interpreter, for tests (TRITON_INTERPRET=1)"
    return Serving(device, name, backend, reason)


def _few_sequences(device: torch.device) -> str:
    """What a GPU that has clusters does without them at small batches."""
    from ..ops.triton.clusters import device_reason, launcher_reason

    reason = None if device_reason(device) else launcher_reason()
    return f"; triton: slower than it could be at batch 1 to 8, as {reason}" if reason else ""


def _backends(device: torch.device) -> list[Backend]:
    names = ["torch"] if triton_unavailable(device) else ["torch", "triton"]
    return [select_backend(name, device) for name in names]


@torch.no_grad()
def _check(device: torch.device, backend: Backend) -> Iterator[Numeric]:
    recipe = Recipe((0, HEADS.HK * HEADS.R))
    for dtype in LIMITS:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            layer = random_layer(BATCH, HEADS, device)
        step = [x.to(dtype) for x in layer]
        step[STATE] = layer[STATE]
        reference = [x.clone() for x in step]
        reference[STATE] = layer[STATE].double()
        exact = decode_reference(Step.from_tensors(reference), recipe)
        out = backend.decode(Step.from_tensors(step), recipe)
        yield Numeric(
            device,
            backend.name,
            dtype,
            output=_distance(out, exact),
            state=_distance(step[STATE], reference[STATE]),
            conv_equal=torch.equal(step[CONV], reference[CONV]),
        )


def _distance(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


def _judge(found: Diagnosis) -> None:
    """What the user should know, in words."""
    for seam in found.seams:
        if seam.state == State.VERIFIED.value:
            found.warnings.append(seam.detail)
        elif seam.state == State.REFUSED.value:
            found.problems.append(seam.detail)
    if all(seam.state == ABSENT for seam in found.seams):
        found.problems.append("this release of Transformers has none of the supported families")
    for x in found.numeric:
        if not x.right:
            found.problems.append(
                f"the {x.backend} backend is wrong on {x.device} in {dtype_name(x.dtype)}: see its row above"
            )
    for serving in found.serving:
        if serving.device.type == "cuda" and serving.backend == "torch":
            found.warnings.append(f"{serving.device} ({serving.name}) is served by PyTorch, slowly. {serving.others}")
    if switched_off():
        found.warnings.append(f"{KILL_SWITCH}={os.environ[KILL_SWITCH]} is set: the fast path is switched off")
