"""Gradients of the weights added to existing ones: sums, idle experts, what autograd sees, and errors."""

import itertools

import pytest
import torch
from helpers import ALL_DTYPES, DTYPES, expert_inputs, make_plan, randn

from torch_moe import ops
from torch_moe.nn import Experts
from torch_moe.testing import SHAPES, assert_close

PROJECTIONS = ("gate_up_proj", "down_proj")


def lhs_rhs(lhs, rhs, plan):
    offsets = plan.expert_offsets.tolist()
    return torch.stack([lhs[a:b].double().T @ rhs[a:b].double() for a, b in itertools.pairwise(offsets)])


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_wgrad_adds_to_what_is_there(name, dtype, device):
    shape, plan = SHAPES[name], make_plan(SHAPES[name], "zipf", device)
    rows = shape.num_tokens * shape.top_k
    lhs = randn(rows, shape.intermediate_size, dtype=dtype, device=device, seed=1)
    rhs = randn(rows, shape.hidden_size, dtype=dtype, device=device, seed=2)
    existing = randn(shape.num_experts, lhs.shape[1], rhs.shape[1], dtype=dtype, device=device, seed=3)
    added = existing.clone()
    torch.ops.moe.grouped_gemm_wgrad_(added, lhs, rhs, plan.expert_offsets)
    assert_close(added, existing.double() + lhs_rhs(lhs, rhs, plan), rows, 2)
    idle = plan.expert_offsets.diff() == 0
    assert torch.equal(added[idle], existing[idle])


@pytest.mark.parametrize("weight_layout", ["out_in", "in_out"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_experts_accumulate(dtype, weight_layout, device):
    shape = SHAPES["unaligned"]
    plan = make_plan(shape, "zipf", device)
    results = []
    for accumulate in (False, True):
        inputs = {
            name: tensor.requires_grad_()
            for name, tensor in expert_inputs(shape, dtype, device, weight_layout=weight_layout).items()
        }
        places = []
        for step in range(3):
            output = ops.experts(**inputs, plan=plan, weight_layout=weight_layout, accumulate=accumulate)
            output.backward(randn(*output.shape, dtype=dtype, device=device, seed=10 + step))
            places.append([inputs[name].grad.data_ptr() for name in PROJECTIONS])
        if accumulate:
            assert places[0] == places[1] == places[2]
        results.append({name: tensor.grad for name, tensor in inputs.items()})
    plain, added = results
    for name, gradient in plain.items():
        if name in PROJECTIONS:
            assert_close(added[name], gradient.double(), plan.row_to_slot.numel(), 3)
        else:
            assert torch.equal(added[name], gradient)


def test_autograd_does_not_see_what_was_added(device):
    experts = Experts(8, 12, 3, accumulate=True, device=device)
    plan = make_plan(SHAPES["single_token"]._replace(hidden_size=8, num_experts=3, top_k=2), device=device)
    tokens, weights = randn(1, 8, device=device), torch.full((1, 2), 0.5, device=device)
    seen = []
    experts.down_proj.register_hook(seen.append)
    experts(tokens, weights, plan).sum().backward()
    first = experts.down_proj.grad.clone()
    experts(tokens, weights, plan).sum().backward()
    assert torch.equal(seen[0], first)  # there was no gradient to add to
    assert seen[1] is None
    torch.testing.assert_close(experts.down_proj.grad, 2 * first)


def test_a_compiled_graph_returns_its_gradients(device):
    experts = Experts(8, 12, 3, accumulate=True, device=device)
    plan = make_plan(SHAPES["single_token"]._replace(hidden_size=8, num_experts=3, top_k=2), device=device)
    tokens, weights = randn(1, 8, device=device), torch.full((1, 2), 0.5, device=device)
    experts(tokens, weights, plan).sum().backward()
    first = experts.down_proj.grad.clone()
    torch.compile(experts, fullgraph=True, backend="aot_eager")(tokens, weights, plan).sum().backward()
    torch.testing.assert_close(experts.down_proj.grad, 2 * first)


def test_errors(device):
    lhs, rhs = randn(4, 3, device=device), randn(4, 5, device=device)
    offsets = torch.tensor([0, 1, 4], dtype=torch.int32, device=device)
    for grad, message in (
        (randn(2, 5, 3, device=device).transpose(1, 2), "grad must be contiguous, got a strided tensor"),
        (randn(2, 3, 4, device=device), r"grad must .*\[2, 3, 5\].*got .*\[2, 3, 4\]"),
        (randn(2, 3, 5, dtype=torch.float64, device=device), "grad must be float32, got float64"),
    ):
        before = grad.clone()
        with pytest.raises(RuntimeError, match=message):
            torch.ops.moe.grouped_gemm_wgrad_(grad, lhs, rhs, offsets)
        assert torch.equal(grad, before)
