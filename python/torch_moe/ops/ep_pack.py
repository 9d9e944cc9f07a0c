"""ep_pack: tokens into the rows that are sent."""

import torch
from torch import Tensor

from torch_moe.ops._common import check_rank, register_fake
from torch_moe.ops.ep_plan import EpPlan

WIRES = ("input", "fp8", "int8")


def row_bytes(
    hidden_size: int,
    dtype: torch.dtype,
    *,
    top_k: int = 0,
    wire: str = "input",
    has_ids: bool = False,
    has_weights: bool = False,
) -> int:
    """Return the bytes of one row between ranks: hidden, scale, ids, weights, padded to 16 (as in ``ep_row.h``)."""

    def round_up(n: int, multiple: int) -> int:
        return -(-n // multiple) * multiple

    weight = 8 if dtype == torch.float64 else 4
    at = round_up(hidden_size * (dtype.itemsize if wire == "input" else 1), 4) + (0 if wire == "input" else 4)
    at = round_up(at + (4 * top_k if has_ids else 0), weight)
    return round_up(at + (weight * top_k if has_weights else 0), 16)


def ep_pack(hidden_states: Tensor, topk_weights: Tensor, plan: EpPlan, *, wire: str = "input") -> Tensor:
    """Write each token, its expert ids and its weights into one row per destination rank.

    Not differentiable: rows are bytes. :class:`torch_moe.distributed.ExpertParallel` has the gradient.

    Parameters
    ----------
    hidden_states : Tensor of shape (num_tokens, hidden_size), dtype=float32, bfloat16, float16 or float64
        The tokens.
    topk_weights : Tensor of shape (num_tokens, top_k), dtype=float32 (float64 for float64 hidden states)
        Their weights.
    plan : EpPlan
        What :func:`ep_plan` returned for these tokens.
    wire : {"input", "fp8", "int8"}, default="input"
        The type of tokens on the way: their own, or 8 bits (e4m3, or symmetric integers) with an fp32 scale per row.

    Returns
    -------
    Tensor of shape (num_rows, row_bytes), dtype=uint8
        The rows; those past ``plan.rank_offsets[-1]`` are empty.

    Raises
    ------
    RuntimeError
        If a shape, dtype, device or option does not fit.
    """
    rows: Tensor = torch.ops.moe.ep_pack(
        hidden_states,
        topk_weights,
        plan.physical_ids,
        plan.row_to_slot,
        plan.ep_size,
        plan.num_local_experts,
        wire=wire,
    )
    return rows


@register_fake("ep_pack")
def _(
    hidden_states: Tensor,
    topk_weights: Tensor | None,
    physical_ids: Tensor | None,
    row_to_slot: Tensor | None,
    ep_size: int,
    num_local_experts: int,
    *,
    wire: str = "input",
) -> Tensor:
    check_rank("ep_pack", "hidden_states", hidden_states, 2)
    size = row_bytes(
        hidden_states.shape[1],
        hidden_states.dtype,
        top_k=0 if topk_weights is None else topk_weights.shape[1],
        wire=wire,
        has_ids=physical_ids is not None,
        has_weights=topk_weights is not None,
    )
    num_rows = hidden_states.shape[0] if row_to_slot is None else row_to_slot.shape[0]
    return hidden_states.new_empty((num_rows, size), dtype=torch.uint8)
