"""Experts: the feed-forward networks of all experts, as two stacked weights."""

import torch
from torch import Tensor, nn

from torch_moe import ops
from torch_moe.nn._common import require, uniform_by_fan_in_
from torch_moe.ops.activation import GATED_ACTIVATIONS, UNGATED_ACTIVATIONS, is_gated


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
    weight_layout : {"out_in", "in_out"}, default="out_in"
        ``gate_up_proj`` is (num_experts, 2 * intermediate_size, hidden_size) and ``down_proj`` (num_experts,
        hidden_size, intermediate_size); ``"in_out"`` swaps the last two dimensions of both.
    recompute : bool, default=False
        Keep no pre-activation for the backward; it is computed again.
    device, dtype
        Of the parameters.

    Raises
    ------
    ValueError
        If a size is less than 1 or an option is unknown.
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
        up_offset: float = 0.0,
        recompute: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {"hidden_size": hidden_size, "intermediate_size": intermediate_size, "num_experts": num_experts}
        for name, size in sizes.items():
            require("Experts", size >= 1, f"{name} must be at least 1, got {size}")
        names = GATED_ACTIVATIONS + UNGATED_ACTIVATIONS
        require("Experts", activation in names, f"activation must be in {names}, got {activation!r}")
        layouts = ("concat", "interleaved")
        require("Experts", gate_layout in layouts, f"gate_layout must be in {layouts}, got {gate_layout!r}")
        layouts = ("out_in", "in_out")
        require("Experts", weight_layout in layouts, f"weight_layout must be in {layouts}, got {weight_layout!r}")
        require("Experts", limit is None or limit > 0, f"limit must be positive or None, got {limit}")
        plain = (alpha, limit, up_offset) == (1.0, None, 0.0)
        require(
            "Experts", plain or activation == "swiglu", f"alpha, limit and up_offset shape swiglu, not {activation}"
        )
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_experts = num_experts
        self.activation = activation
        self.gate_layout = gate_layout
        self.weight_layout = weight_layout
        self.alpha = alpha
        self.limit = limit
        self.up_offset = up_offset
        self.recompute = recompute

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(num_experts, *shape, device=device, dtype=dtype))

        pre_activation_size = intermediate_size * (2 if is_gated(activation) else 1)
        gate_up, down = (pre_activation_size, hidden_size), (hidden_size, intermediate_size)
        transposed = weight_layout == "in_out"
        self.gate_up_proj = parameter(*(gate_up[::-1] if transposed else gate_up))
        self.down_proj = parameter(*(down[::-1] if transposed else down))
        self.register_parameter("gate_up_proj_bias", parameter(pre_activation_size) if bias else None)
        self.register_parameter("down_proj_bias", parameter(hidden_size) if bias else None)
        self.reset_parameters()

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

    def forward(self, hidden_states: Tensor, topk_weights: Tensor, plan: ops.Plan) -> Tensor:
        """Send each token through its experts and sum by weight.

        Parameters
        ----------
        hidden_states : Tensor of shape (num_tokens, hidden_size)
            The tokens, in the dtype of the parameters.
        topk_weights : Tensor of shape (num_tokens, top_k), dtype=float32
            The weight of each token's experts.
        plan : Plan
            What :func:`torch_moe.ops.plan` returned for these tokens.

        Returns
        -------
        Tensor of shape (num_tokens, hidden_size)
            The weighted sums.
        """
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
        )

    def extra_repr(self) -> str:
        """Return sizes and options."""
        text = f"hidden_size={self.hidden_size}, intermediate_size={self.intermediate_size}, "
        text += f"num_experts={self.num_experts}, activation={self.activation}, "
        text += f"bias={self.gate_up_proj_bias is not None}, gate_layout={self.gate_layout}, "
        text += f"weight_layout={self.weight_layout}"
        if (self.alpha, self.limit, self.up_offset) != (1.0, None, 0.0):
            text += f", alpha={self.alpha}, limit={self.limit}, up_offset={self.up_offset}"
        return text + (", recompute=True" if self.recompute else "")
