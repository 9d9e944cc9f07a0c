"""ep_reduce: returned rows into tokens."""

import torch
from torch import Tensor

from torch_moe.ops._common import check_rank, register_fake
from torch_moe.ops.ep_plan import EpPlan


def ep_reduce(
    rows: Tensor, like: Tensor, plan: EpPlan, hidden_size: int, *, has_weights: bool = False
) -> tuple[Tensor, Tensor]:
    r"""Sum each token's rows, in the order of the ranks: :math:`\sum_d \mathrm{rows}[\mathrm{slot\_to\_row}_{td}]`.

    A rank returns one row per token, already summed over its experts. Not differentiable: rows are bytes.

    Parameters
    ----------
    rows : Tensor of shape (num_rows, row_bytes), dtype=uint8
        The rows that came back, in the order of ``plan``.
    like : Tensor, any shape
        Of the dtype of the tokens.
    plan : EpPlan
        What :func:`ep_plan` returned for these tokens.
    hidden_size : int
        Width of a token.
    has_weights : bool, default=False
        Whether rows carry a number per choice, too: the gradients of the weights.

    Returns
    -------
    output : Tensor of shape (num_tokens, hidden_size), dtype of ``like``
        The sums, accumulated in fp32 (fp64 for float64).
    weights : Tensor of shape (num_tokens, top_k), dtype=float32 (float64 for float64)
        The numbers per choice; (num_tokens, 0) without.

    Raises
    ------
    RuntimeError
        If a shape, dtype or device does not fit.
    """
    ids = plan.physical_ids if has_weights else None
    output, weights = torch.ops.moe.ep_reduce(rows, like, plan.slot_to_row, ids, hidden_size, plan.num_local_experts)
    return output, weights


@register_fake("ep_reduce")
def _(
    rows: Tensor,
    like: Tensor,
    slot_to_row: Tensor,
    physical_ids: Tensor | None,
    hidden_size: int,
    num_local_experts: int,
) -> tuple[Tensor, Tensor]:
    check_rank("ep_reduce", "rows", rows, 2)
    num_tokens = slot_to_row.shape[0]
    top_k = 0 if physical_ids is None else physical_ids.shape[1]
    return (
        rows.new_empty((num_tokens, hidden_size), dtype=like.dtype),
        rows.new_empty((num_tokens, top_k), dtype=torch.promote_types(like.dtype, torch.float32)),
    )
