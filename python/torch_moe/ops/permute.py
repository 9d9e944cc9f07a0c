"""permute: put rows of one expert side by side."""

from typing import Any

import torch
from torch import Tensor

from torch_moe.ops._common import Context, check_rank, register_autograd, register_fake
from torch_moe.ops.plan import Plan


def permute(hidden_states: Tensor, plan: Plan) -> Tensor:
    """Gather the tokens' rows in expert order: ``rows[r] = hidden_states[plan.row_to_slot[r] // top_k]``.

    Differentiable in ``hidden_states``; the gradient is :func:`combine` without weights.

    Parameters
    ----------
    hidden_states : Tensor of shape (num_tokens, hidden_size), dtype=float32, bfloat16, float16 or float64
        The tokens.
    plan : Plan
        What :func:`plan` returned for these tokens.

    Returns
    -------
    Tensor of shape (num_rows, hidden_size), same dtype
        The rows; zero past the last expert's.

    Raises
    ------
    RuntimeError
        If a shape, dtype or device does not fit.
    """
    rows: Tensor = torch.ops.moe.permute(hidden_states, *plan)
    return rows


@register_fake("permute")
def _(hidden_states: Tensor, expert_offsets: Tensor, row_to_slot: Tensor, slot_to_row: Tensor) -> Tensor:
    check_rank("permute", "hidden_states", hidden_states, 2)
    return hidden_states.new_empty((row_to_slot.shape[0], hidden_states.shape[1]))


def _setup_context(ctx: Context, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _backward(ctx: Context, grad_rows: Tensor) -> tuple[Tensor, None, None, None]:
    return torch.ops.moe.combine(grad_rows, None, *ctx.saved_tensors), None, None, None


register_autograd("permute", _backward, setup_context=_setup_context)
