"""The registered operator: what torch.compile must know about it is true, and a compiled step stays one graph."""

from __future__ import annotations

import pytest
import torch
from triton_step import Step, as_op

from qwen_fastdecode.errors import UnsupportedStep
from qwen_fastdecode.ops.decode import gated_delta_decode
from qwen_fastdecode.ops.library import decode_registered
from qwen_fastdecode.ops.torch_cpu import decode_torch

OPERATOR = torch.ops.qwen_fastdecode.gated_delta_decode.default


def arguments(step: Step, backend: str) -> tuple:
    options = step.options
    scalars = options["eps"], options["gate"], options["beta_scale"]
    return *step.tensors, *scalars, backend, options["cu_seqlens"], *options["heads"]


STEPS: list[dict] = [
    {},
    {"T": 2},
    {"lengths": [1, 2]},
    {"heads": (2, 2)},
    {"dtype": torch.float32, "gate": "sigmoid"},
    {"beta_scale": 2.0},
]


@pytest.mark.parametrize(
    ("step", "backend"),
    [
        pytest.param(step, backend, marks=[pytest.mark.slow] if step and backend == "triton" else [])
        for step in STEPS
        for backend in ("auto", "torch", "triton")
    ],
    ids=str,
)
def test_opcheck(step: dict, backend: str) -> None:
    """Schema, mutations, fake implementation, static and dynamic shapes, as PyTorch itself checks them."""
    results = torch.library.opcheck(OPERATOR, arguments(Step(**step), backend))
    assert set(results.values()) == {"SUCCESS"}


def test_is_the_backend() -> None:
    direct, registered = Step(heads=(2, 2), beta_scale=2.0), Step(heads=(2, 2), beta_scale=2.0)
    expected = decode_torch(*as_op(direct.tensors, direct.options))
    assert torch.equal(decode_registered(*as_op(registered.tensors, registered.options), "torch"), expected)
    assert torch.equal(registered.conv_state, direct.conv_state)
    assert torch.equal(registered.recurrent_state, direct.recurrent_state)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager", "inductor"])
def test_compiled_steps_are_one_graph_without_recompiling(compiler: str) -> None:
    """Ten steps in place on views of a projection's output, fullgraph, compiled once."""
    torch._dynamo.reset()
    step, eager = Step(margin=4), Step(margin=4)
    hidden = torch.randn(10, 2, 8, dtype=step.dtype)
    weight = torch.randn(2 * (2 * 16 + 2 * 2 * 16), 8, dtype=step.dtype)

    def decode(x: torch.Tensor, s: Step) -> torch.Tensor:
        q, k, v, z = torch.nn.functional.linear(x, weight).unflatten(1, (2, -1)).split([16, 16, 32, 32], dim=2)
        tensors = (q, k, v.unflatten(2, (2, 16)), z.unflatten(2, (2, 16)), *s.tensors[4:])
        return gated_delta_decode(*tensors, **s.options, backend="torch")

    compiled = torch.compile(decode, backend=compiler, fullgraph=True)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for x in hidden:
            assert torch.equal(compiled(x, step), decode(x, eager))
    assert torch.equal(step.conv_state, eager.conv_state)
    assert torch.equal(step.recurrent_state, eager.recurrent_state)


def test_a_compiled_step_refuses_what_an_eager_one_does() -> None:
    torch._dynamo.reset()
    step = Step()

    def decode(*tensors: torch.Tensor) -> torch.Tensor:
        return gated_delta_decode(*tensors, **step.options, backend="torch")

    compiled = torch.compile(decode, backend="eager")
    *tensors, norm_weight = step.tensors
    with pytest.raises(UnsupportedStep, match="norm_weight"):
        compiled(*tensors, norm_weight[1:])
    with pytest.raises(ValueError, match="no gradient"):
        compiled(*tensors, norm_weight.clone().requires_grad_())
