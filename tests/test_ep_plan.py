"""ep_plan: a token once per rank, in order; every number that is sent ahead; then its errors."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torch_moe import ops, reference
from torch_moe.testing import ROUTINGS, SHAPES, routing


@st.composite
def exchanges(draw: st.DrawFn) -> tuple[torch.Tensor, dict]:
    """Any ids, repeated or out of range, any number of ranks, chunks and replicas."""
    num_experts, ep_size = draw(st.integers(1, 12)), draw(st.integers(1, 6))
    num_tokens, top_k = draw(st.integers(0, 20)), draw(st.integers(1, 5))
    values = draw(st.lists(st.integers(-2, num_experts + 1), min_size=num_tokens * top_k, max_size=num_tokens * top_k))
    options = {"num_experts": num_experts, "ep_size": ep_size, "num_chunks": draw(st.integers(1, 5))}
    options["ep_rank"] = draw(st.integers(0, ep_size - 1))
    if draw(st.booleans()):
        local = draw(st.integers(1, 8))
        replicas = draw(st.integers(1, 3))
        physical = st.integers(-1, ep_size * local)  # the last is out of range
        table = [draw(st.lists(physical, min_size=replicas, max_size=replicas)) for _ in range(num_experts)]
        table = [sorted(row, key=lambda p: p < 0) for row in table]
        options |= {"num_local_experts": local, "placement": torch.tensor(table, dtype=torch.int32)}
    return torch.tensor(values, dtype=torch.int32).view(num_tokens, top_k), options


@given(exchanges())
def test_equals_the_reference(case):
    ids, options = case
    for name, actual, expected in zip(
        ops.EpPlan._fields, ops.ep_plan(ids, **options), reference.ep_plan(ids, **options), strict=True
    ):
        assert actual.dtype == torch.int32
        assert torch.equal(actual, expected), name


@given(exchanges())
def test_maps_are_inverse_and_each_token_goes_once_per_rank(case):
    ids, options = case
    plan = ops.ep_plan(ids, **options)
    used = int(plan.rank_offsets[-1])
    slots = plan.row_to_slot[:used].long()
    assert slots.unique().numel() == used
    assert torch.equal(plan.slot_to_row.flatten()[slots], torch.arange(used, dtype=torch.int32))
    assert (plan.slot_to_row >= 0).sum() == used
    assert (plan.row_to_slot[used:] == -1).all()


@given(exchanges())
def test_rows_are_in_order_of_chunk_rank_and_token(case):
    ids, options = case
    plan, ranks = ops.ep_plan(ids, **options), options["ep_size"]
    bounds = plan.rank_offsets.tolist()
    for bucket, (begin, end) in enumerate(itertools.pairwise(bounds)):
        slots = plan.row_to_slot[begin:end]
        assert (slots % ranks == bucket % ranks).all()
        assert (slots.diff() > 0).all()
        chunk, chunks = bucket // ranks, options["num_chunks"]
        first, last = len(ids) * chunk // chunks, len(ids) * (chunk + 1) // chunks
        assert ((slots // ranks >= first) & (slots // ranks < last)).all()


@given(exchanges())
def test_counts_add_up(case):
    ids, options = case
    plan, chunks = ops.ep_plan(ids, **options), options["num_chunks"]
    rows, pairs, experts = plan.counts.split([chunks, chunks, plan.num_local_experts], dim=1)
    assert torch.equal(rows.T.flatten(), plan.rank_offsets.diff())
    assert torch.equal(pairs.sum(dim=1), experts.sum(dim=1))
    kept = plan.physical_ids[plan.physical_ids >= 0].long()
    assert torch.equal(experts.flatten(), kept.bincount(minlength=experts.numel()).int())


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", ROUTINGS)
def test_named_shapes_equal_the_reference(shape, name, device):
    ids = routing(name, shape.num_tokens, shape.num_experts, shape.top_k)
    actual = ops.ep_plan(ids.to(device), shape.num_experts, 3, num_chunks=2)
    for a, b in zip(actual, reference.ep_plan(ids, shape.num_experts, 3, num_chunks=2), strict=True):
        assert torch.equal(a.cpu(), b)


@pytest.mark.parametrize("num_tokens", [0, 3, 700])
def test_replicas_and_garbage_equal_the_reference(num_tokens, device):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(-3, 14, (num_tokens, 5), generator=generator, dtype=torch.int32)
    ids[::7] = 2**31 - 1
    table = torch.randint(-1, 4 * 5 + 1, (12, 3), generator=generator, dtype=torch.int32)
    table = table.sort(dim=1, descending=True).values  # -1 last, as in a placement
    options = {"num_experts": 12, "ep_size": 4, "ep_rank": 2, "num_local_experts": 5, "num_chunks": 3}
    actual = ops.ep_plan(ids.to(device), **options, placement=table.to(device))
    for a, b in zip(actual, reference.ep_plan(ids, **options, placement=table), strict=True):
        assert torch.equal(a.cpu(), b)


@pytest.mark.usefixtures("restore_threads")
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads_gives_the_same(threads):
    """Enough slots that every thread gets some."""
    torch.set_num_threads(1)
    ids = routing("zipf", 12_000, 60, 4)
    expected = ops.ep_plan(ids, 60, 8, num_chunks=5)
    torch.set_num_threads(threads)
    for a, b in zip(ops.ep_plan(ids, 60, 8, num_chunks=5), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("ranks", "copies"), [(2, 1.99), (4, 3.61), (8, 5.29)])
def test_rows_per_token_are_those_of_the_formula(ranks, copies):
    """n(W) = W (1 - C(E - E/W, K) / C(E, K)), for E = 256 and K = 8."""
    ids = routing("uniform", 4096, 256, 8)
    assert int(ops.ep_plan(ids, 256, ranks).rank_offsets[-1]) / 4096 == pytest.approx(copies, rel=0.01)


def test_sizes_are_properties():
    plan = ops.ep_plan(routing("uniform", 19, 10, 3), 10, 4, num_chunks=3)
    assert (plan.ep_size, plan.num_chunks, plan.num_local_experts) == (4, 3, 3)


IDS = torch.zeros(4, 2, dtype=torch.int32)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((IDS.long(), 4, 2), {}, r"ep_plan: topk_ids must be int32, got int64 \(call \.int\(\)\)"),
        ((IDS[0], 4, 2), {}, r"ep_plan: topk_ids must have 2 dimensions .*got shape \[2\]"),
        ((IDS, 4, 2), {"num_chunks": 0}, "ep_plan: num_chunks must be at least 1, got 0"),
        ((IDS, 4, 2), {"num_local_experts": 0}, "ep_plan: num_local_experts must be at least 1, got 0"),
        ((IDS, 4, 2), {"placement": IDS[:3]}, r"ep_plan: placement must have shape \[4, 2\].*got \[3, 2\]"),
        ((IDS, 4, 2), {"placement": IDS.long()}, "ep_plan: placement must be int32, got int64"),
    ],
)
def test_errors(arguments, options, message):
    with pytest.raises(RuntimeError, match=message):
        ops.ep_plan(*arguments, **options)
