"""TopKRouter: the linear map that scores experts, and the selection."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from torch_moe import ops
from torch_moe.nn._common import require as _require
from torch_moe.nn._common import uniform_by_fan_in_, without_autocast


class TopKRouter(nn.Module):
    """Score the experts for each token and choose ``top_k`` of them.

    The logits are computed in fp32 (fp64 if the input or the weight is), whatever the dtype of the input and also
    under autocast. ``weight`` starts uniform in ±1/sqrt(hidden_size), as in ``torch.nn.Linear``.

    Parameters
    ----------
    hidden_size : int
        Width of a token.
    num_experts : int
        Number of experts.
    top_k : int
        Experts per token.
    score_function, score_order, renormalize, routed_scaling_factor, num_groups, topk_groups
        As in :func:`torch_moe.ops.route`.
    expert_bias : bool, default=False
        Keep a buffer ``expert_bias`` of zeros, dtype float32, that steers the selection only. It is saved in the
        state_dict, gets no gradient, and stays float32 when the module is cast: its updates are too small for less.
    check_finite : bool, default=False
        Raise on NaN or infinite logits, instead of showing NaN in the weights.
    device, dtype
        Of the weight.

    Raises
    ------
    ValueError
        If a size or option is impossible, or would leave the router without a gradient: with ``top_k=1`` of several
        experts, a weight that is renormalised or a softmax over the selection is identically 1.
    """

    weight: nn.Parameter  # [E, H]
    expert_bias: Tensor | None  # [E]

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        score_function: str = "softmax",
        score_order: str = "score_then_topk",
        renormalize: bool = True,
        routed_scaling_factor: float = 1.0,
        expert_bias: bool = False,
        num_groups: int = 1,
        topk_groups: int = 1,
        check_finite: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require = partial(_require, "TopKRouter")
        functions, orders = ("softmax", "sigmoid"), ("score_then_topk", "topk_then_score")
        require(score_function in functions, f"score_function must be in {functions}, got {score_function!r}")
        require(score_order in orders, f"score_order must be in {orders}, got {score_order!r}")
        require(hidden_size >= 1, f"hidden_size must be at least 1, got {hidden_size}")
        require(num_experts >= 1, f"num_experts must be at least 1, got {num_experts}")
        require(1 <= top_k <= num_experts, f"top_k must be in [1, num_experts = {num_experts}], got {top_k}")
        divides = num_groups >= 1 and num_experts % num_groups == 0
        require(divides, f"num_groups must divide num_experts = {num_experts}, got {num_groups}")
        require(1 <= topk_groups <= num_groups, f"topk_groups must be in [1, {num_groups}], got {topk_groups}")
        eligible = topk_groups * (num_experts // num_groups)
        require(top_k <= eligible, f"top_k must be at most {eligible}, the experts of topk_groups, got {top_k}")
        constant = renormalize or (score_function == "softmax" and score_order == "topk_then_score")
        require(
            not (top_k == 1 and num_experts > 1 and constant),
            "top_k=1 needs renormalize=False and scores that are not a softmax over the selection: "
            "else the weight is identically 1 and the router gets no gradient",
        )
        self.hidden_size = hidden_size
        self.num_experts = num_experts
        self.top_k = top_k
        self.score_function = score_function
        self.score_order = score_order
        self.renormalize = renormalize
        self.routed_scaling_factor = routed_scaling_factor
        self.num_groups = num_groups
        self.topk_groups = topk_groups
        self.check_finite = check_finite
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, device=device, dtype=dtype))
        bias = torch.empty(num_experts, device=device, dtype=torch.float32) if expert_bias else None
        self.register_buffer("expert_bias", bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight anew, uniform in ±1/sqrt(hidden_size), and set the bias to zero."""
        uniform_by_fan_in_(self.weight, self.hidden_size)
        if self.expert_bias is not None:
            self.expert_bias.zero_()

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the logits, and each token's experts with their weights.

        Parameters
        ----------
        hidden_states : Tensor of shape (num_tokens, hidden_size), any floating dtype
            The tokens.

        Returns
        -------
        router_logits : Tensor of shape (num_tokens, num_experts), dtype=float32
            The linear map's output.
        topk_weights : Tensor of shape (num_tokens, top_k), dtype=float32
            The weights.
        topk_ids : Tensor of shape (num_tokens, top_k), dtype=int32
            The experts.
        """
        dtype = torch.promote_types(torch.promote_types(hidden_states.dtype, self.weight.dtype), torch.float32)
        with without_autocast(hidden_states.device.type):
            router_logits = functional.linear(hidden_states.to(dtype), self.weight.to(dtype))
        topk_weights, topk_ids = ops.route(
            router_logits,
            self.top_k,
            None if self.expert_bias is None else self.expert_bias.to(dtype),
            score_function=self.score_function,
            score_order=self.score_order,
            renormalize=self.renormalize,
            routed_scaling_factor=self.routed_scaling_factor,
            num_groups=self.num_groups,
            topk_groups=self.topk_groups,
            check_finite=self.check_finite,
        )
        return router_logits, topk_weights, topk_ids

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TopKRouter":
        bias = self.expert_bias
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        moved = self.expert_bias
        if bias is not None and moved is not None and moved.dtype != bias.dtype:
            self.expert_bias = bias.to(moved.device)
        return self

    def extra_repr(self) -> str:
        """Return sizes and options, those that differ from the plain softmax router last."""
        text = f"hidden_size={self.hidden_size}, num_experts={self.num_experts}, top_k={self.top_k}, "
        text += f"score_function={self.score_function}, score_order={self.score_order}, renormalize={self.renormalize}"
        if self.routed_scaling_factor != 1.0:
            text += f", routed_scaling_factor={self.routed_scaling_factor}"
        if self.num_groups > 1:
            text += f", num_groups={self.num_groups}, topk_groups={self.topk_groups}"
        if self.expert_bias is not None:
            text += ", expert_bias=True"
        return text
