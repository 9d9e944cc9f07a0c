"""ep_index: what one rank packs, another reads; its plan is that of the ids; its errors."""

import pytest
import torch
from helpers import ALL_DTYPES, randn, weight_dtype

from torch_moe import ops, reference
from torch_moe.ops.ep_pack import WIRES
from torch_moe.testing import ROUTINGS, SHAPES, routing

RANKS = 3


def exchanged(shape, name, dtype, wire, rank, device):
    """What one rank gets from itself, and the same by indexing."""
    tokens = randn(shape.num_tokens, shape.hidden_size, dtype=dtype, device=device)
    weights = randn(shape.num_tokens, shape.top_k, dtype=weight_dtype(dtype), device=device, seed=1)
    ids = routing(name, shape.num_tokens, shape.num_experts, shape.top_k)
    plan = ops.ep_plan(ids.to(device), shape.num_experts, RANKS)
    local = plan.num_local_experts
    begin, end = plan.rank_offsets[rank : rank + 2].tolist()
    rows = ops.ep_pack(tokens, weights, plan, wire=wire)[begin:end]
    pairs = int(plan.counts[rank, 1])
    got = ops.ep_index(rows, tokens, shape.hidden_size, shape.top_k, local, pairs, wire=wire)
    origin = plan.row_to_slot[begin:end].long().cpu() // RANKS
    local_ids = ids[origin] - rank * local
    local_ids = local_ids.where((local_ids >= 0) & (local_ids < local), -1)
    return got, tokens.cpu()[origin], weights.cpu()[origin], local_ids, local, pairs


@pytest.mark.parametrize("rank", range(RANKS))
@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_reads_what_was_packed(shape, name, dtype, rank, device):
    got, tokens, weights, ids, local, pairs = exchanged(shape, name, dtype, "input", rank, device)
    assert torch.equal(got.hidden_states.cpu(), tokens)
    assert torch.equal(got.topk_weights.cpu(), weights)
    expected = reference.plan(ids, local)
    assert torch.equal(got.expert_offsets.cpu(), expected.expert_offsets)
    assert torch.equal(got.slot_to_row.cpu(), expected.slot_to_row)
    assert torch.equal(got.row_to_slot.cpu(), expected.row_to_slot[:pairs])
    assert (expected.row_to_slot[pairs:] == -1).all()


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_quantised_rows_are_those_of_the_reference(dtype, wire, device):
    got, tokens, weights, *_ = exchanged(SHAPES["several_tiles"], "uniform", dtype, wire, 1, device)
    assert torch.equal(got.topk_weights.cpu(), weights)
    if dtype == torch.float64 and wire != "input":
        expected = reference.ep_wire(tokens, wire)  # whose product is fp32's
        assert torch.equal(got.hidden_states.cpu().float(), expected.float())
    else:
        assert torch.equal(got.hidden_states.cpu(), reference.ep_wire(tokens, wire))


def test_pairs_beyond_the_number_told_are_dropped(device):
    rows = torch.ops.moe.ep_pack(
        randn(4, 8, device=device), randn(4, 2, device=device),
        torch.tensor([[0, 1]] * 4, dtype=torch.int32, device=device), None, 1, 2,
    )  # fmt: skip
    got = ops.ep_index(rows, rows.float(), 8, 2, 2, 5)
    full = ops.ep_index(rows, rows.float(), 8, 2, 2, 8)
    assert torch.equal(got.row_to_slot, full.row_to_slot[:5])
    inputs = (randn(2, 6, 8, device=device), randn(2, 8, 3, device=device), got.topk_weights)
    assert ops.experts(got.hidden_states, *inputs, got.plan).isfinite().all()


def test_rows_may_start_anywhere(device):
    """A slice of a longer buffer of bytes starts on no more than a byte."""
    tokens, weights = randn(5, 12, device=device), randn(5, 2, device=device)
    ids = torch.tensor([[0, 1]] * 5, dtype=torch.int32, device=device)
    rows = torch.ops.moe.ep_pack(tokens, weights, ids, None, 1, 2)
    buffer = torch.zeros(rows.numel() + 3, dtype=torch.uint8, device=device)
    shifted = buffer[3:].view(rows.shape)
    shifted.copy_(rows)
    for actual, expected in zip(
        ops.ep_index(shifted, tokens, 12, 2, 2, 10), ops.ep_index(rows, tokens, 12, 2, 2, 10), strict=True
    ):
        assert torch.equal(actual, expected)


ROWS = torch.zeros(4, 64, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((ROWS.int(), randn(1), 8, 2, 2, 8), "ep_index: rows must be uint8, got int32"),
        ((ROWS, ROWS, 8, 2, 2, 8), "ep_index: like must be float32.*got uint8"),
        ((ROWS, randn(1), 8, 2, 2, 8), r"ep_index: rows must have shape \[4, 48\].*got \[4, 64\]"),
        ((ROWS[:, :48], randn(1), 8, 2, 2, 9), r"ep_index: num_pairs must be at most num_rows \* top_k = 8, got 9"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(RuntimeError, match=message):
        ops.ep_index(*arguments)
