"""TopKRouter: the linear map that scores experts, and the selection."""

import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from torch_moe import ops, reference
from torch_moe.config import RouterConfig
from torch_moe.nn import selection
from torch_moe.nn._common import require, uniform_by_fan_in_, without_autocast
from torch_moe.nn.projection import ProjectionMLP
from torch_moe.nn.sparsemixer import sparsemixer

_ROUTE_OPTIONS = (
    "score_function", "score_order", "renormalize", "renormalize_p", "renormalize_eps", "renormalize_eps_mode",
    "routed_scaling_factor", "num_groups", "topk_groups", "group_score", "group_mask", "check_finite",
)  # fmt: skip


class RouterOutput(NamedTuple):
    """What a router decided.

    Attributes
    ----------
    router_logits : Tensor of shape (num_tokens, num_experts), dtype=float32
        The logits, differentiable, after noise and softcap. Zero experts have columns too.
    topk_weights : Tensor of shape (num_tokens, top_k), dtype=float32
        The weights, differentiable.
    topk_ids : Tensor of shape (num_tokens, top_k), dtype=int32
        The experts, before anything is dropped. With expert choice the number of columns varies, and -1 is none.
    """

    router_logits: Tensor
    topk_weights: Tensor
    topk_ids: Tensor


class ExtendedRouterOutput(NamedTuple):
    """What a router returns that does more than choose: those with shared sinks or a state.

    Attributes
    ----------
    router_logits, topk_weights, topk_ids
        As in :class:`RouterOutput`.
    shared_weights : Tensor of shape (num_tokens, num_shared_sinks), dtype=float32, or None
        What the shared experts weigh.
    router_state : Tensor of shape (num_tokens, projection_size), dtype=float32, or None
        To be given to the router of the next layer.
    """

    router_logits: Tensor
    topk_weights: Tensor
    topk_ids: Tensor
    shared_weights: Tensor | None = None
    router_state: Tensor | None = None


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
    device, dtype
        Of the parameters.
    **options
        As in :class:`torch_moe.RouterConfig`.

    Attributes
    ----------
    config : RouterConfig
        All options.
    weight : Parameter of shape (num_experts, hidden_size)
        The projection; zero experts and shared sinks have rows too. For ``projection="mlp"`` the last map of it,
        (num_experts, projection_size).
    mlp : ProjectionMLP or None
        The rest of ``projection="mlp"``.
    expert_bias : Tensor of shape (num_experts,), dtype=float32, or None
        With the option of that name: a buffer of zeros that steers the selection only. It is saved in the
        state_dict, gets no gradient, and stays float32 when the module is cast: its updates are too small for less.
    bias, input_scale, noise_weight, per_expert_scale, global_scale : Parameter or None
        Of the options ``projection_bias``, ``input_norm``, ``noisy``, ``per_expert_scale`` and ``global_scale``.
    hash_table : Tensor of shape (vocab_size, top_k), dtype=int32, or None
        With ``selection="hash"``: see :func:`torch_moe.nn.selection.hash_table`.

    Raises
    ------
    ValueError
        If a size or option is impossible: see :class:`torch_moe.RouterConfig`.
    """

    weight: nn.Parameter  # [E, H]
    bias: nn.Parameter | None  # [E]
    input_scale: nn.Parameter | None  # [H]
    noise_weight: nn.Parameter | None  # [E, H]
    per_expert_scale: nn.Parameter | None  # [E]
    global_scale: nn.Parameter | None  # [1]
    mlp: ProjectionMLP | None
    expert_bias: Tensor | None  # [E]
    hash_table: Tensor | None  # [vocab_size, K]

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,  # noqa: ANN401  # RouterConfig checks them
    ) -> None:
        super().__init__()
        config = RouterConfig(hidden_size=hidden_size, num_experts=num_experts, top_k=top_k, **options)
        self.config = config
        self.hidden_size, self.num_experts, self.top_k = hidden_size, num_experts, top_k

        def parameter(wanted: bool, *shape: int) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) if wanted else None

        choices = config.num_choices
        rows, size = choices + config.num_shared_sinks, config.projection_size
        self.mlp = None if size is None else ProjectionMLP(hidden_size, size, config.projection_state, device, dtype)
        self.weight = nn.Parameter(torch.empty(rows, size or hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", parameter(config.projection_bias, rows))
        self.register_parameter("input_scale", parameter(config.input_norm, hidden_size))
        self.register_parameter("noise_weight", parameter(config.noisy, rows, hidden_size))
        self.register_parameter("per_expert_scale", parameter(config.per_expert_scale, choices))
        self.register_parameter("global_scale", parameter(config.global_scale, 1))
        bias = torch.empty(choices, device=device, dtype=torch.float32) if config.expert_bias else None
        self.register_buffer("expert_bias", bias)
        vocabulary = config.vocab_size
        table = None if vocabulary is None else torch.empty(vocabulary, top_k, device=device, dtype=torch.int32)
        self.register_buffer("hash_table", table)
        self.reset_parameters()

    @classmethod
    def from_config(
        cls, config: RouterConfig, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "TopKRouter":
        """Return the router of ``config``."""
        return cls(**asdict(config), device=device, dtype=dtype)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the weight anew, uniform in ±1/sqrt(hidden_size); biases and noise start at 0, scales at 1."""
        uniform_by_fan_in_(self.weight, self.weight.shape[1])
        if self.mlp is not None:
            self.mlp.reset_parameters()
        for tensor, value in (
            (self.bias, 0.0), (self.noise_weight, 0.0), (self.expert_bias, 0.0), (self.input_scale, 1.0),
            (self.per_expert_scale, 1.0), (self.global_scale, 1.0),
        ):  # fmt: skip
            if tensor is not None:
                tensor.fill_(value)
        if self.hash_table is not None:
            rows = self.hash_table.shape[0]
            self.hash_table.copy_(selection.hash_table(rows, self.config.num_choices, self.top_k))

    def forward(
        self,
        hidden_states: Tensor,
        *,
        token_ids: Tensor | None = None,
        route_override: Tensor | None = None,
        router_state: Tensor | None = None,
    ) -> RouterOutput | ExtendedRouterOutput:
        """Score, choose, weigh.

        Parameters
        ----------
        hidden_states : Tensor of shape (num_tokens, hidden_size), any floating dtype
            The tokens.
        token_ids : Tensor of shape (num_tokens,), integer, default=None
            What ``selection="hash"`` looks up.
        route_override : Tensor of shape (num_tokens, top_k), dtype=int32, default=None
            Take these experts, weighed by this router's logits: the replay of another run's choice.
        router_state : Tensor of shape (num_tokens, projection_size), default=None
            With ``projection_state``: what the router of the layer before returned; None for the first layer.

        Returns
        -------
        RouterOutput, or ExtendedRouterOutput with ``num_shared_sinks`` or ``projection_state``
            Logits, weights and ids.
        """
        config = self.config
        router_logits, state = self._project(hidden_states, router_state)
        sink_logits = router_logits[:, config.num_choices :]
        router_logits = router_logits[:, : config.num_choices]
        ids = self._choose(router_logits, token_ids) if route_override is None else route_override
        topk_weights, topk_ids = self._weigh(router_logits, ids)
        if self.per_expert_scale is not None:
            topk_weights = topk_weights * self.per_expert_scale.to(topk_weights.dtype)[topk_ids.clamp(min=0).long()]
        shared_weights = None
        if config.num_shared_sinks:
            # The weights are the scores yet: their sum takes in those of the shared experts.
            scores = torch.cat([topk_weights, self.scores(sink_logits)], dim=-1)
            divisor, eps = scores.sum(dim=-1, keepdim=True), config.renormalize_eps
            scores = scores / (divisor + eps if config.renormalize_eps_mode == "add" else divisor.clamp(min=eps))
            scores = scores * config.routed_scaling_factor
            topk_weights, shared_weights = scores[:, : topk_ids.shape[-1]], scores[:, topk_ids.shape[-1] :]
        if self.global_scale is not None:
            scale = self.global_scale.to(topk_weights.dtype)
            topk_weights = topk_weights * scale
            shared_weights = None if shared_weights is None else shared_weights * scale
        if config.num_shared_sinks or config.projection_state:
            return ExtendedRouterOutput(router_logits, topk_weights, topk_ids, shared_weights, state)
        return RouterOutput(router_logits, topk_weights, topk_ids)

    def _weigh(self, router_logits: Tensor, ids: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return weights and ids; ``ids`` where they are given."""
        config = self.config
        if config.selection == "sparsemixer":
            weights, ids = sparsemixer(
                router_logits,
                self.top_k,
                config.sparsemixer_tolerance,
                training=self.training,
                expert_bias=self.expert_bias,
                ids=ids,
            )
            return weights, ids.int()
        options = {name: getattr(config, name) for name in _ROUTE_OPTIONS}
        if config.num_shared_sinks:
            options |= {"renormalize": False, "routed_scaling_factor": 1.0}
        return ops.route(
            router_logits,
            self.top_k if ids is None else ids.shape[-1],
            None if self.expert_bias is None else self.expert_bias.to(router_logits.dtype),
            ids,
            **options,
        )

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
        at, state = input_dtype if self.config.projection_dtype == "input" else x.dtype, None
        features = x.to(at)
        if self.mlp is not None:
            features, state = self.mlp(features, router_state)
        return functional.linear(features, self.weight.to(at), None if self.bias is None else self.bias.to(at)), state

    def _noise_std(self, x: Tensor) -> Tensor:
        assert self.noise_weight is not None
        return functional.softplus(functional.linear(x, self.noise_weight.to(x.dtype)))

    def scores(self, router_logits: Tensor) -> Tensor:
        """Return the score of every expert (num_tokens, num_experts), as the losses and the inspection want it."""
        return reference.scores(router_logits, self.config.score_function)

    def capacity(self, num_tokens: int) -> int | None:
        """Return the slots an expert takes at most of ``num_tokens`` tokens, or None for all."""
        config = self.config
        factor = config.capacity_factor
        if not self.training and config.eval_capacity_factor is not None:
            factor = config.eval_capacity_factor
        if factor is None:
            return config.capacity
        return math.ceil(factor * num_tokens * self.top_k / self.num_experts)

    @property
    def may_drop(self) -> bool:
        """Whether :meth:`plan` may leave out a slot that has an expert."""
        config = self.config
        bounds = (config.capacity, config.capacity_factor, config.eval_capacity_factor)
        return any(bound is not None for bound in bounds) or config.second_expert_policy == "random"

    def plan(self, routed: RouterOutput | ExtendedRouterOutput, tokens_per_sequence: int) -> ops.Plan:
        """Plan the rows, after dropping what has no room: ``routed`` itself keeps what was chosen."""
        config, ids = self.config, routed.topk_ids
        if config.selection == "expert_choice":
            return ops.plan(ids, self.num_experts)
        gshard = config.selection == "top2_gshard"
        if gshard and self.training and config.second_expert_policy == "random":
            ids = selection.random_second_ids(ids, routed.topk_weights)
        by_sequence = config.capacity_scope == "sequence"
        capacity = self.capacity(tokens_per_sequence if by_sequence else ids.shape[0])
        if capacity is None or not (by_sequence or gshard or config.drop_policy == "probability"):
            return ops.plan(ids, self.num_experts, capacity)
        by_weight = config.drop_policy == "probability"
        priorities = routed.topk_weights
        if gshard and by_weight:  # of the token, whatever it chose
            priorities = self.scores(routed.router_logits).amax(dim=1, keepdim=True).expand_as(ids)
        ids = selection.ids_within_capacity(
            ids,
            priorities,
            self.num_experts,
            capacity,
            tokens_per_sequence=tokens_per_sequence if by_sequence else None,
            by_weight=by_weight,
            first_choices_first=gshard,
        )
        return ops.plan(ids, self.num_experts)

    def weights_of_kept(self, routed: RouterOutput | ExtendedRouterOutput, plan: ops.Plan) -> Tensor:
        """Return the weights (num_tokens, top_k) that the experts are given, after slots were dropped."""
        config, weights = self.config, routed.topk_weights
        if config.renormalize_before_drop:
            return weights
        # Both are proportional to the scores. Where no slot is left, every weight is 0.
        kept = weights.where(plan.slot_to_row >= 0, 0)
        smallest = torch.finfo(kept.dtype).tiny
        return kept / kept.sum(dim=-1, keepdim=True).clamp(min=smallest) * config.routed_scaling_factor

    def _choose(self, router_logits: Tensor, token_ids: Tensor | None) -> Tensor | None:
        """Return the ids, or None where the kernel chooses them by itself."""
        config = self.config
        if config.force_balanced:
            return selection.balanced_ids(router_logits.shape[0], self.top_k, self.num_experts, router_logits.device)
        if config.force_biased > 0:
            size = (router_logits.shape[0], self.top_k, self.num_experts)
            return selection.zipf_ids(*size, config.force_biased, router_logits.device)
        if self.hash_table is not None:
            require("TopKRouter", token_ids is not None, 'selection="hash" needs token_ids, got None')
            assert token_ids is not None
            return self.hash_table[token_ids.reshape(-1).long()]
        if config.second_expert_policy == "sampling" and self.training:
            return selection.sampled_second_ids(router_logits)
        if config.selection == "sinkhorn" and self.training:
            return selection.sinkhorn_ids(router_logits, self.top_k, config.sinkhorn_iterations)
        if config.selection == "expert_choice":
            slots = router_logits.shape[0] * self.top_k / self.num_experts
            capacity = self.capacity(router_logits.shape[0])
            return selection.expert_choice_ids(self.scores(router_logits), capacity or math.ceil(slots))
        return None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TopKRouter":
        bias = self.expert_bias
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        moved = self.expert_bias
        if bias is not None and moved is not None and moved.dtype != bias.dtype:
            self.expert_bias = bias.to(moved.device)
        return self

    def extra_repr(self) -> str:
        """Return sizes and options, those that are not the default last."""
        config = self.config
        shown = ("hidden_size", "num_experts", "top_k", "score_function", "score_order", "renormalize")
        changed = [name for name in asdict(config) if name not in shown and not config.is_default(name)]
        return ", ".join(f"{name}={getattr(config, name)}" for name in (*shown, *changed))
