"""Run by tests/test_ep_faults.py, one process per rank: a layer in training loses rank 1 and trains on without it."""

import datetime
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from rank import meet, run
from torch import distributed
from torch.distributed import checkpoint

from torch_moe import MoE, reference
from torch_moe.distributed import (
    ExpertParallel,
    Placement,
    RankLost,
    average_gradients,
    guard,
    move_experts,
    placement_of,
    regroup,
    solve_placement,
    without_ranks,
)
from torch_moe.testing import assert_close

H, I, E, K, T = 16, 24, 6, 2, 12  # noqa: E741
TIMEOUT = 4.0  # of the group: a stopped rank is waited for so long
APART = 6.0  # seconds that the survivors may be apart on a busy machine: they wait so long for each other
# Experts 0, 1, 2 on rank 0; 2, 3, 4 on rank 1; 4, 5 on rank 2: with rank 1 goes expert 3.
PLACEMENT = Placement(torch.tensor([[0, -1], [1, -1], [2, 3], [4, -1], [5, 6], [7, -1]], dtype=torch.int32), 3)


def make_layer():
    torch.manual_seed(0)
    return MoE(H, I, E, K, num_shared_experts=1)


def tokens(rank, step):
    return torch.randn(T, H, generator=torch.Generator().manual_seed(10 * step + rank))


def train(layer, optimizer, rank, step, group=None, fault=None):
    optimizer.zero_grad()
    output = layer(tokens(rank, step))
    if fault is not None:  # as soon as its gradient is there: others wait for this rank's
        output.register_hook(lambda _: os.kill(os.getpid(), fault))
    loss = output.square().mean()
    loss.backward()
    average_gradients(layer, group)
    optimizer.step()
    assert loss.isfinite()


def equals_one_process(layer, rank, step, group):
    """Output over the ranks that are left, against their experts gathered; those left out are skipped."""
    held = [None] * distributed.get_world_size(group)
    experts = layer.experts
    own = {
        expert: (experts.gate_up_proj[place].detach(), experts.down_proj[place].detach())
        for place, expert in enumerate(experts.experts)
        if expert >= 0
    }
    distributed.all_gather_object(held, own, group=group)
    projections = [torch.zeros(E, 2 * I, H), torch.zeros(E, H, I)]
    for theirs in held:
        for expert, tensors in theirs.items():
            for projection, tensor in zip(projections, tensors, strict=True):
                projection[expert] = tensor
    there = sorted({expert for theirs in held for expert in theirs})
    x = tokens(rank, step)
    with torch.no_grad():
        _, weights, ids = layer.router(x)
        kept = ids.where(torch.isin(ids, torch.tensor(there)), -1)
        plan = reference.plan(kept, E)
        wanted = reference.experts(x.double(), *(p.double() for p in projections), weights.double(), plan)
        actual = layer(x) - layer.shared_experts(x)
    assert_close(actual, wanted, H, 1, I, K, 2)
    return there


def main(rank, world_size, path, fault):
    stopped = fault == "stopped"
    number = signal.SIGSTOP if stopped else signal.SIGKILL
    timeout = datetime.timedelta(seconds=TIMEOUT if stopped else 60)
    store, folder = distributed.FileStore(path, world_size), Path(path).parent / "checkpoint"
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
    layer = ExpertParallel(make_layer(), distributed.group.WORLD, placement=PLACEMENT, num_chunks=2)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    for step in range(2):
        with guard():
            train(layer, optimizer, rank, step)
    checkpoint.save({"layer": layer.state_dict()}, checkpoint_id=folder)
    saved = {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}
    meet(store, rank, world_size)

    start = time.monotonic()
    words = r"^guard: rank 1 does not answer, 2 of 3 are left$"
    with pytest.raises(RankLost, match=words) as caught, guard(timeout=APART):
        train(layer, optimizer, rank, 2, fault=number if rank == 1 else None)
    seconds, survivors = time.monotonic() - start, caught.value.survivors
    limit = (TIMEOUT if stopped else 0.0) + 2 * APART  # far below the 60 s of the group whose rank is killed
    assert seconds < limit, seconds
    assert survivors == [0, 2]

    # Without its experts: those left keep their weights and their moments.
    moments = {
        name: optimizer.state[parameter]["exp_avg"].clone() for name, parameter in layer.experts.named_parameters()
    }
    group = regroup(survivors, timeout=30.0)
    layer = move_experts(layer, without_ranks(PLACEMENT, [1], world_size), group, optimizer=optimizer)
    for name, parameter in layer.experts.named_parameters():
        assert torch.equal(parameter, saved[f"experts.{name}"]), name
        assert torch.equal(optimizer.state[parameter]["exp_avg"], moments[name]), name
    for step in range(2, 5):
        train(layer, optimizer, rank, step, group)
    assert not torch.equal(layer.experts.down_proj, saved["experts.down_proj"])
    assert equals_one_process(layer, rank, 5, group) == [0, 1, 2, 4, 5]

    # What is left moves, experts 2 and 4 to the other rank, with their moments.
    swapped = Placement(torch.tensor([[0], [1], [4], [-1], [2], [3]], dtype=torch.int32), 3)
    by_expert = moments_by_expert(layer, optimizer, group)
    layer = move_experts(layer, swapped, optimizer=optimizer)
    assert layer.experts.experts == ([0, 1, 4] if rank == 0 else [5, 2])
    assert equal(moments_by_expert(layer, optimizer, group), by_expert)
    train(layer, optimizer, rank, 5, group)
    assert equals_one_process(layer, rank, 6, group) == [0, 1, 2, 4, 5]
    everything = placement_of(solve_placement(torch.ones(E), 2), E)
    with pytest.raises(ValueError, match=r"experts \[3\] are on no rank of the group \(leave them out, or load"):
        move_experts(layer, everything, optimizer=optimizer)

    # All experts on two ranks, from the checkpoint that three of them wrote.
    again = ExpertParallel(make_layer(), group, placement=everything)
    state = {"layer": again.state_dict()}
    checkpoint.load(state, checkpoint_id=folder, process_group=group)
    again.load_state_dict(state["layer"])
    for place, expert in enumerate(again.experts.experts):
        if expert in PLACEMENT.experts_of(rank):
            before = saved["experts.down_proj"][PLACEMENT.experts_of(rank).index(expert)]
            assert torch.equal(again.experts.down_proj[place], before)
    optimizer = torch.optim.AdamW(again.parameters(), lr=1e-2)
    train(again, optimizer, rank, 2, group)
    assert equals_one_process(again, rank, 3, group) == list(range(E))
    print(f"rank {rank}: {fault}, named after {seconds:.2f} s", file=sys.stderr)


def moments_by_expert(layer, optimizer, group):
    experts, held = layer.experts, [None] * distributed.get_world_size(group)
    own = {
        expert: [optimizer.state[parameter]["exp_avg"][place].clone() for parameter in experts.parameters()]
        for place, expert in enumerate(experts.experts)
    }
    distributed.all_gather_object(held, own, group=group)
    return {expert: tensors for theirs in held for expert, tensors in theirs.items()}


def equal(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(a, b) for expert in one for a, b in zip(one[expert], other[expert], strict=True)
    )


if __name__ == "__main__":
    run(main)
