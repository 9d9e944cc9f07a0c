"""ep_reduce: the sum by rank, the numbers that return per choice, and its errors."""

import pytest
import torch
from helpers import ALL_DTYPES, randn, weight_dtype

from torch_moe import ops, reference
from torch_moe.testing import ROUTINGS, SHAPES, assert_close, routing

RANKS = 3


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_the_reference(shape, name, dtype, device):
    ids = routing(name, shape.num_tokens, shape.num_experts, shape.top_k)
    plan = ops.ep_plan(ids.to(device), shape.num_experts, RANKS, num_chunks=2)
    returned = randn(plan.row_to_slot.shape[0], shape.hidden_size, dtype=dtype, device=device)
    numbers = randn(plan.row_to_slot.shape[0], shape.top_k, dtype=weight_dtype(dtype), device=device, seed=1)
    rows = torch.ops.moe.ep_pack(returned, numbers, None, None, 1, 1)
    output, weights = ops.ep_reduce(rows, returned, plan, shape.hidden_size, has_weights=True)
    assert output.dtype == dtype
    assert_close(output, reference.combine(returned.double(), None, plan.rows), RANKS)
    rank = plan.physical_ids.long() // plan.num_local_experts
    expected = numbers[plan.slot_to_row.gather(1, rank).long()].diagonal(dim1=1, dim2=2) if len(ids) else numbers
    assert torch.equal(weights, expected.reshape(weights.shape))


def test_is_combine_bit_by_bit(device):
    """One order of summation, whichever operator adds."""
    plan = ops.ep_plan(routing("uniform", 50, 16, 4).to(device), 16, 8)
    returned = randn(plan.row_to_slot.shape[0], 700, device=device)
    rows = torch.ops.moe.ep_pack(returned, None, None, None, 1, 1)
    output, weights = ops.ep_reduce(rows, returned, plan, 700)
    assert torch.equal(output, ops.combine(returned, None, plan.rows))
    assert weights.shape == (50, 0)


def test_choices_without_a_rank_get_zero(device):
    ids = torch.tensor([[0, -1, 7, 3]], dtype=torch.int32, device=device)
    plan = ops.ep_plan(ids, 4, 2)
    rows = torch.ops.moe.ep_pack(randn(2, 8, device=device), torch.ones(2, 4, device=device), None, None, 1, 1)
    assert ops.ep_reduce(rows, rows.float(), plan, 8, has_weights=True)[1].tolist() == [[1, 0, 0, 1]]


def test_maps_out_of_range_count_as_no_row(device):
    plan = ops.ep_plan(routing("uniform", 9, 8, 2).to(device), 8, 2)
    returned = randn(plan.row_to_slot.shape[0], 8, device=device)
    rows = torch.ops.moe.ep_pack(returned, None, None, None, 1, 1)
    maps = plan.slot_to_row.clone()
    maps[2] = torch.tensor([-7, 2**31 - 1], dtype=torch.int32, device=device)
    output, _ = ops.ep_reduce(rows, returned, plan._replace(slot_to_row=maps), 8)
    assert not output[2].any()


PLAN = ops.ep_plan(routing("uniform", 9, 8, 2), 8, 2)
ROWS = torch.zeros(18, 32, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((ROWS.int(), randn(1), PLAN, 8), "ep_reduce: rows must be uint8, got int32"),
        ((ROWS, ROWS, PLAN, 8), "ep_reduce: like must be float32.*got uint8"),
        ((ROWS, randn(1), PLAN, 9), r"ep_reduce: rows must have shape \[18, 48\].*got \[18, 32\]"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(RuntimeError, match=message):
        ops.ep_reduce(*arguments)
