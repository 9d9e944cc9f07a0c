"""What the tests of the stages share: seeded inputs, and the comparison of an operator with its reference."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from torch_moe import ops
from torch_moe.testing import Shape, assert_close, routing

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ALL_DTYPES = (*DTYPES, torch.float64)


def weight_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of topk_weights that goes with tokens of ``dtype``."""
    return torch.promote_types(dtype, torch.float32)


def randn(*size: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", seed: int = 0) -> Tensor:
    """Seeded normal numbers, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*size, generator=generator, dtype=torch.float64).to(device=device, dtype=dtype)


def make_plan(shape: Shape, routing_name: str = "uniform", device: torch.device | str = "cpu") -> ops.Plan:
    ids = routing(routing_name, shape.num_tokens, shape.num_experts, shape.top_k)
    return ops.plan(ids.to(device), shape.num_experts)


def plan_to(plan: ops.Plan, device: torch.device | str) -> ops.Plan:
    return ops.Plan(*(tensor.to(device) for tensor in plan))


def expert_inputs(
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    gated: bool = True,
    bias: bool = False,
    weight_layout: str = "out_in",
) -> dict[str, Tensor]:
    """The differentiable arguments of ``ops.experts``, scaled so that every stage's values are near 1."""
    tokens, hidden, intermediate, experts, top_k = shape
    width = 2 * intermediate if gated else intermediate
    like = {"dtype": dtype, "device": device}
    gate_up = randn(experts, width, hidden, **like, seed=2) / hidden**0.5
    down = randn(experts, hidden, intermediate, **like, seed=3) / intermediate**0.5
    if weight_layout == "in_out":
        gate_up, down = gate_up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
    weights = randn(tokens, top_k, dtype=weight_dtype(dtype), device=device, seed=4).softmax(dim=-1)
    inputs = {
        "hidden_states": randn(tokens, hidden, **like, seed=1),
        "gate_up_proj": gate_up,
        "down_proj": down,
        "topk_weights": weights,
    }
    if bias:
        inputs["gate_up_bias"] = randn(experts, width, **like, seed=5)
        inputs["down_bias"] = randn(experts, hidden, **like, seed=6)
    return inputs


def run(function: Callable[..., Tensor], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the output and, by the names of the inputs, the gradients for one seeded output gradient."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in inputs.items()}
    output = function(**leaves)
    # The same numbers in every dtype: both sides get what the narrowest of the two can hold.
    grad_output = randn(*output.shape, dtype=torch.bfloat16, device=output.device, seed=99).to(output.dtype)
    grads = torch.autograd.grad(output, list(leaves.values()), grad_output)
    return {"output": output.detach(), **dict(zip(leaves, grads, strict=True))}


def check_against_reference(
    op: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    inputs: Mapping[str, Tensor],
    lengths: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
) -> None:
    """Compare output and gradients with those of the reference in fp64.

    ``lengths`` has, for "output" and for every input, the steps of ``torch_moe.testing.tolerance``.
    """
    actual = run(op, inputs)
    expected = run(reference, {name: tensor.double() for name, tensor in inputs.items()})
    for name, steps in lengths.items():
        stored = actual[name].dtype
        assert stored == (inputs[name].dtype if name != "output" else dtype), name
        try:
            assert_close(actual[name], expected[name], *steps, dtype=dtype)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None
