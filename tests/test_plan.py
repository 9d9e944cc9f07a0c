"""plan: the properties of the sort, then its errors. The reference is the definition."""

import pytest
import torch
from helpers import expert_inputs, make_plan, run
from hypothesis import given
from hypothesis import strategies as st

from torch_moe import ops, reference
from torch_moe.testing import ROUTINGS, SHAPES, routing


@st.composite
def routed(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    """Any ids, repeated within a token or out of range, and the number of experts."""
    num_experts = draw(st.integers(1, 40))
    num_tokens, top_k = draw(st.integers(0, 30)), draw(st.integers(1, 6))
    ids = st.integers(-2, num_experts + 1)
    values = draw(st.lists(ids, min_size=num_tokens * top_k, max_size=num_tokens * top_k))
    return torch.tensor(values, dtype=torch.int32).view(num_tokens, top_k), num_experts


capacities = st.none() | st.integers(0, 12)


@given(routed())
def test_maps_are_inverse(case):
    plan = ops.plan(*case)
    slots = torch.arange(case[0].numel(), dtype=torch.int32)
    rows = plan.slot_to_row.flatten()
    kept = rows >= 0
    assert torch.equal(plan.row_to_slot[rows[kept]], slots[kept])
    assert torch.equal(rows[kept].sort().values, torch.arange(int(kept.sum()), dtype=torch.int32))


@given(routed(), capacities)
def test_offsets_are_monotone_and_count_the_rows(case, capacity):
    plan = ops.plan(*case, capacity)
    assert plan.expert_offsets[0] == 0
    assert (plan.tokens_per_expert >= 0).all()
    assert plan.expert_offsets[-1] == (plan.slot_to_row >= 0).sum()


@given(routed())
def test_tokens_per_expert_counts_the_ids(case):
    ids, num_experts = case
    valid = ids[(ids >= 0) & (ids < num_experts)]
    assert torch.equal(ops.plan(*case).tokens_per_expert, valid.bincount(minlength=num_experts).int())


@given(routed(), capacities)
def test_rows_lie_with_their_expert_in_slot_order(case, capacity):
    ids, num_experts = case
    plan = ops.plan(ids, num_experts, capacity)
    bounds = plan.expert_offsets.tolist()
    for expert in range(num_experts):
        slots = plan.row_to_slot[bounds[expert] : bounds[expert + 1]]
        assert (ids.flatten()[slots] == expert).all()
        assert (slots.diff() > 0).all()


@given(routed())
def test_ids_out_of_range_keep_no_row(case):
    ids, num_experts = case
    plan = ops.plan(ids, num_experts)
    assert torch.equal(plan.slot_to_row == -1, (ids < 0) | (ids >= num_experts))
    assert (plan.row_to_slot[plan.expert_offsets[-1] :] == -1).all()


@given(routed(), st.integers(0, 12))
def test_capacity_keeps_the_first_slots(case, capacity):
    limited, unlimited = ops.plan(*case, capacity), ops.plan(*case)
    assert torch.equal(limited.tokens_per_expert, unlimited.tokens_per_expert.clamp(max=capacity))
    place = unlimited.slot_to_row - unlimited.expert_offsets[:-1][case[0].clamp(0, case[1] - 1)]
    assert torch.equal(limited.slot_to_row >= 0, (unlimited.slot_to_row >= 0) & (place < capacity))


@given(routed(), capacities)
def test_equals_the_reference(case, capacity):
    for actual, expected in zip(ops.plan(*case, capacity), reference.plan(*case, capacity), strict=True):
        assert actual.dtype == torch.int32
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", ROUTINGS)
def test_named_shapes_equal_the_reference(shape, name, device):
    ids = routing(name, shape.num_tokens, shape.num_experts, shape.top_k)
    actual = ops.plan(ids.to(device), shape.num_experts)
    for a, b in zip(actual, reference.plan(ids, shape.num_experts), strict=True):
        assert torch.equal(a.cpu(), b)


@pytest.mark.usefixtures("restore_threads")
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_many_slots_equal_a_stable_sort(threads):
    """Enough slots that every thread gets some."""
    torch.set_num_threads(threads)
    ids = routing("zipf", 20_000, 64, 4)
    plan = ops.plan(ids, 64)
    assert torch.equal(plan.row_to_slot, ids.flatten().sort(stable=True).indices.int())


def test_sizes_are_properties():
    plan = make_plan(SHAPES["unaligned"])
    assert (plan.num_tokens, plan.top_k, plan.num_experts, plan.num_rows) == (19, 3, 5, 57)


def test_non_contiguous_ids():
    ids = routing("uniform", 12, 8, 4)[:, ::2]
    assert not ids.is_contiguous()
    for a, b in zip(ops.plan(ids, 8), ops.plan(ids.contiguous(), 8), strict=True):
        assert torch.equal(a, b)


IDS = torch.zeros(4, 2, dtype=torch.int32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((IDS.long(), 4), r"plan: topk_ids must be int32, got int64 \(call \.int\(\)\)"),
        ((IDS.float(), 4), "plan: topk_ids must be int32, got float32"),
        ((IDS[0], 4), r"plan: topk_ids must .*2.*got .*\[2\]"),
        ((IDS, 0), "plan: num_experts must .*got 0"),
        ((IDS, 4, -1), "plan: capacity must .*got -1"),
    ],
    ids=["int64", "float", "rank", "num_experts", "capacity"],
)
def test_errors(arguments, message):
    with pytest.raises(RuntimeError, match=message):
        ops.plan(*arguments)


def test_later_stages_take_a_plan_without_its_empty_rows(device):
    """Where ids are skipped, the rows of a plan can be cut to those that are kept: the same bits, in less memory."""
    shape = SHAPES["unaligned"]
    ids = routing("uniform", shape.num_tokens, shape.num_experts, shape.top_k).to(device)
    ids[ids > 2] = -1
    full = ops.plan(ids, shape.num_experts)
    kept = int(full.expert_offsets[-1])
    cut = full._replace(row_to_slot=full.row_to_slot[:kept])
    assert kept < full.num_rows
    inputs = expert_inputs(shape, torch.float32, device, bias=True)
    expected = run(lambda **tensors: ops.experts(**tensors, plan=full), inputs)
    for recompute in (False, True):
        actual = run(lambda **tensors: ops.experts(**tensors, plan=cut, recompute=recompute), inputs)  # noqa: B023
        for name, value in actual.items():
            assert torch.equal(value, expected[name]), name
    rows = ops.permute(inputs["hidden_states"], cut)
    assert torch.equal(rows, ops.permute(inputs["hidden_states"], full)[:kept])
    weights = inputs["topk_weights"]
    combined = run(lambda rows, weights: ops.combine(rows, weights, cut), {"rows": rows, "weights": weights})
    whole = {"rows": ops.permute(inputs["hidden_states"], full), "weights": weights}
    expected = run(lambda rows, weights: ops.combine(rows, weights, full), whole)
    assert torch.equal(combined["output"], expected["output"])
    assert torch.equal(combined["rows"], expected["rows"][:kept])
    assert torch.equal(combined["weights"], expected["weights"])
