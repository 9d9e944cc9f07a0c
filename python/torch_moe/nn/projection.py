"""The logits' network of ZAYA's router, with a state that goes from layer to layer."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class ProjectionMLP(nn.Module):
    """What comes before the last linear map of ``projection="mlp"``: a map, an RMS norm, two linear maps with GELU."""

    state_scale: nn.Parameter | None  # [size]

    def __init__(
        self, hidden_size: int, size: int, state: bool, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.down = nn.Linear(hidden_size, size, **options)
        self.norm = nn.RMSNorm(size, eps=1e-5, **options)
        self.fc1, self.fc2 = nn.Linear(size, size, **options), nn.Linear(size, size, **options)
        self.register_parameter("state_scale", nn.Parameter(torch.ones(size, **options)) if state else None)

    def reset_parameters(self) -> None:
        """Draw all parameters anew; the scales start at 1."""
        for part in (self.down, self.norm, self.fc1, self.fc2):
            part.reset_parameters()
        if self.state_scale is not None:
            nn.init.ones_(self.state_scale)

    def forward(self, x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return features (num_tokens, size) and this layer's state of the same shape, in the dtype of ``x``."""

        def linear(part: nn.Linear, rows: Tensor) -> Tensor:
            return functional.linear(rows, part.weight.to(x.dtype), part.bias.to(x.dtype))

        own = linear(self.down, x)
        if state is not None and self.state_scale is not None:
            own = own + state.to(x.dtype) * self.state_scale.to(x.dtype)
        rows = functional.rms_norm(own, own.shape[-1:], self.norm.weight.to(x.dtype), self.norm.eps)
        return functional.gelu(linear(self.fc2, functional.gelu(linear(self.fc1, rows)))), own
