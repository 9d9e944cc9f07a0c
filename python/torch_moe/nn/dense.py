"""DenseFFN: one feed-forward network that every token passes, the shared experts of a layer."""

import torch
from torch import Tensor, nn

from torch_moe import ops
from torch_moe.ops.activation import is_gated


class DenseFFN(nn.Module):
    """``down_proj(activation(gate_up_proj(x)))`` with the activations of the experts.

    Parameters
    ----------
    hidden_size : int
        Width of a token.
    intermediate_size : int
        Width between the two projections.
    activation, gate_layout, alpha, limit, up_offset
        As in :func:`torch_moe.ops.activation`.
    bias : bool, default=False
        Add biases to both projections.
    device, dtype
        Of the parameters, which are initialised by ``torch.nn.Linear``.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: str = "swiglu",
        bias: bool = False,
        gate_layout: str = "concat",
        alpha: float = 1.0,
        limit: float | None = None,
        up_offset: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.gate_layout = gate_layout
        self.alpha = alpha
        self.limit = limit
        self.up_offset = up_offset
        pre_activation_size = intermediate_size * (2 if is_gated(activation) else 1)
        self.gate_up_proj = nn.Linear(hidden_size, pre_activation_size, bias=bias, device=device, dtype=dtype)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        self.gate_up_proj.reset_parameters()
        self.down_proj.reset_parameters()

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return a tensor of the shape of ``hidden_states`` (..., hidden_size)."""
        rows = self.gate_up_proj(hidden_states.reshape(-1, hidden_states.shape[-1]))
        rows = ops.activation(
            rows,
            self.activation,
            gate_layout=self.gate_layout,
            alpha=self.alpha,
            limit=self.limit,
            up_offset=self.up_offset,
        )
        output: Tensor = self.down_proj(rows)
        return output.view(hidden_states.shape)

    def extra_repr(self) -> str:
        """Return the activation."""
        return f"activation={self.activation}"
