"""grouped_gemm: one matmul per expert."""

from typing import Any

import torch
from torch import Tensor

from torch_moe.ops._common import (
    Context,
    autocast_dtype,
    check_rank,
    other_layout,
    refuse_double_backward,
    register_autograd,
    register_fake,
)


def grouped_gemm(
    rows: Tensor,
    weight: Tensor,
    expert_offsets: Tensor,
    bias: Tensor | None = None,
    weight_layout: str = "out_in",
) -> Tensor:
    """Multiply each expert's rows by its weight: ``output[r] = weight[e] @ rows[r] + bias[e]``.

    Differentiable in ``rows``, ``weight`` and ``bias``; an expert without rows gets an exactly zero gradient. Under
    autocast, ``rows``, ``weight`` and ``bias`` are cast to the autocast dtype.

    Parameters
    ----------
    rows : Tensor of shape (num_rows, in_features), dtype=float32, bfloat16, float16 or float64
        Rows in expert order.
    weight : Tensor of shape (num_experts, out_features, in_features), same dtype
        One matrix per expert, as above for ``weight_layout="out_in"``; transposed for ``"in_out"``.
    expert_offsets : Tensor of shape (num_experts + 1,), dtype=int32
        The rows of expert ``e`` are ``expert_offsets[e] : expert_offsets[e + 1]``.
    bias : Tensor of shape (num_experts, out_features), same dtype, default=None
        Added to each row of the expert.
    weight_layout : {"out_in", "in_out"}, default="out_in"
        How ``weight`` is stored.

    Returns
    -------
    Tensor of shape (num_rows, out_features), same dtype
        Accumulated in fp32 (fp64 for float64); zero past the last expert's rows.

    Raises
    ------
    RuntimeError
        If a shape, dtype, device or option does not fit.
    """
    dtype = autocast_dtype(rows)
    if dtype is not None:
        rows, weight = rows.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    output: Tensor = torch.ops.moe.grouped_gemm(rows, weight, expert_offsets, bias, weight_layout=weight_layout)
    return output


@register_fake("grouped_gemm")
def _(
    rows: Tensor,
    weight: Tensor,
    expert_offsets: Tensor,
    bias: Tensor | None = None,
    *,
    weight_layout: str = "out_in",
) -> Tensor:
    check_rank("grouped_gemm", "rows", rows, 2)
    check_rank("grouped_gemm", "weight", weight, 3)
    return rows.new_empty((rows.shape[0], weight.shape[1 if weight_layout == "out_in" else 2]))


@register_fake("grouped_gemm_wgrad")
def _(lhs: Tensor, rhs: Tensor, expert_offsets: Tensor) -> Tensor:
    check_rank("grouped_gemm_wgrad", "lhs", lhs, 2)
    check_rank("grouped_gemm_wgrad", "rhs", rhs, 2)
    return lhs.new_empty((expert_offsets.shape[0] - 1, lhs.shape[1], rhs.shape[1]))


@register_fake("grouped_gemm_wgrad_")
def _(grad: Tensor, lhs: Tensor, rhs: Tensor, expert_offsets: Tensor) -> None:
    check_rank("grouped_gemm_wgrad_", "grad", grad, 3)


@register_fake("grouped_gemm_bgrad")
def _(grad_output: Tensor, expert_offsets: Tensor) -> Tensor:
    check_rank("grouped_gemm_bgrad", "grad_output", grad_output, 2)
    return grad_output.new_empty((expert_offsets.shape[0] - 1, grad_output.shape[1]))


def _setup_context(ctx: Context, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
    rows, weight, expert_offsets, _ = inputs
    needs_rows, needs_weight = ctx.needs_input_grad[:2]
    ctx.save_for_backward(rows if needs_weight else None, weight if needs_rows else None, expert_offsets)
    ctx.weight_layout = keyword_only_inputs["weight_layout"]


def _backward(ctx: Context, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    rows, weight, expert_offsets = ctx.saved_tensors
    # The dispatcher leaves out trailing arguments that equal their defaults, a bias of None.
    needs_rows, needs_weight, _, needs_bias = (*ctx.needs_input_grad, False)[:4]
    moe = torch.ops.moe
    grad_rows = grad_weight = grad_bias = None
    if needs_rows:  # dgrad is the same product with the weight read the other way
        layout = other_layout(ctx.weight_layout)
        grad_rows = moe.grouped_gemm(grad_output, weight, expert_offsets, weight_layout=layout)
    if needs_weight:
        operands = (grad_output, rows) if ctx.weight_layout == "out_in" else (rows, grad_output)
        grad_weight = moe.grouped_gemm_wgrad(*operands, expert_offsets)
    if needs_bias:
        grad_bias = moe.grouped_gemm_bgrad(grad_output, expert_offsets)
    return grad_rows, grad_weight, None, grad_bias


register_autograd("grouped_gemm", _backward, setup_context=_setup_context)
refuse_double_backward("grouped_gemm_wgrad")
refuse_double_backward("grouped_gemm_bgrad")
