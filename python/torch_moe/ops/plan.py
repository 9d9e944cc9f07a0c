"""plan: which row goes where."""

from typing import NamedTuple

import torch
from torch import Tensor

from torch_moe.ops._common import check_rank, register_fake


class Plan(NamedTuple):
    """Where every slot's row lies in expert order; passed whole to the later stages.

    A slot is one (token, choice) pair, numbered ``token * top_k + k``; a row is a position in expert order.

    Attributes
    ----------
    expert_offsets : Tensor of shape (num_experts + 1,), dtype=int32
        The rows of expert ``e`` are ``expert_offsets[e] : expert_offsets[e + 1]``.
    row_to_slot : Tensor of shape (num_rows,), dtype=int32
        The slot of a row; -1 past ``expert_offsets[-1]``.
    slot_to_row : Tensor of shape (num_tokens, top_k), dtype=int32
        The row of a slot; -1 for a dropped slot.
    """

    expert_offsets: Tensor
    row_to_slot: Tensor
    slot_to_row: Tensor

    @property
    def num_tokens(self) -> int:
        """Number of tokens, T."""
        return self.slot_to_row.shape[0]

    @property
    def top_k(self) -> int:
        """Experts per token, K."""
        return self.slot_to_row.shape[1]

    @property
    def num_experts(self) -> int:
        """Number of experts, E."""
        return self.expert_offsets.shape[0] - 1

    @property
    def num_rows(self) -> int:
        """Number of rows, R: T * K, dropped slots included, or fewer where it is known how many are kept."""
        return self.row_to_slot.shape[0]

    @property
    def tokens_per_expert(self) -> Tensor:
        """Tensor of shape (num_experts,), dtype=int32: rows of each expert, dropped slots not counted."""
        return self.expert_offsets.diff()


def plan(topk_ids: Tensor, num_experts: int, capacity: int | None = None) -> Plan:
    """Sort the slots by expert: a stable counting sort in O(num_rows + num_experts).

    Parameters
    ----------
    topk_ids : Tensor of shape (num_tokens, top_k), dtype=int32
        The experts of each token. An id outside ``[0, num_experts)`` keeps no row: its slot is dropped.
    num_experts : int
        Number of experts.
    capacity : int, default=None
        Rows an expert takes at most, in slot order; slots beyond are dropped. None drops nothing.

    Returns
    -------
    Plan
        The offsets and the two maps between slots and rows.

    Raises
    ------
    RuntimeError
        If ``topk_ids`` is not a 2-dimensional int32 tensor, ``num_experts < 1`` or ``capacity < 0``.
    """
    return Plan(*torch.ops.moe.plan(topk_ids, num_experts, capacity))


@register_fake("plan")
def _(topk_ids: Tensor, num_experts: int, capacity: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    check_rank("plan", "topk_ids", topk_ids, 2)
    num_tokens, top_k = topk_ids.shape
    ids = topk_ids.new_empty
    return (
        ids((num_experts + 1,), dtype=torch.int32),
        ids((num_tokens * top_k,), dtype=torch.int32),
        ids((num_tokens, top_k), dtype=torch.int32),
    )
