"""MoE: router, experts and combine as one layer."""

from dataclasses import fields
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor, nn

from torch_moe import ops
from torch_moe.config import ExpertsConfig, MoEConfig, RouterConfig, SharedExpertsConfig
from torch_moe.nn._common import require
from torch_moe.nn.dense import SharedExperts
from torch_moe.nn.experts import Experts
from torch_moe.nn.router import TopKRouter
from torch_moe.nn.router_output import ExtendedRouterOutput, RouterOutput

_EXPERTS_OPTIONS = {field.name for field in fields(ExpertsConfig)}
# What a layer may have beside its router and its experts: a layer over several ranks takes these over as they are.
OPTIONAL_PARTS = ("shared_experts", "latent_down", "latent_up", "output_norm", "output_bias")
# What the shared experts do not take over from the routed ones.
_ROUTED_ONLY = {"weight_layout", "weight_position", "recompute", "accumulate", "dropout", "expert_dropout"}


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


class ExtendedRouting(NamedTuple):
    """What a router with ``projection_state`` decided.

    Attributes
    ----------
    router_logits, topk_ids, topk_weights, tokens_per_expert
        As in :class:`Routing`.
    router_state : Tensor of shape (num_tokens, projection_size), dtype=float32
        To be given to the next layer.
    """

    router_logits: Tensor
    topk_ids: Tensor
    topk_weights: Tensor
    tokens_per_expert: Tensor
    router_state: Tensor


class MoE(nn.Module):
    """A Mixture-of-Experts layer: each token goes through ``top_k`` of ``num_experts`` feed-forward networks.

    1. ``router`` gives every token ``top_k`` experts and their weights;
    2. ``plan`` sorts the tokens by expert;
    3. ``experts`` computes each expert on its tokens and sums by weight;
    4. ``shared_experts``, if any, is added for every token.

    A layer with more parts (a latent width, averaged or weighed shared experts, an output bias or norm, a router with a
    state) is made by :meth:`from_config`. Under autocast the experts compute in its dtype, the router in fp32 all the
    same.

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
    num_shared_experts : int, default=0
        Experts that every token passes; together one dense network of ``num_shared_experts * intermediate_size``.
    shared_intermediate_size : int, default=None
        That width itself, in place of ``num_shared_experts``.
    device, dtype
        Of the parameters.
    **options
        The other fields of :class:`torch_moe.RouterConfig` and :class:`torch_moe.ExpertsConfig`, by their names.

    Raises
    ------
    ValueError
        If a size or option is impossible, or options contradict each other.

    Examples
    --------
    >>> layer = MoE(hidden_size=64, intermediate_size=128, num_experts=8, top_k=2, score_function="sigmoid")
    >>> layer(torch.randn(4, 16, 64)).shape
    torch.Size([4, 16, 64])
    """

    shared_experts: SharedExperts | None
    latent_down: nn.Linear | None
    latent_up: nn.Linear | None
    output_bias: nn.Parameter | None
    output_norm: nn.RMSNorm | None

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        *,
        num_shared_experts: int = 0,
        shared_intermediate_size: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,  # noqa: ANN401  # the configs check them
    ) -> None:
        shared = _shared_size(num_shared_experts, shared_intermediate_size, intermediate_size)
        sizes: dict[str, Any] = {"hidden_size": hidden_size, "num_experts": num_experts}
        of_experts = {name: options.pop(name) for name in _EXPERTS_OPTIONS & options.keys()}
        config = MoEConfig(
            router=RouterConfig(top_k=top_k, **sizes, **options),
            experts=ExpertsConfig(intermediate_size=intermediate_size, **sizes, **of_experts),
            shared_experts=SharedExpertsConfig(
                hidden_size=hidden_size,
                intermediate_size=shared,
                **{name: of_experts[name] for name in _EXPERTS_OPTIONS - _ROUTED_ONLY & of_experts.keys()},
            )
            if shared
            else None,
        )
        self._build(config, device, dtype)

    @classmethod
    def from_config(
        cls, config: MoEConfig, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "MoE":
        """Return the layer of ``config``.

        Parameters
        ----------
        config : MoEConfig
            For example the ``moe`` of one of :data:`torch_moe.presets.PRESETS`.
        device, dtype
            Of the parameters.

        Returns
        -------
        MoE
            With parameters drawn as the class says.
        """
        layer = cls.__new__(cls)
        layer._build(config, device, dtype)
        return layer

    def _build(self, config: MoEConfig, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.config = config
        self.router = TopKRouter.from_config(config.router, device=device, dtype=dtype)
        self.experts = Experts.from_config(config.experts, device=device, dtype=dtype)
        shared = config.shared_experts
        self.shared_experts = None if shared is None else SharedExperts(shared, device=device, dtype=dtype)
        hidden, latent = config.router.hidden_size, config.latent_size
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.latent_down = None if latent is None else nn.Linear(hidden, latent, bias=False, **options)
        self.latent_up = None if latent is None else nn.Linear(latent, hidden, bias=False, **options)
        self.output_norm = nn.RMSNorm(hidden, eps=1e-6, **options) if config.output_norm else None
        self.output_bias = nn.Parameter(torch.zeros(hidden, **options)) if config.output_bias else None

    def reset_parameters(self) -> None:
        """Draw all parameters anew: the router's, the experts', the shared experts', and what else there is."""
        parts = (self.router, self.experts, self.shared_experts, self.latent_down, self.latent_up, self.output_norm)
        for part in parts:
            if part is not None:
                part.reset_parameters()
        if self.output_bias is not None:
            nn.init.zeros_(self.output_bias)

    @overload
    def forward(
        self,
        hidden_states: Tensor,
        return_routing: Literal[False] = ...,
        *,
        token_ids: Tensor | None = ...,
        route_override: Tensor | None = ...,
        router_input: Tensor | None = ...,
        router_state: Tensor | None = ...,
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        hidden_states: Tensor,
        return_routing: Literal[True],
        *,
        token_ids: Tensor | None = ...,
        route_override: Tensor | None = ...,
        router_input: Tensor | None = ...,
        router_state: Tensor | None = ...,
    ) -> tuple[Tensor, Routing | ExtendedRouting]: ...

    def forward(
        self,
        hidden_states: Tensor,
        return_routing: bool = False,
        *,
        token_ids: Tensor | None = None,
        route_override: Tensor | None = None,
        router_input: Tensor | None = None,
        router_state: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Routing | ExtendedRouting]:
        """Apply the layer.

        Parameters
        ----------
        hidden_states : Tensor of shape (..., hidden_size)
            The tokens. The last but one dimension is the sequence, for a capacity per sequence.
        return_routing : bool, default=False
            Also return the :class:`Routing`.
        token_ids : Tensor of shape (...), integer, default=None
            What ``selection="hash"`` looks up.
        route_override : Tensor of shape (..., top_k), dtype=int32, default=None
            Take these experts: the replay of another run's ``topk_ids``.
        router_input : Tensor of shape (..., hidden_size), default=None
            What the router sees of the tokens, where it is not ``hidden_states`` (Gemma-4, which norms them apart).
        router_state : Tensor of shape (..., projection_size), default=None
            The ``router_state`` of the layer before, for ``projection_state``.

        Returns
        -------
        Tensor of shape (..., hidden_size), or that and a Routing (an ExtendedRouting with ``projection_state``)
            The outputs.
        """
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])  # [T, H]
        routed = self._route(hidden_states, token_ids, route_override, router_input, router_state)
        plan = None
        if return_routing or self.router.may_drop:
            plan = self._plan(routed, hidden_states)
            output: Tensor = self.experts(self._narrow(tokens), self.router.weights_of_kept(routed, plan), plan)
        else:  # nobody else needs the plan: in inference the experts make it within their own call
            output = self.experts(self._narrow(tokens), routed.topk_weights, routed.topk_ids)
        output = self._finish(output, self._beside(tokens, routed)).view(hidden_states.shape)
        return output if plan is None or not return_routing else (output, self._routing(routed, plan))

    def _route(
        self,
        hidden_states: Tensor,
        token_ids: Tensor | None,
        route_override: Tensor | None,
        router_input: Tensor | None,
        router_state: Tensor | None,
    ) -> ExtendedRouterOutput:
        """Choose the experts."""

        def flat(tensor: Tensor) -> Tensor:
            return tensor.reshape(-1, tensor.shape[-1])

        more = {} if router_state is None else {"router_state": flat(router_state)}
        ids = None if route_override is None else flat(route_override)
        seen = flat(hidden_states if router_input is None else router_input)
        return ExtendedRouterOutput(*self.router(seen, token_ids=token_ids, route_override=ids, **more))

    def _plan(self, routed: ExtendedRouterOutput, hidden_states: Tensor) -> ops.Plan:
        return self.router.plan(routed, hidden_states.shape[-2] if hidden_states.dim() > 1 else 1)

    def _routing(self, routed: ExtendedRouterOutput, plan: ops.Plan) -> Routing | ExtendedRouting:
        routing = Routing(routed.router_logits, routed.topk_ids, routed.topk_weights, plan.tokens_per_expert)
        return routing if routed.router_state is None else ExtendedRouting(*routing, routed.router_state)

    def _narrow(self, tokens: Tensor) -> Tensor:
        """Return what the experts are given."""
        if self.latent_down is None:
            return tokens
        narrow: Tensor = self.latent_down(tokens)
        return narrow

    def _beside(self, tokens: Tensor, routed: ExtendedRouterOutput) -> list[Tensor]:
        """Return what is added to the experts' sum: it needs none of them."""
        others: list[Tensor] = []
        if self.shared_experts is not None:
            weights = () if routed.shared_weights is None else (routed.shared_weights,)
            others.append(self.shared_experts(tokens, *weights))
        if self.config.router.num_zero_experts > 0 and self.config.router.zero_expert == "identity":
            others.append(self._identity(tokens, routed))
        return others

    def _finish(self, output: Tensor, others: list[Tensor]) -> Tensor:
        """Make the layer's output of the experts' sum and the rest."""
        if self.latent_up is not None:
            output = self.latent_up(output)
        for other in others:
            output = output + other
        if self.config.combine == "average":
            output = output / 2
        if self.output_bias is not None:
            output = output + self.output_bias
        return output if self.output_norm is None else self.output_norm(output)

    def capacity(self, num_tokens: int) -> int | None:
        """Return the slots an expert takes at most.

        Parameters
        ----------
        num_tokens : int
            Tokens of a call, or of a sequence with ``capacity_scope="sequence"``.

        Returns
        -------
        int or None
            ``ceil(capacity_factor * num_tokens * top_k / num_experts)``, or ``capacity``; None: nothing is dropped.
        """
        return self.router.capacity(num_tokens)

    def _identity(self, tokens: Tensor, routed: RouterOutput | ExtendedRouterOutput) -> Tensor:
        """Return what the identity experts add: the token, times the sum of their weights."""
        is_identity = routed.topk_ids >= self.config.router.num_experts
        weight = routed.topk_weights.where(is_identity, 0).sum(dim=-1, keepdim=True)
        return tokens * weight.to(tokens.dtype)


def _shared_size(number: int, size: int | None, intermediate_size: int) -> int:
    require("MoE", number >= 0, f"num_shared_experts must not be negative, got {number}")
    require(
        "MoE",
        size is None or (number == 0 and size >= 1),
        f"give either num_shared_experts or shared_intermediate_size >= 1, got {number} and {size}",
    )
    return size or number * intermediate_size
