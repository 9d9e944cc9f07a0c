"""MoE: router, experts and combine as one layer."""

import math
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor, nn

from torch_moe import ops
from torch_moe.nn._common import require
from torch_moe.nn.dense import DenseFFN
from torch_moe.nn.experts import Experts
from torch_moe.nn.router import TopKRouter


class Routing(NamedTuple):
    """What the router decided.

    Attributes
    ----------
    router_logits : Tensor of shape (num_tokens, num_experts), dtype=float32
        The logits, differentiable: auxiliary losses start here.
    topk_ids : Tensor of shape (num_tokens, top_k), dtype=int32
        Each token's experts.
    topk_weights : Tensor of shape (num_tokens, top_k), dtype=float32
        Their weights.
    tokens_per_expert : Tensor of shape (num_experts,), dtype=int32
        The load, slots dropped by capacity not counted.
    """

    router_logits: Tensor
    topk_ids: Tensor
    topk_weights: Tensor
    tokens_per_expert: Tensor


class MoE(nn.Module):
    """A Mixture-of-Experts layer: each token goes through ``top_k`` of ``num_experts`` feed-forward networks.

    1. ``router`` gives every token ``top_k`` experts and their weights;
    2. ``plan`` sorts the tokens by expert;
    3. ``experts`` computes each expert on its tokens and sums by weight;
    4. ``shared_experts``, if any, is added for every token.

    Parameters
    ----------
    hidden_size : int
        Width of a token.
    intermediate_size : int
        Width of one expert.
    num_experts : int
        Number of experts.
    top_k : int
        Experts per token.
    score_function, score_order, renormalize, routed_scaling_factor, expert_bias, num_groups, topk_groups, check_finite
        As in :class:`TopKRouter`.
    activation, bias, gate_layout, weight_layout, alpha, limit, up_offset, recompute
        As in :class:`Experts`.
    num_shared_experts : int, default=0
        Experts that every token passes; together one :class:`DenseFFN` of ``num_shared_experts * intermediate_size``.
    shared_intermediate_size : int, default=None
        That width itself, in place of ``num_shared_experts``.
    capacity_factor : float, default=None
        An expert takes at most ``ceil(capacity_factor * num_tokens * top_k / num_experts)`` slots, the earliest; the
        others add nothing to their tokens. None drops nothing.
    device, dtype
        Of the parameters.

    Raises
    ------
    ValueError
        If a size or option is impossible.

    Examples
    --------
    >>> layer = MoE(hidden_size=64, intermediate_size=128, num_experts=8, top_k=2)
    >>> layer(torch.randn(4, 16, 64)).shape
    torch.Size([4, 16, 64])
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
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
        activation: str = "swiglu",
        bias: bool = False,
        gate_layout: str = "concat",
        weight_layout: str = "out_in",
        alpha: float = 1.0,
        limit: float | None = None,
        up_offset: float = 0.0,
        recompute: bool = False,
        num_shared_experts: int = 0,
        shared_intermediate_size: int | None = None,
        capacity_factor: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require("MoE", num_shared_experts >= 0, f"num_shared_experts must not be negative, got {num_shared_experts}")
        require(
            "MoE",
            shared_intermediate_size is None or (num_shared_experts == 0 and shared_intermediate_size >= 1),
            "give either num_shared_experts or shared_intermediate_size >= 1, got "
            f"{num_shared_experts} and {shared_intermediate_size}",
        )
        positive = capacity_factor is None or 0 < capacity_factor < math.inf
        require("MoE", positive, f"capacity_factor must be positive, or None for no limit, got {capacity_factor}")
        self.capacity_factor = capacity_factor
        self.router = TopKRouter(
            hidden_size,
            num_experts,
            top_k,
            score_function=score_function,
            score_order=score_order,
            renormalize=renormalize,
            routed_scaling_factor=routed_scaling_factor,
            expert_bias=expert_bias,
            num_groups=num_groups,
            topk_groups=topk_groups,
            check_finite=check_finite,
            device=device,
            dtype=dtype,
        )
        self.experts = Experts(
            hidden_size,
            intermediate_size,
            num_experts,
            activation=activation,
            bias=bias,
            gate_layout=gate_layout,
            weight_layout=weight_layout,
            alpha=alpha,
            limit=limit,
            up_offset=up_offset,
            recompute=recompute,
            device=device,
            dtype=dtype,
        )
        shared_size = shared_intermediate_size or num_shared_experts * intermediate_size
        self.shared_experts = None
        if shared_size > 0:
            self.shared_experts = DenseFFN(
                hidden_size,
                shared_size,
                activation=activation,
                bias=bias,
                gate_layout=gate_layout,
                alpha=alpha,
                limit=limit,
                up_offset=up_offset,
                device=device,
                dtype=dtype,
            )

    def reset_parameters(self) -> None:
        """Draw all parameters anew: the router's, the experts', the shared experts'."""
        self.router.reset_parameters()
        self.experts.reset_parameters()
        if self.shared_experts is not None:
            self.shared_experts.reset_parameters()

    @overload
    def forward(self, hidden_states: Tensor, return_routing: Literal[False] = ...) -> Tensor: ...
    @overload
    def forward(self, hidden_states: Tensor, return_routing: Literal[True]) -> tuple[Tensor, Routing]: ...

    def forward(self, hidden_states: Tensor, return_routing: bool = False) -> Tensor | tuple[Tensor, Routing]:
        """Apply the layer.

        Parameters
        ----------
        hidden_states : Tensor of shape (..., hidden_size)
            The tokens.
        return_routing : bool, default=False
            Also return the :class:`Routing`.

        Returns
        -------
        Tensor of shape (..., hidden_size), or that and a Routing
            The outputs.
        """
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])  # [T, H]
        router_logits, topk_weights, topk_ids = self.router(tokens)
        plan = ops.plan(topk_ids, self.router.num_experts, self.capacity(tokens.shape[0]))
        output: Tensor = self.experts(tokens, topk_weights, plan)
        if self.shared_experts is not None:
            output = output + self.shared_experts(tokens)
        output = output.view(hidden_states.shape)
        if not return_routing:
            return output
        return output, Routing(router_logits, topk_ids, topk_weights, plan.tokens_per_expert)

    def capacity(self, num_tokens: int) -> int | None:
        """Return the slots an expert takes at most of ``num_tokens`` tokens, or None for all."""
        if self.capacity_factor is None:
            return None
        return math.ceil(self.capacity_factor * num_tokens * self.router.top_k / self.router.num_experts)

    def extra_repr(self) -> str:
        """Return the options that belong to no part of the layer."""
        return "" if self.capacity_factor is None else f"capacity_factor={self.capacity_factor}"
