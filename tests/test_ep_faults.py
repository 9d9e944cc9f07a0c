"""A lost rank is named on the others, which go on without it."""

import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import PYTHON

from torch_moe.distributed import Placement, agree_on_survivors, guard, placement_of, solve_placement, without_ranks

FOLDER = Path(__file__).parent / "distributed"

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this torch was built without torch.distributed"
)


@pytest.mark.parametrize(
    ("script", "fault"),
    [("faults.py", "killed"), ("faults.py", "hung"), ("lost_rank.py", "killed"), ("lost_rank.py", "stopped")],
)
def test_a_lost_rank_is_named_and_the_others_go_on(script, fault, tmp_path):
    """Plain exchanges, then a layer in training, which goes on without the rank's experts or moves them."""
    options = {"stderr": subprocess.PIPE, "text": True, "env": {**os.environ, "OMP_NUM_THREADS": "1"}}
    command = [*PYTHON, str(FOLDER / script)]
    ranks = [
        subprocess.Popen([*command, str(rank), "3", str(tmp_path / "store"), fault], **options) for rank in range(3)
    ]
    try:
        errors = [ranks[rank].communicate(timeout=300)[1] for rank in (0, 2)]
    finally:
        for rank in ranks:
            rank.kill()
    told = ranks[1].communicate()[1]
    assert [ranks[rank].returncode for rank in (0, 2)] == [0, 0], "\n".join([*errors, told])
    assert ranks[1].returncode == -signal.SIGKILL, told


def test_who_is_too_late_is_told_so():
    store = torch.distributed.HashStore()
    assert agree_on_survivors(store, 0, [0, 1], timeout=0.01) == [0]
    with pytest.raises(RuntimeError, match=r"rank 1 answered too late, ranks \[0\] go on without it"):
        agree_on_survivors(store, 1, [0, 1], timeout=0.01)
    assert agree_on_survivors(store, 1, [1], timeout=0.01, round_name="1") == [1]


@given(st.integers(1, 12), st.integers(2, 5), st.data())
def test_placements_without_ranks(num_experts, ep_size, data):
    redundant = data.draw(st.integers(0, num_experts))
    loads = torch.arange(num_experts).float()
    whole = placement_of(solve_placement(loads, ep_size, num_redundant=redundant), num_experts)
    lost = data.draw(st.lists(st.integers(0, ep_size - 1), unique=True, max_size=ep_size - 1))
    left = [rank for rank in range(ep_size) if rank not in lost]
    reduced = without_ranks(whole, lost, ep_size)
    for number, rank in enumerate(left):
        assert reduced.experts_of(number) == whole.experts_of(rank)
    assert (reduced.table >= -1).all()
    assert ((reduced.table[:, 1:] < 0) | (reduced.table[:, :-1] >= 0)).all()  # -1 only at the end


def test_losing_every_rank_is_refused():
    with pytest.raises(ValueError, match=r"lost must leave some of 2 ranks, got \[0, 1\]"):
        without_ranks(Placement.identity(4, 2), [0, 1], 2)


def test_outside_of_any_group_an_error_stays_what_it_is():
    with pytest.raises(RuntimeError, match=r"^of the user$"), guard(timeout=0.01):
        raise RuntimeError("of the user")
