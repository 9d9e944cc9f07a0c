"""ep_dispatch: tokens to the ranks of their experts; in flight when it returns, so that others can compute meanwhile.

::

    pack -> [counts] -> [rows, by chunk]

[..] is an exchange. :mod:`torch_moe.distributed.experts` waits for the rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torch_moe.distributed import exchange
from torch_moe.ops._common import check_rank, register_fake
from torch_moe.ops.ep_pack import row_bytes


def _dispatch(
    hidden_states: Tensor,
    topk_weights: Tensor,
    physical_ids: Tensor,
    rank_offsets: Tensor,
    row_to_slot: Tensor,
    slot_to_row: Tensor,
    counts: Tensor,
    group_name: str,
    *,
    wire: str = "input",
    check: bool = False,
    capacity: int = 0,
) -> tuple[Tensor, list[Tensor]]:
    """Start the exchange of all chunks; the rows are not there yet.

    With a capacity, so many rows go to each rank per chunk, filled or not, before anybody knows how many there are, and
    no number is read: how many rows this rank has for another at most is told with the counts, to be looked at later.
    """
    ranks, top_k = slot_to_row.shape[1], physical_ids.shape[1]
    num_chunks = (rank_offsets.shape[0] - 1) // ranks
    num_local_experts = counts.shape[1] - 2 * num_chunks
    size = packed_bytes(hidden_states, top_k, wire)
    told = [counts, counts.new_full((ranks, 1), size)]
    if capacity > 0:
        told.append(rank_offsets.diff().amax().expand(ranks, 1))
    equal = [1] * ranks
    answer = exchange.start(torch.cat(told, dim=1), equal, equal, group_name)  # in flight while the rows are packed
    if capacity > 0:
        blocks = exchange.Blocks(num_chunks, ranks, capacity, min(top_k, num_local_experts))
        row_to_slot = blocks.slots(rank_offsets, row_to_slot)
    rows = torch.ops.moe.ep_pack(
        hidden_states, topk_weights, physical_ids, row_to_slot, ranks, num_local_experts, wire=wire
    )
    if capacity > 0:
        return answer, start_chunks(rows, blocks, group_name)
    received_counts = exchange.wait(answer)
    known = exchange.Counts(rank_offsets, received_counts)
    known.check(size, top_k)
    return received_counts, start_chunks(rows, known, group_name, check=check)


def start_chunks(
    rows: Tensor, known: exchange.Counts | exchange.Blocks, group_name: str, *, check: bool = False
) -> list[Tensor]:
    """Start the exchange of rows that lie by (chunk, rank), one per chunk."""
    return [
        exchange.start(rows[known.bounds(c)], known.send(c), known.receive(c), group_name, check=check)
        for c in range(known.num_chunks)
    ]


def packed_bytes(hidden_states: Tensor, top_k: int, wire: str) -> int:
    """Return the bytes of a token's row with its ids and weights."""
    hidden_size, dtype = hidden_states.shape[1], hidden_states.dtype
    return row_bytes(hidden_size, dtype, top_k=top_k, wire=wire, has_ids=True, has_weights=True)


@register_fake("ep_dispatch")
def _(
    hidden_states: Tensor,
    topk_weights: Tensor,
    physical_ids: Tensor,
    rank_offsets: Tensor,
    row_to_slot: Tensor,
    slot_to_row: Tensor,
    counts: Tensor,
    group_name: str,
    *,
    wire: str = "input",
    check: bool = False,
    capacity: int = 0,
) -> tuple[Tensor, list[Tensor]]:
    check_rank("ep_dispatch", "hidden_states", hidden_states, 2)
    ranks = slot_to_row.shape[1]
    size = packed_bytes(hidden_states, physical_ids.shape[1], wire)
    context = torch.library.get_ctx()
    received = [
        hidden_states.new_empty((ranks * capacity or context.new_dynamic_size(), size), dtype=torch.uint8)
        for _ in range((rank_offsets.shape[0] - 1) // ranks)
    ]
    return counts.new_empty((ranks, counts.shape[1] + (2 if capacity else 1))), received


torch.library.impl("moe::ep_dispatch", "CompositeExplicitAutograd")(_dispatch)
