"""ep_index: received rows into what the experts take."""

from typing import NamedTuple

import torch
from torch import Tensor

from torch_moe.ops._common import check_rank, register_fake
from torch_moe.ops.plan import Plan


class Received(NamedTuple):
    """Rows from other ranks, ready for ``experts``: a received row is a token, a (row, expert) pair is a row.

    Attributes
    ----------
    hidden_states : Tensor of shape (num_rows, hidden_size)
        One per received row, never one per pair.
    topk_weights : Tensor of shape (num_rows, top_k), dtype=float32 (float64 for float64 hidden states)
        Their weights.
    expert_offsets, row_to_slot, slot_to_row : Tensor
        The :class:`Plan` of the pairs, of ``num_pairs`` rows.
    """

    hidden_states: Tensor
    topk_weights: Tensor
    expert_offsets: Tensor
    row_to_slot: Tensor
    slot_to_row: Tensor

    @property
    def plan(self) -> Plan:
        """The plan of the pairs."""
        return Plan(self.expert_offsets, self.row_to_slot, self.slot_to_row)


def ep_index(
    rows: Tensor, like: Tensor, hidden_size: int, top_k: int, num_experts: int, num_pairs: int, *, wire: str = "input"
) -> Received:
    """Read received rows and sort their (row, expert) pairs by expert.

    Not differentiable: rows are bytes. :class:`torch_moe.distributed.ExpertParallel` has the gradient.

    Parameters
    ----------
    rows : Tensor of shape (num_rows, row_bytes), dtype=uint8
        What :func:`ep_pack` wrote.
    like : Tensor, any shape
        Of the dtype the tokens had.
    hidden_size, top_k : int
        Their sizes.
    num_experts : int
        Experts of this rank.
    num_pairs : int
        How many pairs the rows hold: the sum over ``EpPlan.counts`` that the senders tell.
    wire : {"input", "fp8", "int8"}, default="input"
        As the rows were packed.

    Returns
    -------
    Received
        Tokens, weights and plan.

    Raises
    ------
    RuntimeError
        If a shape, dtype, device or option does not fit.
    """
    return Received(*torch.ops.moe.ep_index(rows, like, hidden_size, top_k, num_experts, num_pairs, wire=wire))


@register_fake("ep_index")
def _(
    rows: Tensor, like: Tensor, hidden_size: int, top_k: int, num_experts: int, num_pairs: int, *, wire: str = "input"
) -> tuple[Tensor, ...]:
    check_rank("ep_index", "rows", rows, 2)
    num_rows = rows.shape[0]
    weight = torch.promote_types(like.dtype, torch.float32)
    return (
        rows.new_empty((num_rows, hidden_size), dtype=like.dtype),
        rows.new_empty((num_rows, top_k), dtype=weight),
        rows.new_empty((num_experts + 1,), dtype=torch.int32),
        rows.new_empty((num_pairs,), dtype=torch.int32),
        rows.new_empty((num_rows, top_k), dtype=torch.int32),
    )
