"""experts: permute -> grouped_gemm -> activation -> grouped_gemm -> combine as one operator."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from torch_moe.ops._common import (
    Context,
    Options,
    autocast_dtype,
    check_rank,
    empty_gradient,
    refuse_double_backward,
    register_autograd,
    register_fake,
)
from torch_moe.ops.plan import Plan
from torch_moe.ops.plan import plan as make_plan

# NOTE: found once. A model of many layers has emptied the caches before each call, and every look-up of a name reads
# memory a few times: with one token that shows.
_routed_experts = torch.ops.moe.routed_experts.default


def experts(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    topk_weights: Tensor,
    plan: Plan | Tensor,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    activation: str = "swiglu",
    gate_layout: str = "concat",
    weight_layout: str = "out_in",
    alpha: float = 1.0,
    limit: float | None = None,
    up_offset: float = 0.0,
    recompute: bool = False,
    accumulate: bool = False,
    row_invariant: bool = False,
) -> Tensor:
    r"""Send each token through its experts' feed-forward networks and sum by weight.

    For row :math:`r` of expert :math:`e` and token :math:`t(r)`: :math:`H_r = W^1_e x_{t(r)} + b^1_e`,
    :math:`A_r = \mathrm{act}(H_r)`, :math:`Y_r = W^2_e A_r + b^2_e`; a token's output is the sum of its
    :math:`w_r Y_r`. Differentiable in everything but the plan; an expert without rows gets an exactly zero
    gradient. For the backward only ``hidden_states``, the pre-activation :math:`H`, ``topk_weights``, the plan and
    references to the parameters are kept. In inference the operator takes, beside its output, at most
    ``1.25 * num_rows * intermediate_size`` elements and a few MiB per thread: the activations between the two GEMMs,
    and packed blocks that threads keep for the next call. Blocks of 4 MiB and more, those of freed gradients of the
    weights among them, are kept, too, never more than were once in use together, and marked as free: Linux takes them
    back when it needs memory, and counts them as the process's until then. Under autocast, ``hidden_states`` and the
    parameters are cast to the autocast dtype; ``topk_weights`` stay fp32.

    Parameters
    ----------
    hidden_states : Tensor of shape (num_tokens, hidden_size), dtype=float32, bfloat16, float16 or float64
        The tokens.
    gate_up_proj : Tensor of shape (num_experts, 2 * intermediate_size, hidden_size), same dtype
        First weights; (num_experts, intermediate_size, hidden_size) when not gated. The last two dimensions are
        swapped for ``weight_layout="in_out"``.
    down_proj : Tensor of shape (num_experts, hidden_size, intermediate_size), same dtype
        Second weights; swapped likewise.
    topk_weights : Tensor of shape (num_tokens, top_k), dtype=float32 (float64 for float64 hidden states)
        The weight of each slot.
    plan : Plan, or Tensor of shape (num_tokens, top_k), dtype=int32
        What :func:`plan` returned for these tokens; or their ``topk_ids``, to have the plan made inside, which saves a
        call where nothing is differentiated. On a GPU of compute capability 9.0, up to 256 slots of bfloat16 or float16
        then take two kernels of their own, which add in another order, unless ``row_invariant``.
    gate_up_bias : Tensor of shape (num_experts, 2 * intermediate_size), same dtype, default=None
        First biases; (num_experts, intermediate_size) when not gated.
    down_bias : Tensor of shape (num_experts, hidden_size), same dtype, default=None
        Second biases.
    activation, gate_layout, alpha, limit, up_offset
        As in :func:`activation`.
    weight_layout : {"out_in", "in_out"}, default="out_in"
        How both weights are stored.
    recompute : bool, default=False
        Keep no pre-activation; the backward computes it again: one more GEMM, ``num_rows * 2 * intermediate_size``
        elements less.
    accumulate : bool, default=False
        Let the backward add the gradients of ``gate_up_proj`` and ``down_proj`` to their ``.grad`` in place, where both
        are leaves that have one of their dtype: the gradient of a micro-batch is then never stored by itself.
        Autograd does not see these additions: hooks on the parameters' gradients get None, so it is not for what
        relies on them (DDP, FSDP). Without effect in a compiled graph and under autocast.
    row_invariant : bool, default=False
        Let what a row gives not depend on how many rows its expert has: then parts of a batch give the bits of the
        whole, in output and gradients of ``hidden_states`` and ``topk_weights``. Few rows are slower.

    Returns
    -------
    Tensor of shape (num_tokens, hidden_size), same dtype
        The tokens' outputs.

    Raises
    ------
    RuntimeError
        If a shape, dtype, device or option does not fit.

    References
    ----------
    arXiv 2512.14080 (what the backward has to keep).
    """
    dtype = autocast_dtype(hidden_states)
    if dtype is not None:
        hidden_states, gate_up_proj, down_proj = hidden_states.to(dtype), gate_up_proj.to(dtype), down_proj.to(dtype)
        gate_up_bias = None if gate_up_bias is None else gate_up_bias.to(dtype)
        down_bias = None if down_bias is None else down_bias.to(dtype)
    needs_grad = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad
        for tensor in (hidden_states, gate_up_proj, down_proj, topk_weights, gate_up_bias, down_bias)
    )
    output: Tensor
    if isinstance(plan, Tensor):
        if not needs_grad and forward_ad._current_level < 0:  # else the operator with a gradient refuses tangents
            output = _routed_experts(
                hidden_states,
                gate_up_proj,
                down_proj,
                topk_weights,
                plan,
                gate_up_bias,
                down_bias,
                activation=activation,
                gate_layout=gate_layout,
                weight_layout=weight_layout,
                alpha=alpha,
                limit=limit,
                up_offset=up_offset,
                row_invariant=row_invariant,
            )
            return output
        plan = make_plan(plan, gate_up_proj.shape[0])
    output = torch.ops.moe.experts(
        hidden_states,
        gate_up_proj,
        down_proj,
        topk_weights,
        *plan,
        gate_up_bias,
        down_bias,
        activation=activation,
        gate_layout=gate_layout,
        weight_layout=weight_layout,
        alpha=alpha,
        limit=limit,
        up_offset=up_offset,
        row_invariant=row_invariant,
        save_pre_activation=needs_grad and not recompute,
        accumulate=accumulate,
    )[0]
    return output


@register_fake("experts")
def _(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    topk_weights: Tensor,
    expert_offsets: Tensor,
    row_to_slot: Tensor,
    slot_to_row: Tensor,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    weight_layout: str = "out_in",
    save_pre_activation: bool = True,
    **options: Options,
) -> tuple[Tensor, Tensor]:
    check_rank("experts", "hidden_states", hidden_states, 2)
    check_rank("experts", "gate_up_proj", gate_up_proj, 3)
    num_rows = row_to_slot.shape[0] if save_pre_activation else 0
    width = gate_up_proj.shape[1 if weight_layout == "out_in" else 2]
    return hidden_states.new_empty(hidden_states.shape), hidden_states.new_empty((num_rows, width))


@register_fake("routed_experts")
def _(hidden_states: Tensor, *tensors: Tensor | None, **options: Options) -> Tensor:
    check_rank("routed_experts", "hidden_states", hidden_states, 2)
    return hidden_states.new_empty(hidden_states.shape)


@register_fake("experts_backward")
def _backward_fake(
    grad_output: Tensor,
    hidden_states: Tensor,
    pre_activation: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    topk_weights: Tensor,
    expert_offsets: Tensor,
    row_to_slot: Tensor,
    slot_to_row: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    *,
    needs_hidden_states: bool,
    needs_projections: bool,
    needs_topk_weights: bool,
    needs_biases: bool,
    **options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        empty_gradient(hidden_states, hidden_states, needs_hidden_states),
        empty_gradient(hidden_states, gate_up_proj, needs_projections),
        empty_gradient(hidden_states, down_proj, needs_projections),
        empty_gradient(hidden_states, topk_weights, needs_topk_weights),
        empty_gradient(hidden_states, gate_up_bias, needs_biases),
        empty_gradient(hidden_states, down_bias, needs_biases),
    )


@register_fake("experts_backward_")
def _(
    grad_gate_up_proj: Tensor, grad_down_proj: Tensor, *tensors: Tensor, **options: Options
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grads = _backward_fake(*tensors, **options, needs_projections=False)
    return grads[0], grads[3], grads[4], grads[5]


def _setup_context(
    ctx: Context, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: tuple[Tensor, Tensor]
) -> None:
    hidden_states, *rest = inputs
    pre_activation = output[1]
    ctx.mark_non_differentiable(pre_activation)
    ctx.set_materialize_grads(False)  # or each backward fills a gradient of the pre-activation with zeros, for nobody
    ctx.save_for_backward(hidden_states, pre_activation, *rest)
    ctx.accumulate = keyword_only_inputs["accumulate"]
    ctx.options = {
        name: value for name, value in keyword_only_inputs.items() if name not in ("save_pre_activation", "accumulate")
    }


def _can_accumulate(parameter: Tensor) -> bool:
    """Tell whether a gradient may be added to the parameter's own, unseen by autograd."""
    grad = parameter.grad if parameter.is_leaf else None
    return (
        grad is not None
        and grad.dtype == parameter.dtype
        and grad.is_contiguous()
        and not (torch.is_grad_enabled() or torch.compiler.is_compiling())
    )


def _backward(ctx: Context, grad_output: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_output is None:  # what comes after says that nothing depends on the output
        return (None,) * 9
    # The dispatcher leaves out trailing arguments that equal their defaults, biases of None.
    needs_input_grad = (*ctx.needs_input_grad, False, False)[:9]
    hidden, gate_up, down, weights, _, _, _, gate_up_bias, down_bias = needs_input_grad
    options = {
        **ctx.options,
        "needs_hidden_states": hidden,
        "needs_topk_weights": weights,
        "needs_biases": gate_up_bias or down_bias,
    }
    saved = ctx.saved_tensors
    projections = saved[2:4]
    if ctx.accumulate and gate_up and down and all(map(_can_accumulate, projections)):
        gate_up = down = False  # as autograd sees it: nothing is returned for them
        existing = [parameter.grad for parameter in projections]
        grad_hidden, *rest = torch.ops.moe.experts_backward_(*existing, grad_output, *saved, **options)
        grads = [grad_hidden, None, None, *rest]
    else:
        needs_projections = gate_up or down
        grads = torch.ops.moe.experts_backward(grad_output, *saved, **options, needs_projections=needs_projections)
    needed = (hidden, gate_up, down, weights, gate_up_bias, down_bias)
    grads = [grad if need else None for grad, need in zip(grads, needed, strict=True)]
    return *grads[:4], None, None, None, *grads[4:]


register_autograd("experts", _backward, setup_context=_setup_context)
refuse_double_backward("experts_backward")
