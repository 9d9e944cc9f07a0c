"""solve_placement: valid for any loads, near the best possible, and few experts move."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import needs_distributed, run_ranks

from torch_moe import _C, ops
from torch_moe.distributed import count_moves, placement_of, rank_loads, solve_placement


@st.composite
def problems(draw):
    """Arguments of solve_placement, possible ones."""
    ranks, experts = draw(st.integers(1, 6)), draw(st.integers(1, 24))
    redundant = draw(st.integers(0, min(experts * (ranks - 1), 20)))
    load = st.one_of(st.just(0.0), st.floats(0.0, 1e6), st.integers(0, 5).map(float))
    loads = draw(st.lists(st.lists(load, min_size=experts, max_size=experts), min_size=1, max_size=3))
    return torch.tensor(loads), ranks, redundant


def check_valid(placed, num_experts, num_physical):
    for layer in placed.tolist():
        held = [[expert for expert in rank if expert >= 0] for rank in layer]
        assert all(len(set(rank)) == len(rank) for rank in held)
        assert {expert for rank in held for expert in rank} == set(range(num_experts))
        assert sum(map(len, held)) == num_physical


@given(problems(), st.floats(0.2, 5.0))
def test_every_expert_is_placed_and_none_twice_on_a_rank(problem, change):
    loads, ranks, redundant = problem
    experts = loads.shape[1]
    placed = solve_placement(loads, ranks, num_redundant=redundant)
    check_valid(placed, experts, experts + redundant)
    torch.testing.assert_close(rank_loads(placed, loads).sum(dim=-1), loads.double().sum(dim=-1))
    drifted = loads * torch.linspace(1.0, change, experts)
    options = {"num_redundant": redundant, "current": placed}
    moved = solve_placement(drifted, ranks, **options)
    check_valid(moved, experts, experts + redundant)
    fresh = rank_loads(solve_placement(drifted, ranks, num_redundant=redundant), drifted).amax(dim=-1)
    assert (rank_loads(moved, drifted).amax(dim=-1) <= 1.02 * fresh * (1 + 1e-9)).all()
    assert torch.equal(solve_placement(drifted, ranks, **options), moved)
    assert (count_moves(placed, solve_placement(drifted, ranks, **options, max_moves=2)) <= 2).all()


def best_peak(loads, ranks, places):
    """The least peak of placements without replicas, by trying all."""
    peaks = []
    for owner in itertools.product(range(ranks), repeat=len(loads)):
        sums = [sum(load for load, o in zip(loads, owner, strict=True) if o == rank) for rank in range(ranks)]
        if all(owner.count(rank) <= places for rank in range(ranks)):
            peaks.append(max(sums))
    return min(peaks)


@pytest.mark.parametrize("seed", range(5))
def test_near_the_best_of_all_placements(seed):
    loads = torch.rand(8, generator=torch.Generator().manual_seed(seed)).double() ** 3
    peak = rank_loads(solve_placement(loads, 3), loads).max().item()
    assert peak <= 1.05 * best_peak(loads.tolist(), 3, 3)


def test_a_busy_expert_gets_the_replicas():
    loads = torch.tensor([70.0, 10.0, 10.0, 10.0])
    placed = solve_placement(loads, 4, num_redundant=4)
    assert (placed == 0).sum() >= 3
    assert rank_loads(placed, loads).max() < 28.0
    assert rank_loads(solve_placement(loads, 4), loads).max() == 70.0


def test_realistic_loads_are_balanced_and_few_experts_move():
    """64 layers, 256 experts, 32 ranks: Zipf loads, then a drift of 20 %."""
    generator = torch.Generator().manual_seed(0)
    zipf = 1 / torch.arange(1, 257).double()
    loads = torch.stack([zipf[torch.randperm(256, generator=generator)] for _ in range(64)])
    placed = solve_placement(loads, 32, num_redundant=32)
    imbalance = rank_loads(placed, loads).amax(dim=-1) / rank_loads(placed, loads).mean(dim=-1)
    assert imbalance.max() < 1.005
    drifted = loads * (0.2 * torch.randn(loads.shape, generator=generator, dtype=torch.float64)).exp()
    kept = solve_placement(drifted, 32, num_redundant=32, current=placed)
    fresh = solve_placement(drifted, 32, num_redundant=32)
    assert count_moves(placed, kept).double().mean() < 0.2 * count_moves(placed, fresh).double().mean()


def test_groups_stay_on_a_node():
    loads = torch.rand(3, 32, generator=torch.Generator().manual_seed(1))
    placed = solve_placement(loads, 8, num_redundant=8, nodes=2, num_groups=4)
    for layer in placed.view(3, 2, -1):
        groups = [{expert // 8 for expert in node.tolist() if expert >= 0} for node in layer]
        assert [len(node) for node in groups] == [2, 2]
        assert not groups[0] & groups[1]


def test_a_placement_is_data_for_the_plan():
    loads = torch.tensor([8.0, 1.0, 1.0, 1.0, 1.0])
    placed = solve_placement(loads, 3, num_redundant=2)
    placement = placement_of(placed, 5)
    assert [placement.experts_of(rank) for rank in range(3)] == [
        [expert for expert in rank if expert >= 0] for rank in placed.tolist()
    ]
    ids = torch.arange(5, dtype=torch.int32).repeat(6)[:, None]
    local = placement.num_local_experts
    plan = ops.ep_plan(ids, 5, 3, num_local_experts=local, placement=placement.table)
    sent_to = plan.physical_ids.flatten() // local
    assert all(expert in placed[rank] for expert, rank in zip(ids.flatten().tolist(), sent_to.tolist(), strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loads": torch.tensor([1.0, -1.0])}, "loads must be finite and not negative"),
        ({"loads": torch.tensor([1.0, torch.nan])}, "loads must be finite and not negative"),
        ({"loads": torch.ones(0)}, "loads must be of at least one expert, got none"),
        ({"loads": torch.ones(1, 1, 2)}, r"loads must have 1 or 2 dimensions, got shape \[1, 1, 2\]"),
        ({"ep_size": 0}, "ep_size must be at least 1, got 0"),
        ({"num_redundant": 3}, r"num_redundant must be in \[0, 2\], got 3"),
        ({"num_redundant": -1}, r"num_redundant must be in \[0, 2\], got -1"),
        (
            {"nodes": 2, "num_groups": 2, "num_redundant": 1},
            r"num_redundant must be in \[0, 0\], got 1 .*each of 1 ranks",
        ),
        ({"nodes": 0}, "nodes must divide ep_size = 2, got 0"),
        ({"num_groups": 0}, "num_groups must divide the number of experts, 2, got 0"),
        ({"slack": float("inf")}, "slack must be finite and not negative, got inf"),
        ({"nodes": 3}, "nodes must divide ep_size = 2, got 3"),
        ({"num_groups": 4}, "num_groups must divide the number of experts, 2, got 4"),
        ({"current": torch.zeros(2, 2)}, r"current must have shape \[2, 1\], got \[2, 2\]"),
        ({"max_moves": 1}, "max_moves needs the current placement"),
        ({"max_moves": -1, "current": torch.tensor([[0], [1]])}, "max_moves must not be negative, got -1"),
        ({"slack": -1.0}, "slack must be finite and not negative"),
    ],
)
def test_impossible_arguments_are_named(change, message):
    arguments = {"loads": torch.ones(2), "ep_size": 2, **change}
    with pytest.raises(ValueError, match=message):
        solve_placement(**arguments)


@pytest.mark.parametrize("change", [{"num_physical": 5}, {"ep_size": -1}, {"nodes": 0}, {"slack": float("nan")}])
def test_the_solver_itself_refuses_what_is_impossible(change):
    """It would write out of bounds, or divide by zero, for whoever calls it without these checks."""
    sizes = {"num_layers": 1, "num_experts": 2, "ep_size": 2, "places_per_rank": 1, "num_physical": 2}
    options = {"nodes": 1, "num_groups": 1, "slack": 0.02, "max_moves": -1}
    assert sorted(_C.solve_placement([1.0, 1.0], [], **sizes, **options)) == [0, 1]
    with pytest.raises(ValueError, match="solve_placement: "):
        _C.solve_placement([1.0, 1.0], [], **{**sizes, **options, **change})


@needs_distributed
def test_several_experts_of_a_pair_of_ranks_move(tmp_path):
    """With all that the layer has beside its experts."""
    run_ranks("moving.py", 2, tmp_path)
