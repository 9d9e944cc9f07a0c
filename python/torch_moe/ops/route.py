"""route: which experts, with what weight."""

from typing import Any

import torch
from torch import Tensor

from torch_moe.ops._common import Context, Options, check_rank, refuse_double_backward, register_fake


def route(
    router_logits: Tensor,
    top_k: int,
    expert_bias: Tensor | None = None,
    *,
    score_function: str = "softmax",
    score_order: str = "score_then_topk",
    renormalize: bool = True,
    routed_scaling_factor: float = 1.0,
    num_groups: int = 1,
    topk_groups: int = 1,
    check_finite: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""Choose ``top_k`` experts per token and weigh them.

    With scores :math:`v = \mathrm{softmax}(z)` or :math:`\mathrm{sigmoid}(z)`, the chosen ids :math:`S` give the
    weights :math:`w = v_S` (``score_then_topk``) or the same function of :math:`z_S` alone (``topk_then_score``),
    divided by their sum with ``renormalize``, times ``routed_scaling_factor``. Arithmetic is fp32 (fp64 for fp64
    logits). Equal candidates go to the lower id. Differentiable in ``router_logits``.

    Parameters
    ----------
    router_logits : Tensor of shape (num_tokens, num_experts), dtype=float32, bfloat16, float16 or float64
        The router's logits :math:`z`.
    top_k : int
        Experts per token.
    expert_bias : Tensor of shape (num_experts,), dtype=float32 (float64 for float64 logits), default=None
        Added to the scores (to the logits in ``topk_then_score``) for the selection only: it never enters a weight
        and gets no gradient.
    score_function : {"softmax", "sigmoid"}, default="softmax"
        The score of an expert.
    score_order : {"score_then_topk", "topk_then_score"}, default="score_then_topk"
        Whether scores are taken over all experts before the selection, or over the selected after it.
    renormalize : bool, default=True
        Divide the weights by their sum.
    routed_scaling_factor : float, default=1.0
        Multiplies the weights.
    num_groups : int, default=1
        Equal runs of experts that are selected first, by the sum of their two best candidates.
    topk_groups : int, default=1
        Groups that stay eligible.
    check_finite : bool, default=False
        Raise if a logit is NaN or infinite. Unchecked, NaN is never preferred: the ids stay ``top_k`` distinct
        experts, and NaN shows in the weights.

    Returns
    -------
    topk_weights : Tensor of shape (num_tokens, top_k), dtype=float32 (float64 for float64 logits)
        The weights, in order of descending candidates.
    topk_ids : Tensor of shape (num_tokens, top_k), dtype=int32
        The experts, distinct within a token.

    Raises
    ------
    RuntimeError
        If a shape, dtype or option is not as above, or a logit is not finite with ``check_finite``.

    References
    ----------
    arXiv 2101.03961 (Switch), 2401.04088 (Mixtral), 2412.19437 (DeepSeek-V3: sigmoid, bias, groups).
    """
    topk_weights, topk_ids = torch.ops.moe.route(
        router_logits,
        top_k,
        expert_bias,
        score_function=score_function,
        score_order=score_order,
        renormalize=renormalize,
        routed_scaling_factor=routed_scaling_factor,
        num_groups=num_groups,
        topk_groups=topk_groups,
        check_finite=check_finite,
    )
    return topk_weights, topk_ids


@register_fake("route")
def _(
    router_logits: Tensor, top_k: int, expert_bias: Tensor | None = None, **options: Options
) -> tuple[Tensor, Tensor]:
    check_rank("route", "router_logits", router_logits, 2)
    shape = (router_logits.shape[0], top_k)
    weight_dtype = torch.promote_types(router_logits.dtype, torch.float32)
    return router_logits.new_empty(shape, dtype=weight_dtype), router_logits.new_empty(shape, dtype=torch.int32)


@register_fake("route_backward")
def _(grad_topk_weights: Tensor, router_logits: Tensor, topk_ids: Tensor, **options: Options) -> Tensor:
    check_rank("route_backward", "router_logits", router_logits, 2)
    return router_logits.new_empty(router_logits.shape)


def _setup_context(
    ctx: Context, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: tuple[Tensor, Tensor]
) -> None:
    topk_ids = output[1]
    ctx.mark_non_differentiable(topk_ids)
    ctx.save_for_backward(inputs[0], topk_ids)
    names = ("score_function", "score_order", "renormalize", "routed_scaling_factor")
    ctx.options = {name: keyword_only_inputs[name] for name in names}


def _backward(ctx: Context, grad_topk_weights: Tensor, _: Tensor | None) -> tuple[Tensor, None, None]:
    router_logits, topk_ids = ctx.saved_tensors
    return torch.ops.moe.route_backward(grad_topk_weights, router_logits, topk_ids, **ctx.options), None, None


torch.library.register_autograd("moe::route", _backward, setup_context=_setup_context)
refuse_double_backward("route_backward")
