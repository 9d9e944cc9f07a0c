"""TopKRouter: which experts each token goes to, and with what weight."""

import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from torch_moe import ops, reference
from torch_moe.config import RouterConfig
from torch_moe.nn import selection
from torch_moe.nn._common import optional_parameter
from torch_moe.nn.projection import RouterProjection
from torch_moe.nn.router_output import ExtendedRouterOutput, RouterOutput
from torch_moe.nn.sparsemixer import sparsemixer

_ROUTE_OPTIONS = (
    "score_function", "score_order", "renormalize", "renormalize_p", "renormalize_eps", "renormalize_eps_mode",
    "routed_scaling_factor", "num_groups", "topk_groups", "group_score", "group_mask", "check_finite",
)  # fmt: skip


class TopKRouter(RouterProjection):
    """Score the experts for each token and choose ``top_k`` of them.

    The logits are computed in fp32 (fp64 if the input or the weight is), whatever the dtype of the input and also
    under autocast. ``weight`` starts uniform in ±1/sqrt of its columns, as in ``torch.nn.Linear``.

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

    per_expert_scale: nn.Parameter | None  # [E]
    global_scale: nn.Parameter | None  # [1]
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
        config = RouterConfig(hidden_size=hidden_size, num_experts=num_experts, top_k=top_k, **options)
        super().__init__(config, device, dtype)
        self.num_experts, self.top_k = num_experts, top_k
        choices = config.num_choices
        scale = optional_parameter(config.per_expert_scale, choices, device=device, dtype=dtype)
        self.register_parameter("per_expert_scale", scale)
        scale = optional_parameter(config.global_scale, 1, device=device, dtype=dtype)
        self.register_parameter("global_scale", scale)
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
        """Return the router of ``config``.

        Parameters
        ----------
        config : RouterConfig
            All options.
        device, dtype
            Of the parameters.

        Returns
        -------
        TopKRouter
            With parameters drawn as the class says.
        """
        return cls(**asdict(config), device=device, dtype=dtype)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the weight anew, uniform in ±1/sqrt of its columns; biases and noise start at 0, scales at 1.

        The ``hash_table`` becomes that of seed 0 again.
        """
        super().reset_parameters()
        for tensor, value in ((self.expert_bias, 0.0), (self.per_expert_scale, 1.0), (self.global_scale, 1.0)):
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
            Take these experts, weighed by this router's logits: the replay of another run's choice. An id that is of no
            expert weighs 0.
        router_state : Tensor of shape (num_tokens, projection_size), default=None
            With ``projection_state``: what the router of the layer before returned; None for the first layer.

        Returns
        -------
        RouterOutput, or ExtendedRouterOutput with ``num_shared_sinks`` or ``projection_state``
            Logits, weights and ids.

        Raises
        ------
        ValueError
            If a shape does not fit, ``token_ids`` are missing, or a ``router_state`` would do nothing.
        RuntimeError
            If :func:`torch_moe.ops.route` refuses ``route_override``, or a logit that ``check_finite`` looks at.
        """
        self._check(hidden_states, route_override, router_state)
        config = self.config
        router_logits, state = self._project(hidden_states, router_state)
        sink_logits = router_logits[:, config.num_choices :]
        router_logits = router_logits[:, : config.num_choices]
        ids = self._choose(router_logits, token_ids) if route_override is None else route_override
        topk_weights, topk_ids = self._weigh(router_logits, ids)
        if self.per_expert_scale is not None:
            # What is clamped belongs to no expert, and weighs 0 already.
            scale = self.per_expert_scale.to(topk_weights.dtype)
            topk_weights = topk_weights * scale[topk_ids.long().clamp(0, config.num_choices - 1)]
        shared_weights = None
        if config.num_shared_sinks:
            topk_weights, shared_weights = self._weigh_with_sinks(topk_weights, sink_logits)
        if self.global_scale is not None:
            scale = self.global_scale.to(topk_weights.dtype)
            topk_weights = topk_weights * scale
            shared_weights = None if shared_weights is None else shared_weights * scale
        if config.num_shared_sinks or config.projection_state:
            return ExtendedRouterOutput(router_logits, topk_weights, topk_ids, shared_weights, state)
        return RouterOutput(router_logits, topk_weights, topk_ids)

    def _check(self, hidden_states: Tensor, route_override: Tensor | None, router_state: Tensor | None) -> None:
        """Refuse what would be cut or spread without a word; the messages are made only when they are needed."""
        if hidden_states.dim() != 2:
            raise ValueError(
                "TopKRouter: hidden_states must have 2 dimensions [num_tokens, hidden_size], got shape "
                f"{list(hidden_states.shape)} (call .flatten(0, -2))"
            )
        num_tokens = hidden_states.shape[0]
        if router_state is not None and not self.config.projection_state:
            raise ValueError("TopKRouter: router_state does nothing without projection_state=True: leave it out")
        size = self.config.projection_size
        if router_state is not None and router_state.shape != (num_tokens, size):
            raise ValueError(
                f"TopKRouter: router_state must have shape [{num_tokens}, {size}] = [num_tokens, projection_size], got "
                f"{list(router_state.shape)}"
            )
        # The other selections leave this to ops.route.
        replayed = None if self.config.selection != "sparsemixer" else route_override
        if replayed is not None and replayed.shape != (num_tokens, self.top_k):
            raise ValueError(
                f"TopKRouter: route_override must have shape [{num_tokens}, {self.top_k}] = [num_tokens, top_k], got "
                f"{list(replayed.shape)}"
            )

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

    def _weigh_with_sinks(self, scores: Tensor, sink_logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights of the chosen and of the shared experts: their scores over the sum of both."""
        config, top_k = self.config, scores.shape[-1]
        scores = torch.cat([scores, self.scores(sink_logits)], dim=-1)
        weights = reference.renormalize_weights(scores, 1.0, config.renormalize_eps, config.renormalize_eps_mode)
        weights = weights * config.routed_scaling_factor
        return weights[:, :top_k], weights[:, top_k:]

    def scores(self, router_logits: Tensor) -> Tensor:
        """Return the score function of every logit: probabilities for softmax, else a score of each expert alone.

        Parameters
        ----------
        router_logits : Tensor of shape (..., num_experts)
            The logits, as in :class:`RouterOutput`.

        Returns
        -------
        Tensor of shape (..., num_experts), same dtype
            The scores, differentiable, before any bias, selection or normalisation.
        """
        return reference.scores(router_logits, self.config.score_function)

    def capacity(self, num_tokens: int) -> int | None:
        """Return how many slots an expert takes at most, in the present mode (training or evaluation).

        Parameters
        ----------
        num_tokens : int
            Tokens of a call, or of a sequence with ``capacity_scope="sequence"``.

        Returns
        -------
        int or None
            ``ceil(capacity_factor * num_tokens * top_k / num_experts)``, or ``capacity``; None: nothing is dropped.
        """
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
        """Plan the rows of the experts, after dropping what has no room.

        Parameters
        ----------
        routed : RouterOutput or ExtendedRouterOutput
            What :meth:`forward` returned; it keeps what was chosen.
        tokens_per_sequence : int
            Length of the sequences that the tokens are of, one after the other, for ``capacity_scope="sequence"``.

        Returns
        -------
        Plan
            Where a slot was dropped, its ``slot_to_row`` is -1.
        """
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
        """Return the weights that the experts are given, after slots were dropped.

        Parameters
        ----------
        routed : RouterOutput or ExtendedRouterOutput
            What :meth:`forward` returned.
        plan : Plan
            What :meth:`plan` made of it.

        Returns
        -------
        Tensor of shape (num_tokens, top_k), dtype=float32 (float64 for float64 logits)
            ``topk_weights``; with ``renormalize_before_drop=False`` those of the kept slots alone have the sum
            ``routed_scaling_factor``, and the others are 0.
        """
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
            if token_ids is None:
                raise ValueError('TopKRouter: selection="hash" needs token_ids, got None')
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
