"""What gives a router its logits: a linear map, what acts on tokens and logits around it, or a small network."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from torch_moe.config import RouterConfig
from torch_moe.nn._common import optional_parameter, require, uniform_by_fan_in_, without_autocast


class ProjectionMLP(nn.Module):
    """What comes before the last linear map of ``projection="mlp"``: a map, an RMS norm, two linear maps with GELU.

    Its state goes from layer to layer (ZAYA).
    """

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


class RouterProjection(nn.Module):
    """Tokens to logits: the first half of :class:`torch_moe.TopKRouter`, which documents the parameters."""

    weight: nn.Parameter  # [E + num_shared_sinks, H], or [.., projection_size] for the mlp
    bias: nn.Parameter | None  # [E + num_shared_sinks]
    input_scale: nn.Parameter | None  # [H]
    noise_weight: nn.Parameter | None  # [E + num_shared_sinks, H]
    mlp: ProjectionMLP | None

    def __init__(self, config: RouterConfig, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.config, self.hidden_size = config, config.hidden_size
        hidden, size, rows = config.hidden_size, config.projection_size, config.num_choices + config.num_shared_sinks
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        self.mlp = None if size is None else ProjectionMLP(hidden, size, config.projection_state, device, dtype)
        self.weight = nn.Parameter(torch.empty(rows, size or hidden, **like))
        self.register_parameter("bias", optional_parameter(config.projection_bias, rows, **like))
        self.register_parameter("input_scale", optional_parameter(config.input_norm, hidden, **like))
        self.register_parameter("noise_weight", optional_parameter(config.noisy, rows, hidden, **like))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the weight anew, uniform in ±1/sqrt of its columns; bias and noise start at 0, scales at 1."""
        uniform_by_fan_in_(self.weight, self.weight.shape[1])
        if self.mlp is not None:
            self.mlp.reset_parameters()
        for tensor, value in ((self.bias, 0.0), (self.noise_weight, 0.0), (self.input_scale, 1.0)):
            if tensor is not None:
                tensor.fill_(value)

    def noise(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Return what ``noisy`` adds noise to, and how much, for :func:`torch_moe.losses.load_loss`.

        Parameters
        ----------
        hidden_states : Tensor of shape (num_tokens, hidden_size), any floating dtype
            The tokens.

        Returns
        -------
        clean_logits : Tensor of shape (num_tokens, num_experts), dtype=float32 or float64
            The logits without noise.
        noise_std : Tensor of shape (num_tokens, num_experts), dtype=float32 or float64
            Standard deviation of the noise. Both are differentiable and have columns of zero experts, too.

        Raises
        ------
        ValueError
            If the router's logits in training are not these plus noise: without ``noisy``, with ``input_jitter`` or
            ``logit_softcap``.
        """
        config = self.config
        require(
            "TopKRouter",
            config.noisy and config.input_jitter == 0 and config.logit_softcap is None,
            "noise() needs noisy=True, input_jitter=0 and logit_softcap=None: others have no logits that are these "
            "plus noise",
        )
        x, dtype = self._widened(hidden_states)
        with without_autocast(hidden_states.device.type):
            x = self._seen(x)
            logits, _ = self._clean_logits(x, hidden_states.dtype, None)
            return logits[:, : config.num_choices].to(dtype), self._noise_std(x)[:, : config.num_choices]

    def _project(self, hidden_states: Tensor, router_state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the logits (num_tokens, num_experts + num_shared_sinks) in fp32, with jitter and noise in training."""
        x, dtype = self._widened(hidden_states)
        with without_autocast(hidden_states.device.type):
            x = self._seen(x)
            logits, state = self._clean_logits(x, hidden_states.dtype, router_state)
            logits = logits.to(dtype)
            if self.training and self.noise_weight is not None:
                logits = logits + torch.randn_like(logits) * self._noise_std(x)
        cap = self.config.logit_softcap
        return (logits if cap is None else cap * torch.tanh(logits / cap)), state

    def _widened(self, hidden_states: Tensor) -> tuple[Tensor, torch.dtype]:
        """Return the tokens in the dtype of the router's arithmetic, and that: fp32, or fp64 where any is."""
        dtype = torch.promote_types(torch.promote_types(hidden_states.dtype, self.weight.dtype), torch.float32)
        return hidden_states.to(dtype), dtype

    def _seen(self, x: Tensor) -> Tensor:
        """Return what the projection is given of the tokens."""
        config = self.config
        if self.input_scale is not None:
            normed = functional.rms_norm(x, x.shape[-1:], eps=1e-6)
            x = normed * self.input_scale.to(x.dtype) / math.sqrt(self.hidden_size)
        if self.training and config.input_jitter > 0:
            x = x * torch.empty_like(x).uniform_(1 - config.input_jitter, 1 + config.input_jitter)
        return x

    def _clean_logits(
        self, x: Tensor, input_dtype: torch.dtype, router_state: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        dtype = input_dtype if self.config.projection_dtype == "input" else x.dtype
        features, state = x.to(dtype), None
        if self.mlp is not None:
            features, state = self.mlp(features, router_state)
        bias = None if self.bias is None else self.bias.to(dtype)
        return functional.linear(features, self.weight.to(dtype), bias), state

    def _noise_std(self, x: Tensor) -> Tensor:
        assert self.noise_weight is not None
        return functional.softplus(functional.linear(x, self.noise_weight.to(x.dtype)))
