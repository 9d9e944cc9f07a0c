"""ep_plan: which token goes to which rank."""

from typing import NamedTuple

import torch
from torch import Tensor

from torch_moe.ops._common import check_rank, register_fake
from torch_moe.ops.plan import Plan


class EpPlan(NamedTuple):
    """Which tokens a rank sends where: each once per rank, ordered by (chunk, rank, token).

    W is ``ep_size``, C the number of chunks, L ``num_local_experts``. A slot is a (token, rank) pair, numbered
    ``token * ep_size + rank``.

    Attributes
    ----------
    physical_ids : Tensor of shape (num_tokens, top_k), dtype=int32
        Where each choice is computed: expert ``p % L`` of rank ``p // L``; -1 for a choice that nobody computes.
    rank_offsets : Tensor of shape (C * W + 1,), dtype=int32
        The rows of chunk ``c`` for rank ``d`` are ``rank_offsets[c * W + d] : rank_offsets[c * W + d + 1]``.
    row_to_slot : Tensor of shape (num_tokens * min(top_k, W),), dtype=int32
        The slot of a row; -1 past ``rank_offsets[-1]``.
    slot_to_row : Tensor of shape (num_tokens, W), dtype=int32
        The row of a slot; -1 for a token that does not go to that rank.
    counts : Tensor of shape (W, 2 * C + L), dtype=int32
        What each rank is told beforehand: rows by chunk, (token, expert) pairs by chunk, pairs by its experts.
    """

    physical_ids: Tensor
    rank_offsets: Tensor
    row_to_slot: Tensor
    slot_to_row: Tensor
    counts: Tensor

    @property
    def ep_size(self) -> int:
        """Number of ranks, W."""
        return self.slot_to_row.shape[1]

    @property
    def num_chunks(self) -> int:
        """Number of chunks, C."""
        return (self.rank_offsets.shape[0] - 1) // self.ep_size

    @property
    def num_local_experts(self) -> int:
        """Physical experts of one rank, L."""
        return self.counts.shape[1] - 2 * self.num_chunks

    @property
    def rows(self) -> Plan:
        """The maps as a plan with the ranks as choices: ``permute`` gathers by it, ``combine`` sums by rank."""
        return Plan(self.rank_offsets, self.row_to_slot, self.slot_to_row)


def ep_plan(
    topk_ids: Tensor,
    num_experts: int,
    ep_size: int,
    *,
    ep_rank: int = 0,
    num_local_experts: int | None = None,
    placement: Tensor | None = None,
    num_chunks: int = 1,
) -> EpPlan:
    """Sort the tokens by the ranks that compute their experts, each token once per rank.

    Parameters
    ----------
    topk_ids : Tensor of shape (num_tokens, top_k), dtype=int32
        The experts of each token; an id outside ``[0, num_experts)`` is skipped.
    num_experts : int
        Number of experts that ids name.
    ep_size : int
        Number of ranks, which need not divide ``num_experts``.
    ep_rank : int, default=0
        This rank: tokens ``t`` of rank ``r`` take replica ``(t + r) mod (number of replicas)``.
    num_local_experts : int, default=None
        Physical experts per rank; None is ``ceil(num_experts / ep_size)``.
    placement : Tensor of shape (num_experts, num_replicas), dtype=int32, default=None
        The physical experts of each expert, padded with -1 at the end; an expert without any is skipped. None: expert
        ``e`` is physical expert ``e``.
    num_chunks : int, default=1
        Chunk ``c`` has the tokens ``[num_tokens * c // num_chunks, num_tokens * (c + 1) // num_chunks)``.

    Returns
    -------
    EpPlan
        The maps, and what to tell the other ranks.

    Raises
    ------
    RuntimeError
        If a shape, dtype or size does not fit.
    """
    local = -(-num_experts // ep_size) if num_local_experts is None else num_local_experts
    return EpPlan(*torch.ops.moe.ep_plan(topk_ids, placement, num_experts, local, ep_size, ep_rank, num_chunks))


@register_fake("ep_plan")
def _(
    topk_ids: Tensor,
    placement: Tensor | None,
    num_experts: int,
    num_local_experts: int,
    ep_size: int,
    ep_rank: int,
    num_chunks: int = 1,
) -> tuple[Tensor, ...]:
    check_rank("ep_plan", "topk_ids", topk_ids, 2)
    num_tokens, top_k = topk_ids.shape
    return (
        topk_ids.new_empty((num_tokens, top_k), dtype=torch.int32),
        topk_ids.new_empty((num_chunks * ep_size + 1,), dtype=torch.int32),
        topk_ids.new_empty((num_tokens * min(top_k, ep_size),), dtype=torch.int32),
        topk_ids.new_empty((num_tokens, ep_size), dtype=torch.int32),
        topk_ids.new_empty((ep_size, 2 * num_chunks + num_local_experts), dtype=torch.int32),
    )
