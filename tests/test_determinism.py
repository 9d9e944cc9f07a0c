"""The same bits from run to run and for any number of threads, forward and backward."""

import pytest
import torch
from helpers import DTYPES, expert_inputs, make_plan, randn, run

import torch_moe
from torch_moe import ops
from torch_moe.testing import Shape

# Enough work for every kernel to be split between threads, with sizes that split unevenly.
SHAPE = Shape(num_tokens=601, hidden_size=67, intermediate_size=71, num_experts=31, top_k=3)
pytestmark = pytest.mark.usefixtures("restore_threads")


def layer_results(dtype, device):
    torch.manual_seed(0)
    layer = torch_moe.MoE(SHAPE.hidden_size, SHAPE.intermediate_size, SHAPE.num_experts, SHAPE.top_k, bias=True).to(
        device, dtype
    )
    x = randn(SHAPE.num_tokens, SHAPE.hidden_size, dtype=dtype, device=device).requires_grad_()
    output, routing = layer(x, return_routing=True)
    output.float().square().sum().backward()
    return [output, *routing, x.grad, *(parameter.grad for parameter in layer.parameters())]


def stage_results(dtype, device):
    """The unfused operators and what the layer above does not reach: the other layout, recomputation."""
    plan = make_plan(SHAPE, "zipf", device)
    results = list(plan)
    for layout in ("out_in", "in_out"):
        inputs = expert_inputs(SHAPE, dtype, device, bias=True, weight_layout=layout)
        results += run(
            lambda **tensors: ops.experts(**tensors, plan=plan, weight_layout=layout, recompute=True),  # noqa: B023
            inputs,
        ).values()
        results += run(
            lambda rows, weight, bias: ops.grouped_gemm(rows, weight, plan.expert_offsets, bias, layout),  # noqa: B023
            {
                "rows": randn(plan.num_rows, SHAPE.hidden_size, dtype=dtype, device=device),
                "weight": inputs["gate_up_proj"],
                "bias": inputs["gate_up_bias"],
            },
        ).values()
    rows = randn(plan.num_rows, 2 * SHAPE.intermediate_size, dtype=dtype, device=device)
    results += run(lambda rows: ops.activation(rows), {"rows": rows}).values()
    results += run(
        lambda rows, weights: ops.combine(rows, weights, plan),
        {"rows": rows, "weights": randn(SHAPE.num_tokens, 3, device=device)},
    ).values()
    return results


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("results", [layer_results, stage_results])
def test_bitwise_equal_for_runs_and_threads(results, dtype, device):
    torch.set_num_threads(1)
    expected = results(dtype, device)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for actual, reference in zip(results(dtype, device), expected, strict=True):
            assert torch.equal(actual, reference)
