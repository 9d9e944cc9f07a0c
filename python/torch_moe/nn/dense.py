"""DenseFFN: one feed-forward network that every token passes; SharedExperts: the same beside experts, perhaps gated."""

import torch
from torch import Tensor, nn

from torch_moe.config import ExpertsConfig, SharedExpertsConfig
from torch_moe.nn._common import activate


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
    limit_position
        As in :class:`torch_moe.ExpertsConfig`.
    bias : bool, default=False
        Add biases to both projections.
    device, dtype
        Of the parameters, which are initialised by ``torch.nn.Linear``.

    Raises
    ------
    ValueError
        If a size or option is impossible: see :class:`torch_moe.ExpertsConfig`.
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
        limit_position: str = "before",
        up_offset: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        config = ExpertsConfig(
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_experts=1,
            activation=activation,
            gate_layout=gate_layout,  # type: ignore[arg-type]  # the config checks the words
            alpha=alpha,
            limit=limit,
            limit_position=limit_position,  # type: ignore[arg-type]
            up_offset=up_offset,
        )
        self.activation = activation
        self.gate_layout = gate_layout
        self.alpha = alpha
        self.limit = limit
        self.limit_position = limit_position
        self.up_offset = up_offset
        self.gate_up_proj = nn.Linear(hidden_size, config.pre_activation_size, bias=bias, device=device, dtype=dtype)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        self.gate_up_proj.reset_parameters()
        self.down_proj.reset_parameters()

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Apply the network to each token.

        Parameters
        ----------
        hidden_states : Tensor of shape (..., hidden_size)
            The tokens, in the dtype of the parameters.

        Returns
        -------
        Tensor of shape (..., hidden_size), same dtype
            Its outputs.
        """
        rows = self._activate(self.gate_up_proj(hidden_states.reshape(-1, hidden_states.shape[-1])))
        output: Tensor = self.down_proj(rows)
        return output.view(hidden_states.shape)

    def _activate(self, rows: Tensor) -> Tensor:
        return activate(
            rows,
            self.activation,
            gate_layout=self.gate_layout,
            alpha=self.alpha,
            limit=self.limit,
            up_offset=self.up_offset,
            limit_position=self.limit_position,
        )

    def extra_repr(self) -> str:
        """Return the activation."""
        return f"activation={self.activation}"


class SharedExperts(DenseFFN):
    """The shared experts of a layer: one dense network, weighed as the config's ``gate`` says.

    Parameters
    ----------
    config : SharedExpertsConfig
        Sizes and options.
    device, dtype
        Of the parameters.
    """

    gate: nn.Linear | None

    def __init__(
        self,
        config: SharedExpertsConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            config.hidden_size,
            config.intermediate_size,
            activation=config.activation,
            bias=config.bias,
            gate_layout=config.gate_layout,
            alpha=config.alpha,
            limit=config.limit,
            limit_position=config.limit_position,
            up_offset=config.up_offset,
            device=device,
            dtype=dtype,
        )
        self.is_weighed = config.gate == "router"
        gated = config.gate == "sigmoid"
        self.gate = nn.Linear(config.hidden_size, 1, bias=False, device=device, dtype=dtype) if gated else None

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        super().reset_parameters()
        if self.gate is not None:
            self.gate.reset_parameters()

    def forward(self, hidden_states: Tensor, shared_weights: Tensor | None = None) -> Tensor:
        """Apply the shared experts to each token.

        Parameters
        ----------
        hidden_states : Tensor of shape (..., hidden_size)
            The tokens, in the dtype of the parameters.
        shared_weights : Tensor of shape (..., num_shared_sinks), default=None
            The router's weights of the shared experts, for ``gate="router"``.

        Returns
        -------
        Tensor of shape (..., hidden_size), same dtype
            Their outputs, weighed as the config's ``gate`` says.

        Raises
        ------
        ValueError
            If ``gate="router"`` and there are no ``shared_weights``.
        """
        if self.is_weighed:
            if shared_weights is None:
                raise ValueError('SharedExperts: gate="router" needs shared_weights, got None')
            rows = self._activate(self.gate_up_proj(hidden_states))
            parts = rows.view(*shared_weights.shape, -1) * shared_weights.unsqueeze(-1)
            weighed: Tensor = self.down_proj(parts.flatten(-2).to(rows.dtype))
            return weighed
        output = super().forward(hidden_states)
        return output if self.gate is None else output * torch.sigmoid(self.gate(hidden_states))
