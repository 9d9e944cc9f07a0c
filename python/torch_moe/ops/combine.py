"""combine: weighted sum back to tokens."""

from typing import Any

import torch
from torch import Tensor

from torch_moe.ops._common import Context, check_rank, refuse_double_backward, register_autograd, register_fake
from torch_moe.ops.plan import Plan


def combine(rows: Tensor, topk_weights: Tensor | None, plan: Plan) -> Tensor:
    r"""Sum each token's rows: :math:`\sum_k w_{tk}\, \mathrm{rows}[\mathrm{slot\_to\_row}_{tk}]`, in order of ``k``.

    Dropped slots are left out. Differentiable in ``rows`` and ``topk_weights``.

    Parameters
    ----------
    rows : Tensor of shape (num_rows, hidden_size), dtype=float32, bfloat16, float16 or float64
        Rows in expert order.
    topk_weights : Tensor of shape (num_tokens, top_k), dtype=float32 (float64 for float64 rows), or None
        The weight of each slot; None weighs every slot by one.
    plan : Plan
        What :func:`plan` returned for these tokens.

    Returns
    -------
    Tensor of shape (num_tokens, hidden_size), dtype of ``rows``
        The tokens, accumulated in fp32 (fp64 for float64 rows).

    Raises
    ------
    RuntimeError
        If a shape, dtype or device does not fit.
    """
    output: Tensor = torch.ops.moe.combine(rows, topk_weights, *plan)
    return output


@register_fake("combine")
def _(
    rows: Tensor, topk_weights: Tensor | None, expert_offsets: Tensor, row_to_slot: Tensor, slot_to_row: Tensor
) -> Tensor:
    check_rank("combine", "rows", rows, 2)
    check_rank("combine", "slot_to_row", slot_to_row, 2)
    return rows.new_empty((slot_to_row.shape[0], rows.shape[1]))


@register_fake("combine_backward")
def _(
    grad_output: Tensor,
    rows: Tensor,
    topk_weights: Tensor,
    expert_offsets: Tensor,
    row_to_slot: Tensor,
    slot_to_row: Tensor,
) -> tuple[Tensor, Tensor]:
    check_rank("combine_backward", "rows", rows, 2)
    return rows.new_empty(rows.shape), topk_weights.new_empty(topk_weights.shape)


def _setup_context(ctx: Context, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, topk_weights, *maps = inputs
    # Without weights the sum is linear in the rows: nothing of them is needed again.
    ctx.save_for_backward(None if topk_weights is None else rows, topk_weights, *maps)


def _backward(ctx: Context, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    rows, topk_weights, *maps = ctx.saved_tensors
    if topk_weights is None:
        return torch.ops.moe.permute(grad_output, *maps), None, None, None, None
    return *torch.ops.moe.combine_backward(grad_output, rows, topk_weights, *maps), None, None, None


register_autograd("combine", _backward, setup_context=_setup_context)
refuse_double_backward("combine_backward")
