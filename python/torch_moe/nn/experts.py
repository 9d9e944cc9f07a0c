"""Experts: the feed-forward networks of all experts, as two stacked weights."""

from dataclasses import asdict

import torch
from torch import Tensor, nn
from torch.nn import functional

from torch_moe import ops
from torch_moe.config import ExpertsConfig
from torch_moe.nn._common import activate, empty_on_large_pages, uniform_by_fan_in_


class Experts(nn.Module):
    """``num_experts`` feed-forward networks, gated or not, without the router.

    Parameters are drawn as in ``torch.nn.Linear``, uniform in ±1/sqrt(fan_in), expert by expert: ``gate_up_proj``,
    ``gate_up_proj_bias``, ``down_proj``, ``down_proj_bias`` of expert 0, then of expert 1. From one seed, the first
    experts are therefore the same for any ``num_experts``, and all are the same function in either weight layout.

    Parameters
    ----------
    hidden_size : int
        Width of a token.
    intermediate_size : int
        Width between the two projections.
    num_experts : int
        Number of experts.
    activation : str, default="swiglu"
        As in :func:`torch_moe.ops.activation`; a gated one doubles the rows of ``gate_up_proj``.
    bias : bool, default=False
        Add biases to both projections.
    gate_layout, alpha, limit, up_offset
        As in :func:`torch_moe.ops.activation`.
    limit_position, weight_layout, weight_position, recompute, accumulate, dropout, expert_dropout
        As in :class:`torch_moe.ExpertsConfig`.
    device, dtype
        Of the parameters.

    Raises
    ------
    ValueError
        If a size or option is impossible: see :class:`torch_moe.ExpertsConfig`.
    """

    gate_up_proj: nn.Parameter
    down_proj: nn.Parameter
    gate_up_proj_bias: nn.Parameter | None
    down_proj_bias: nn.Parameter | None

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        *,
        activation: str = "swiglu",
        bias: bool = False,
        gate_layout: str = "concat",
        weight_layout: str = "out_in",
        alpha: float = 1.0,
        limit: float | None = None,
        limit_position: str = "before",
        up_offset: float = 0.0,
        weight_position: str = "output",
        recompute: bool = False,
        accumulate: bool = False,
        dropout: float = 0.0,
        expert_dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = ExpertsConfig(
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_experts=num_experts,
            activation=activation,
            bias=bias,
            gate_layout=gate_layout,  # type: ignore[arg-type]  # the config checks the words
            weight_layout=weight_layout,  # type: ignore[arg-type]
            alpha=alpha,
            limit=limit,
            limit_position=limit_position,  # type: ignore[arg-type]
            up_offset=up_offset,
            weight_position=weight_position,  # type: ignore[arg-type]
            recompute=recompute,
            accumulate=accumulate,
            dropout=dropout,
            expert_dropout=expert_dropout,
        )
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_experts = num_experts
        self.activation = activation
        self.gate_layout = gate_layout
        self.weight_layout = weight_layout
        self.alpha = alpha
        self.limit = limit
        self.limit_position = limit_position
        self.up_offset = up_offset
        self.weight_position = weight_position
        self.recompute = recompute
        self.accumulate = accumulate
        self.dropout = dropout
        self.expert_dropout = expert_dropout

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(empty_on_large_pages(num_experts, *shape, device=device, dtype=dtype))

        pre_activation_size = self.config.pre_activation_size
        gate_up, down = (pre_activation_size, hidden_size), (hidden_size, intermediate_size)
        transposed = weight_layout == "in_out"
        self.gate_up_proj = parameter(*(gate_up[::-1] if transposed else gate_up))
        self.down_proj = parameter(*(down[::-1] if transposed else down))
        self.register_parameter("gate_up_proj_bias", parameter(pre_activation_size) if bias else None)
        self.register_parameter("down_proj_bias", parameter(hidden_size) if bias else None)
        self.reset_parameters()

    @classmethod
    def from_config(
        cls, config: ExpertsConfig, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "Experts":
        """Return the experts of ``config``."""
        return cls(**asdict(config), device=device, dtype=dtype)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all parameters anew by the rule of the class."""
        for expert in range(self.num_experts):
            for weight, bias, fan_in in (
                (self.gate_up_proj, self.gate_up_proj_bias, self.hidden_size),
                (self.down_proj, self.down_proj_bias, self.intermediate_size),
            ):
                out_in = weight[expert].T if self.weight_layout == "in_out" else weight[expert]
                drawn = torch.empty_like(out_in, memory_format=torch.contiguous_format)
                uniform_by_fan_in_(drawn, fan_in)
                out_in.copy_(drawn)
                if bias is not None:
                    uniform_by_fan_in_(bias[expert], fan_in)

    def forward(self, hidden_states: Tensor, topk_weights: Tensor, plan: ops.Plan | Tensor) -> Tensor:
        """Send each token through its experts and sum by weight.

        Parameters
        ----------
        hidden_states : Tensor of shape (num_tokens, hidden_size)
            The tokens, in the dtype of the parameters.
        topk_weights : Tensor of shape (num_tokens, top_k), dtype=float32
            The weight of each token's experts.
        plan : Plan, or Tensor of shape (num_tokens, top_k), dtype=int32
            What :func:`torch_moe.ops.plan` returned for these tokens, or their ``topk_ids``.

        Returns
        -------
        Tensor of shape (num_tokens, hidden_size)
            The weighted sums.
        """
        if self.training and self.expert_dropout > 0:
            topk_weights = functional.dropout(topk_weights, self.expert_dropout)
        if self.weight_position == "input":
            # Every slot becomes a token of its own, already multiplied; slots have the same numbers in both plans.
            slots = (hidden_states.unsqueeze(1) * topk_weights.unsqueeze(-1).to(hidden_states.dtype)).flatten(0, 1)
            made = self._plan(plan)
            each = made._replace(slot_to_row=made.slot_to_row.reshape(-1, 1))
            outputs = self._apply_experts(slots, torch.ones_like(topk_weights).reshape(-1, 1), each)
            return outputs.view(*topk_weights.shape, -1).sum(dim=1)
        return self._apply_experts(hidden_states, topk_weights, plan)

    def _apply_experts(self, hidden_states: Tensor, topk_weights: Tensor, plan: ops.Plan | Tensor) -> Tensor:
        if (self.training and self.dropout > 0) or self.limit_position == "after":
            return self._apply_stages(hidden_states, topk_weights, self._plan(plan))
        return ops.experts(
            hidden_states,
            self.gate_up_proj,
            self.down_proj,
            topk_weights,
            plan,
            self.gate_up_proj_bias,
            self.down_proj_bias,
            activation=self.activation,
            gate_layout=self.gate_layout,
            weight_layout=self.weight_layout,
            alpha=self.alpha,
            limit=self.limit,
            up_offset=self.up_offset,
            recompute=self.recompute,
            accumulate=self.accumulate,
        )

    def _plan(self, plan: ops.Plan | Tensor) -> ops.Plan:
        return ops.plan(plan, self.num_experts) if isinstance(plan, Tensor) else plan

    def _apply_stages(self, hidden_states: Tensor, topk_weights: Tensor, plan: ops.Plan) -> Tensor:
        """Run the stages one by one, because nothing enters the fused operator between its two products."""
        offsets, layout = plan.expert_offsets, self.weight_layout
        rows = ops.permute(hidden_states, plan)
        rows = ops.grouped_gemm(rows, self.gate_up_proj, offsets, self.gate_up_proj_bias, layout)
        rows = activate(
            rows,
            self.activation,
            gate_layout=self.gate_layout,
            alpha=self.alpha,
            limit=self.limit,
            up_offset=self.up_offset,
            limit_position=self.limit_position,
        )
        rows = functional.dropout(rows, self.dropout, self.training)
        rows = ops.grouped_gemm(rows, self.down_proj, offsets, self.down_proj_bias, layout)
        return ops.combine(rows, topk_weights, plan)

    def extra_repr(self) -> str:
        """Return sizes and options."""
        text = f"hidden_size={self.hidden_size}, intermediate_size={self.intermediate_size}, "
        text += f"num_experts={self.num_experts}, activation={self.activation}, "
        text += f"bias={self.gate_up_proj_bias is not None}, gate_layout={self.gate_layout}, "
        text += f"weight_layout={self.weight_layout}"
        if (self.alpha, self.limit, self.up_offset) != (1.0, None, 0.0):
            text += f", alpha={self.alpha}, limit={self.limit}, up_offset={self.up_offset}"
        if self.limit_position == "after":
            text += ", limit_position=after"
        if self.dropout > 0:
            text += f", dropout={self.dropout}"
        if self.expert_dropout > 0:
            text += f", expert_dropout={self.expert_dropout}"
        text += ", weight_position=input" if self.weight_position == "input" else ""
        text += ", recompute=True" if self.recompute else ""
        return text + (", accumulate=True" if self.accumulate else "")
