"""combine: the weighted sum, its gradient, dropped slots, and its duality with permute."""

import pytest
import torch
from helpers import ALL_DTYPES, check_against_reference, make_plan, randn, weight_dtype

from torch_moe import ops, reference
from torch_moe.testing import ROUTINGS, SHAPES, routing


def inputs(shape, dtype, device):
    num_rows = shape.num_tokens * shape.top_k
    return {
        "rows": randn(num_rows, shape.hidden_size, dtype=dtype, device=device),
        "topk_weights": randn(shape.num_tokens, shape.top_k, dtype=weight_dtype(dtype), device=device, seed=1),
    }


def lengths(shape):
    return {"output": (shape.top_k,), "rows": (1,), "topk_weights": (shape.hidden_size,)}


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_the_reference(shape, name, dtype, device):
    plan = make_plan(shape, name, device)
    check_against_reference(
        lambda rows, topk_weights: ops.combine(rows, topk_weights, plan),
        lambda rows, topk_weights: reference.combine(rows, topk_weights, plan),
        inputs(shape, dtype, device),
        lengths(shape),
        dtype,
    )


@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_without_weights_every_weight_is_one(dtype, device):
    shape = SHAPES["unaligned"]
    plan = make_plan(shape, device=device)
    check_against_reference(
        lambda rows: ops.combine(rows, None, plan),
        lambda rows: reference.combine(rows, None, plan),
        {"rows": inputs(shape, dtype, device)["rows"]},
        {"output": (shape.top_k,), "rows": ()},
        dtype,
    )


def test_dropped_slots_are_left_out(device):
    shape = SHAPES["unaligned"]
    plan = ops.plan(routing("zipf", 19, 5, 3).to(device), 5, capacity=4)
    assert (plan.slot_to_row < 0).any()
    case = inputs(shape, torch.float32, device)
    case["rows"] = case["rows"].clone()
    check_against_reference(
        lambda rows, topk_weights: ops.combine(rows, topk_weights, plan),
        lambda rows, topk_weights: reference.combine(rows, topk_weights, plan),
        case,
        lengths(shape),
        torch.float32,
    )
    case["rows"][plan.expert_offsets[-1] :] = torch.nan  # nobody reads these
    assert ops.combine(**case, plan=plan).isfinite().all()


def test_is_the_transpose_of_permute(device):
    """<permute(x), y> == <x, combine(y)>, with fp64 for a sharp comparison."""
    plan = make_plan(SHAPES["unaligned"], device=device)
    x, y = randn(19, 37, dtype=torch.float64, device=device), randn(57, 37, dtype=torch.float64, device=device, seed=1)
    torch.testing.assert_close((ops.permute(x, plan) * y).sum(), (x * ops.combine(y, None, plan)).sum())


def test_maps_out_of_range_count_as_dropped(device):
    shape = SHAPES["unaligned"]
    plan = make_plan(shape, device=device)
    case = inputs(shape, torch.float32, device)
    dropped = plan.slot_to_row.clone()
    dropped[3, 1] = -1
    expected = ops.combine(**case, plan=plan._replace(slot_to_row=dropped))
    for bad in (-7, 57, 2**31 - 1):
        slot_to_row = plan.slot_to_row.clone()
        slot_to_row[3, 1] = bad
        assert torch.equal(ops.combine(**case, plan=plan._replace(slot_to_row=slot_to_row)), expected)


def test_non_contiguous_inputs(device):
    shape = SHAPES["unaligned"]
    plan = make_plan(shape, device=device)
    rows, weights = randn(37, 57, device=device).T, randn(3, 19, device=device).T
    assert torch.equal(ops.combine(rows, weights, plan), ops.combine(rows.contiguous(), weights.contiguous(), plan))


PLAN = make_plan(SHAPES["unaligned"])
ROWS, WEIGHTS = randn(57, 37), randn(19, 3)


@pytest.mark.parametrize(
    ("rows", "topk_weights", "message"),
    [
        (ROWS.int(), WEIGHTS, "combine: rows must be float32, bfloat16, float16 or float64, got int32"),
        (ROWS[0], WEIGHTS, r"combine: rows must have 2 dimensions .*got shape \[37\]"),
        (ROWS[1:], WEIGHTS, "combine: .*must .*57.*56|combine: .*must .*56.*57"),
        (ROWS, WEIGHTS.half(), r"combine: topk_weights must be float32, got float16 \(call \.float\(\)\)"),
        (ROWS.double(), WEIGHTS, "combine: topk_weights must be float64, got float32"),
        (ROWS, WEIGHTS[:, :2], r"combine: topk_weights must have shape \[19, 3\].*got \[19, 2\]"),
    ],
)
def test_errors(rows, topk_weights, message):
    with pytest.raises(RuntimeError, match=message):
        ops.combine(rows, topk_weights, PLAN)
