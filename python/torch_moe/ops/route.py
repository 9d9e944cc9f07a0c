"""route: which experts, with what weight."""

from typing import Any

import torch
from torch import Tensor

from torch_moe.ops._common import Context, Options, check_rank, refuse_double_backward, register_autograd, register_fake


def route(
    router_logits: Tensor,
    top_k: int,
    expert_bias: Tensor | None = None,
    route_override: Tensor | None = None,
    *,
    score_function: str = "softmax",
    score_order: str = "score_then_topk",
    renormalize: bool = True,
    renormalize_p: float = 1.0,
    renormalize_eps: float = 1e-20,
    renormalize_eps_mode: str = "add",
    routed_scaling_factor: float = 1.0,
    num_groups: int = 1,
    topk_groups: int = 1,
    group_score: str = "top2_sum",
    group_mask: str = "-inf",
    check_finite: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""Choose ``top_k`` experts per token and weigh them.

    With scores :math:`v = \mathrm{softmax}(z)`, :math:`\mathrm{sigmoid}(z)` or :math:`\sqrt{\mathrm{softplus}(z)}`,
    the chosen ids :math:`S` give the weights :math:`w = v_S` (``score_then_topk``) or the same function of :math:`z_S`
    alone (``topk_then_score``), divided by :math:`(\sum_S w^p)^{1/p}` with ``renormalize``, times
    ``routed_scaling_factor``. Arithmetic is fp32 (fp64 for fp64
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
    route_override : Tensor of shape (num_tokens, top_k), dtype=int32, default=None
        Take these ids instead of choosing any: replay, fixed tables, selections made elsewhere. The weights are those
        the logits give to these ids; an id outside ``[0, num_experts)`` weighs 0 and its slot is dropped later.
    score_function : {"softmax", "sigmoid", "sqrtsoftplus"}, default="softmax"
        The score of an expert.
    score_order : {"score_then_topk", "topk_then_score"}, default="score_then_topk"
        Whether scores are taken over all experts before the selection, or over the selected after it.
    renormalize : bool, default=True
        Divide the weights by their sum.
    renormalize_p : float, default=1.0
        By their :math:`L_p` norm instead.
    renormalize_eps : float, default=1e-20
        What keeps the divisor from zero.
    renormalize_eps_mode : {"add", "clamp"}, default="add"
        Whether ``renormalize_eps`` is added to the divisor or is its least value.
    routed_scaling_factor : float, default=1.0
        Multiplies the weights.
    num_groups : int, default=1
        Equal runs of experts that are selected first.
    topk_groups : int, default=1
        Groups that stay eligible.
    group_score : {"top2_sum", "max"}, default="top2_sum"
        What a group is selected by: the sum of its two best candidates, or the best.
    group_mask : {"-inf", "zero"}, default="-inf"
        What the candidates of the other groups become. Zero beats a negative candidate, so that an expert of such a
        group can be chosen; some checkpoints were trained so.
    check_finite : bool, default=False
        Raise if a logit is NaN or infinite. Unchecked, NaN is never preferred: the ids stay ``top_k`` distinct
        experts, and NaN shows in the weights. On a GPU the check waits for the device, and a call with it cannot be
        captured in a CUDA graph.

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
    arXiv 2101.03961 (Switch), 2401.04088 (Mixtral), 2405.04434 (DeepSeek-V2: groups), 2412.19437 (DeepSeek-V3:
    sigmoid, bias), 2510.11370 (replay).
    """
    topk_weights, topk_ids = torch.ops.moe.route(
        router_logits,
        top_k,
        expert_bias,
        route_override,
        score_function=score_function,
        score_order=score_order,
        renormalize=renormalize,
        renormalize_p=renormalize_p,
        renormalize_eps=renormalize_eps,
        renormalize_eps_mode=renormalize_eps_mode,
        routed_scaling_factor=routed_scaling_factor,
        num_groups=num_groups,
        topk_groups=topk_groups,
        group_score=group_score,
        group_mask=group_mask,
        check_finite=check_finite,
    )
    return topk_weights, topk_ids


@register_fake("route")
def _(
    router_logits: Tensor,
    top_k: int,
    expert_bias: Tensor | None = None,
    route_override: Tensor | None = None,
    **options: Options,
) -> tuple[Tensor, Tensor]:
    check_rank("route", "router_logits", router_logits, 2)
    shape = (router_logits.shape[0], top_k)
    weight_dtype = torch.promote_types(router_logits.dtype, torch.float32)
    return router_logits.new_empty(shape, dtype=weight_dtype), router_logits.new_empty(shape, dtype=torch.int32)


@register_fake("route_backward")
def _(grad_topk_weights: Tensor, router_logits: Tensor, topk_ids: Tensor, **options: Options) -> Tensor:
    check_rank("route_backward", "router_logits", router_logits, 2)
    return router_logits.new_empty(router_logits.shape)


# The options that a weight depends on once the ids are chosen.
_DIFFERENTIATED = (
    "score_function",
    "score_order",
    "renormalize",
    "renormalize_p",
    "renormalize_eps",
    "renormalize_eps_mode",
    "routed_scaling_factor",
)


def _setup_context(
    ctx: Context, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: tuple[Tensor, Tensor]
) -> None:
    topk_ids = output[1]
    ctx.mark_non_differentiable(topk_ids)
    ctx.save_for_backward(inputs[0], topk_ids)
    ctx.options = {name: keyword_only_inputs[name] for name in _DIFFERENTIATED}


def _backward(ctx: Context, grad_topk_weights: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    router_logits, topk_ids = ctx.saved_tensors
    grad = torch.ops.moe.route_backward(grad_topk_weights, router_logits, topk_ids, **ctx.options)
    return grad, None, None, None


register_autograd("route", _backward, setup_context=_setup_context)
refuse_double_backward("route_backward")
