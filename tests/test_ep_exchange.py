"""What ranks tell each other before they exchange is checked: what cannot be is named, with the rank."""

import pytest
import torch

from torch_moe import ops
from torch_moe.distributed import exchange
from torch_moe.testing import routing

T, E, K, RANKS, BYTES = 19, 6, 3, 2, 160


@pytest.fixture
def told():
    """The plan, and what this rank would be told by two ranks that send it the same: rows, pairs, loads, bytes."""
    plan = ops.ep_plan(routing("uniform", T, E, K), E, RANKS)
    counts = plan.counts[:1].expand(RANKS, -1)
    return plan.rank_offsets, torch.cat([counts, counts.new_full((RANKS, 1), BYTES)], dim=1)


def test_what_a_rank_tells_of_its_own_plan_is_taken(told):
    exchange.Counts(*told).check(BYTES, K)


def test_another_row_format_is_refused(told):
    told[1][1, -1] = BYTES + 16
    words = (
        rf"ep_dispatch: rows from rank 1 must have {BYTES} bytes, got {BYTES + 16} \(hidden_size, top_k, dtype and wire"
    )
    with pytest.raises(RuntimeError, match=words):
        exchange.Counts(*told).check(BYTES, K)


@pytest.mark.parametrize("place", [0, 1, 2], ids=["rows", "pairs", "load"])
@pytest.mark.parametrize("change", [-1000, 1000])
def test_numbers_that_cannot_be_are_refused(told, place, change):
    told[1][1, place] += change
    with pytest.raises(RuntimeError, match="ep_dispatch: rank 1 must announce as many pairs as its rows have experts"):
        exchange.Counts(*told).check(BYTES, K)


def test_rows_that_are_not_those_announced_are_refused():
    with pytest.raises(ValueError, match=r"exchange: rows must have sum\(send\) = 3 rows, got 2"):
        exchange.start(torch.zeros(2, 4), [1, 2], [1, 1], "0")
