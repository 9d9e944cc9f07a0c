"""Expert parallelism: real processes over gloo, and one process for what needs no second."""

import re

import pytest
import torch
from helpers import randn
from ranks import needs_distributed, run_ranks
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck

import torch_moe
from torch_moe.distributed import ExchangeCost, ExpertParallel, Placement, best_chunks

pytestmark = needs_distributed


@pytest.mark.parametrize("world_size", [2, 4, pytest.param(8, marks=pytest.mark.slow)])
def test_ranks(world_size, tmp_path):
    run_ranks("expert_parallel.py", world_size, tmp_path)


def test_one_rank_is_the_plain_layer_bit_by_bit(group):
    torch.manual_seed(0)
    layer = torch_moe.MoE(37, 53, 5, 3, bias=True, num_shared_experts=1)
    x = randn(19, 37).requires_grad_()
    expected = [layer(x), *torch.autograd.grad(layer(x).sum(), [x, *layer.parameters()])]
    parallel = ExpertParallel(layer, group, num_chunks=3)
    actual = [parallel(x), *torch.autograd.grad(parallel(x).sum(), [x, *parallel.parameters()])]
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a.to_local() if hasattr(a, "to_local") else a, b)


@pytest.mark.parametrize("num_chunks", [1, 3])
def test_gradcheck(group, num_chunks):
    """With a placement, also one rank sends to itself."""
    torch.manual_seed(0)
    layer = torch_moe.MoE(3, 4, 4, 2, bias=True, num_shared_experts=1, dtype=torch.float64)
    identity = Placement.identity(4, 1)
    parallel = ExpertParallel(layer, group, placement=identity, num_chunks=num_chunks)
    names, parameters = zip(*parallel.named_parameters(), strict=True)

    def forward(x, *values):
        return torch.func.functional_call(parallel, dict(zip(names, values, strict=True)), x)

    assert gradcheck(forward, (randn(5, 3, dtype=torch.float64).requires_grad_(), *parameters))


@pytest.mark.parametrize(
    ("latency", "bandwidth", "compute", "chunks"),
    [
        (1e-3, 1e12, 0.1, 1),  # nothing to hide
        (1e-3, 1e8, 0.0, 1),  # nothing to hide it behind
        (1e-1, 1e8, 0.1, 1),  # every chunk costs more than it hides
        (1e-3, 1e8, 0.2, 8),  # the balance point
        (1e-6, 1e8, 0.2, 16),
    ],
)
def test_best_chunks(latency, bandwidth, compute, chunks):
    assert best_chunks(ExchangeCost(latency, bandwidth), 10e6, 10e6, compute) == chunks


def test_placement_of_shard_0():
    assert [Placement.identity(10, 4).experts_of(rank) for rank in range(4)] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]
    assert Placement.identity(5, 4).experts_of(3) == []


def test_a_checkpointed_layer_gives_the_same_gradient(group):
    layer = torch_moe.MoE(8, 8, 4, 2)
    parallel = ExpertParallel(layer, group, placement=Placement.identity(4, 1), num_chunks=2)
    x = randn(6, 8).requires_grad_()
    expected = torch.autograd.grad(parallel(x).square().sum(), x)[0]
    output = torch.utils.checkpoint.checkpoint(parallel, x, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(output.square().sum(), x)[0], expected)


@pytest.mark.parametrize(
    ("layer", "options", "problem"),
    [
        ({"weight_position": "input"}, {}, "weight_position must be 'output', got 'input'"),
        ({"limit": 1.0, "limit_position": "after"}, {}, "limit_position must be 'before', got 'after'"),
        ({"dropout": 0.5}, {}, "dropout must be 0, got 0.5"),
        ({"expert_dropout": 0.5}, {}, "expert_dropout must be 0, got 0.5"),
        ({"accumulate": True}, {}, "accumulate must be False: gradients of a DTensor go through autograd"),
        (
            {"selection": "expert_choice", "causal": False, "renormalize": False},
            {},
            "selection must not be 'expert_choice'",
        ),
        ({}, {"num_chunks": 0}, "num_chunks must be at least 1, got 0"),
        ({}, {"wire": "fp4"}, "wire must be in ('input', 'fp8', 'int8'), got 'fp4'"),
        ({}, {"capacity": 0}, "capacity must be at least 1 or None, got 0"),
        ({}, {"placement": Placement.identity(5, 1)}, "placement must have num_experts = 4 rows, got 5"),
        ({}, {"placement": Placement.identity(4, 2)}, "physical experts below ep_size * num_local_experts = 2, got 3"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_spread_is_refused(group, layer, options, problem):
    with pytest.raises(ValueError, match=rf"^ExpertParallel: rank 0: .*{re.escape(problem)}"):
        ExpertParallel(torch_moe.MoE(8, 8, 4, 2, **layer), group, **options)


def test_shape_inference_names_a_wrong_rank():
    """Compiled code meets the fake before the operator."""
    tokens, weights, ids = torch.zeros(8), torch.zeros(3, 2), torch.zeros(3, 2, dtype=torch.int32)
    plan = torch_moe.ops.ep_plan(ids, 4, 1)
    with FakeTensorMode(allow_non_fake_inputs=True):
        with pytest.raises(RuntimeError, match=r"ep_dispatch: hidden_states must have 2 dimensions, got shape \[8\]"):
            torch.ops.moe.ep_dispatch(tokens, weights, *plan, "0")
        maps = (plan.rank_offsets, plan.row_to_slot, plan.slot_to_row, plan.physical_ids, plan.counts, [])
        projections = (torch.zeros(4, 16, 8), torch.zeros(4, 8, 8))
        options = {"activation": "swiglu", "gate_layout": "concat", "weight_layout": "out_in", "alpha": 1.0}
        options |= {"limit": None, "up_offset": 0.0, "group_name": "0", "num_local_experts": 4}
        with pytest.raises(RuntimeError, match=r"ep_experts: hidden_states must have 2 dimensions, got shape \[8\]"):
            torch.ops.moe.ep_experts(tokens, *projections, weights, *maps, **options)
