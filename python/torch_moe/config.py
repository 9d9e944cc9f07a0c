"""Every MoE layer that can be built, as frozen data: what contradicts itself is refused when it is written down."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch_moe._checked import Checked
from torch_moe.ops.activation import GATED_ACTIVATIONS, UNGATED_ACTIVATIONS, is_gated
from torch_moe.router_config import RouterConfig

__all__ = ["ExpertsConfig", "MoEConfig", "RouterConfig", "SharedExpertsConfig"]


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig(Checked):
    """What the experts compute.

    Parameters
    ----------
    hidden_size : int
        Width of a token.
    intermediate_size : int
        Width between the two projections.
    num_experts : int
        Number of experts.
    activation, gate_layout, alpha, limit, up_offset
        As in :func:`torch_moe.ops.activation`.
    limit_position : {"before", "after"}, default="before"
        Whether ``limit`` bounds the gate before its activation or after it (Step-3.7).
    bias : bool, default=False
        Add biases to both projections.
    weight_layout : {"out_in", "in_out"}, default="out_in"
        ``gate_up_proj`` is (num_experts, 2 * intermediate_size, hidden_size) and ``down_proj`` (num_experts,
        hidden_size, intermediate_size); ``"in_out"`` swaps the last two dimensions of both.
    weight_position : {"output", "input"}, default="output"
        Whether a token's weight multiplies what the expert returns or what it is given (Llama-4).
    recompute : bool, default=False
        Keep no pre-activation for the backward; it is computed again.
    accumulate : bool, default=False
        Add the projections' gradients to their ``.grad`` in place, as in :func:`torch_moe.ops.experts`.
    dropout : float, default=0.0
        In training, zero each intermediate value inside an expert with this probability and divide the others by its
        complement. Switch fine-tunes with 0.4. The stages then run one by one and keep what lies between them.
    expert_dropout : float, default=0.0
        In training, skip each chosen expert of a token with this probability and divide the weights of the others by
        its complement. With either kind, the output's expectation over what is dropped is that of evaluation.

    Raises
    ------
    ValueError
        If a size is less than 1, an option is unknown, or ``dropout`` is to go with ``recompute``.

    References
    ----------
    arXiv 2101.03961, section 2.4 (dropout inside experts).
    """

    hidden_size: int
    intermediate_size: int
    num_experts: int
    activation: str = "swiglu"
    bias: bool = False
    gate_layout: Literal["concat", "interleaved"] = "concat"
    weight_layout: Literal["out_in", "in_out"] = "out_in"
    alpha: float = 1.0
    limit: float | None = None
    limit_position: Literal["before", "after"] = "before"
    up_offset: float = 0.0
    weight_position: Literal["output", "input"] = "output"
    recompute: bool = False
    accumulate: bool = False
    dropout: float = 0.0
    expert_dropout: float = 0.0

    @property
    def pre_activation_size(self) -> int:
        """Return the width of the first projection: 2I when gated, else I."""
        return self.intermediate_size * (2 if is_gated(self.activation) else 1)

    def _check(self) -> None:
        self._require_at_least_1("hidden_size", "intermediate_size", "num_experts")
        names = GATED_ACTIVATIONS + UNGATED_ACTIVATIONS
        self._require(self.activation in names, f"activation must be in {names}, got {self.activation!r}")
        limited = self.limit is None or 0 < self.limit < math.inf
        self._require(limited, f"limit must be positive and finite, or None, got {self.limit}")
        for name in ("alpha", "up_offset"):
            self._require(math.isfinite(getattr(self, name)), f"{name} must be finite, got {getattr(self, name)}")
        plain = (self.alpha, self.limit, self.up_offset) == (1.0, None, 0.0)
        self._require(
            plain or self.activation == "swiglu", f"alpha, limit and up_offset shape swiglu, not {self.activation}"
        )
        self._require_default_unless(self.limit is not None, "limit", "limit_position")
        self._require(
            self.limit_position == "before" or (self.alpha, self.up_offset, self.recompute) == (1.0, 0.0, False),
            'limit_position="after" needs alpha=1.0, up_offset=0.0 and recompute=False',
        )
        for name in ("dropout", "expert_dropout"):
            self._require(0 <= getattr(self, name) < 1, f"{name} must be in [0, 1), got {getattr(self, name)}")
        self._require(
            self.dropout == 0 or not self.recompute,
            f"dropout={self.dropout} keeps what recompute=True would not: use torch.utils.checkpoint instead",
        )
        self._require(
            self.expert_dropout == 0 or self.weight_position == "output",
            f'expert_dropout={self.expert_dropout} scales the weights, which weight_position="input" feeds through the '
            'activation: set weight_position="output"',
        )


@dataclass(frozen=True, kw_only=True)
class SharedExpertsConfig(ExpertsConfig):
    """The dense network that every token passes beside its experts; its sizes and options are its own.

    Parameters
    ----------
    gate : {"none", "sigmoid", "router"}, default="none"
        Multiply its output by the sigmoid of a learned linear function of the token (Qwen2-MoE, Qwen3-Next); or each of
        ``num_shared_sinks`` equal parts of its width by the weight that the router gives it (Inkling).
    """

    num_experts: int = 1
    gate: Literal["none", "sigmoid", "router"] = "none"

    def _check(self) -> None:
        super()._check()
        for name in (
            "num_experts",
            "weight_layout",
            "weight_position",
            "recompute",
            "accumulate",
            "dropout",
            "expert_dropout",
        ):
            self._require(self.is_default(name), f"{name}={getattr(self, name)!r} is for routed experts: leave {name}")


@dataclass(frozen=True, kw_only=True)
class MoEConfig(Checked):
    """A whole layer.

    Parameters
    ----------
    router : RouterConfig
        Who goes where.
    experts : ExpertsConfig
        What is computed there.
    shared_experts : SharedExpertsConfig, default=None
        What is added for every token.
    combine : {"sum", "average"}, default="sum"
        Whether the chosen and the shared experts are added or averaged (Cohere2-MoE).
    latent_size : int, default=None
        Width that the tokens are projected to before the experts and back from after them; router and shared experts
        see the whole token (Nemotron-H).
    output_bias : bool, default=False
        Add a learned bias to the sum (JetMoE).
    output_norm : bool, default=False
        Normalise the sum by its root mean square, times a learned scale (A.X-K1).

    Raises
    ------
    ValueError
        If the parts do not fit together.
    """

    router: RouterConfig
    experts: ExpertsConfig
    shared_experts: SharedExpertsConfig | None = None
    combine: Literal["sum", "average"] = "sum"
    latent_size: int | None = None
    output_bias: bool = False
    output_norm: bool = False

    def _check(self) -> None:
        ours, theirs = self.router.num_experts, self.experts.num_experts
        self._require(ours == theirs, f"router.num_experts = {ours} must equal experts.num_experts = {theirs}")
        self._require(self.latent_size is None or self.latent_size >= 1, "latent_size must be at least 1, or None")
        width = "router.hidden_size" if self.latent_size is None else "latent_size"
        ours, theirs = self.latent_size or self.router.hidden_size, self.experts.hidden_size
        self._require(ours == theirs, f"{width} = {ours} must equal experts.hidden_size = {theirs}")
        self._require_default_unless(self.shared_experts is not None, "shared_experts", "combine")
        self._check_sinks()
        if self.shared_experts is not None:
            ours, theirs = self.router.hidden_size, self.shared_experts.hidden_size
            self._require(
                ours == theirs, f"router.hidden_size = {ours} must equal shared_experts.hidden_size = {theirs}"
            )

    def _check_sinks(self) -> None:
        number, shared = self.router.num_shared_sinks, self.shared_experts
        weighs = shared is not None and shared.gate == "router"
        self._require(
            (number > 0) == weighs,
            f'router.num_shared_sinks = {number} and gate="router" of shared_experts belong together: set both or none',
        )
        if shared is not None and number:
            self._require(
                shared.intermediate_size % number == 0,
                f"router.num_shared_sinks = {number} must divide shared_experts.intermediate_size = "
                f"{shared.intermediate_size}",
            )
