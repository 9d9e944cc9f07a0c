"""permute: the gather, its gradient, and user-made plans."""

import pytest
import torch
from helpers import ALL_DTYPES, check_against_reference, make_plan, randn

from torch_moe import ops, reference
from torch_moe.testing import ROUTINGS, SHAPES, routing


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_the_reference(shape, name, dtype, device):
    plan = make_plan(shape, name, device)
    check_against_reference(
        lambda hidden_states: ops.permute(hidden_states, plan),
        lambda hidden_states: reference.permute(hidden_states, plan),
        {"hidden_states": randn(shape.num_tokens, shape.hidden_size, dtype=dtype, device=device)},
        {"output": (), "hidden_states": (shape.top_k,)},  # a gather is exact
        dtype,
    )


def test_rows_without_a_slot_are_zero(device):
    ids = routing("uniform", 10, 4, 2)
    plan = ops.plan(ids.to(device), 4, capacity=2)
    rows = ops.permute(randn(10, 7, device=device), plan)
    assert (rows[plan.expert_offsets[-1] :] == 0).all()
    assert torch.equal(rows, reference.permute(randn(10, 7, device=device), plan))


def test_maps_out_of_range_count_as_dropped(device):
    """A plan may come from anywhere; no map may lead out of bounds."""
    plan = make_plan(SHAPES["unaligned"], device=device)
    hidden_states = randn(19, 37, device=device)
    for bad in (-7, 57, 2**31 - 1):
        row_to_slot = plan.row_to_slot.clone()
        row_to_slot[5] = bad
        rows = ops.permute(hidden_states, plan._replace(row_to_slot=row_to_slot))
        assert (rows[5] == 0).all()
        assert torch.equal(rows[6:], ops.permute(hidden_states, plan)[6:])


def test_non_contiguous_hidden_states(device):
    plan = make_plan(SHAPES["unaligned"], device=device)
    hidden_states = randn(37, 19, device=device).T
    assert torch.equal(ops.permute(hidden_states, plan), ops.permute(hidden_states.contiguous(), plan))


PLAN = make_plan(SHAPES["unaligned"])
TOKENS = randn(19, 37)


@pytest.mark.parametrize(
    ("hidden_states", "plan", "message"),
    [
        (TOKENS.int(), PLAN, "permute: hidden_states must be float32, bfloat16, float16 or float64, got int32"),
        (TOKENS[0], PLAN, r"permute: hidden_states must have 2 dimensions .*got shape \[37\]"),
        (TOKENS[:18], PLAN, r"permute: .*must .*got .*18"),
        (TOKENS, PLAN._replace(row_to_slot=PLAN.row_to_slot.long()), "permute: row_to_slot must be int32, got int64"),
        (TOKENS, PLAN._replace(row_to_slot=PLAN.row_to_slot.repeat(2)), "permute: row_to_slot must .*57 .*got 114"),
    ],
)
def test_errors(hidden_states, plan, message):
    with pytest.raises(RuntimeError, match=message):
        ops.permute(hidden_states, plan)
