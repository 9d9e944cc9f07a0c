"""Routers of transformers that do not return logits, weights and ids: how each family's is read, and steered by a bias.

Where a router returns its choice in a form of its own, or its block chooses, :class:`Family` translates it to and from
a triple of logits, weights and ids, for which a rule is found as for any other router. Where the choice is drawn, or
limited by capacity in a way that the result does not tell, the family's choice itself is written down here, with a
bias: it gives the same bits as transformers' own where the bias is zero, random numbers included.
"""

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from torch_moe.integrations.transformers.gate import Host
from torch_moe.nn.sparsemixer import sparsemixer

# The name under which a router that has no selection bias gets one: a buffer that is not saved with the model.
OWN_BIAS = "torch_moe_selection_bias"
# Logits (num_tokens, num_experts), weights and ids (num_tokens, top_k); an id of no expert is not counted.
Triple = tuple[Tensor, Tensor, Tensor]


class Family(NamedTuple):
    """How the router of one kind of block is read, and steered."""

    read: Callable[[Host, Host, Any], Triple]  # block, router, output of the router -> choice, before capacity
    # router, its output, weights, ids -> output. None: not by a hook on the router, but
    write: Callable[[Host, Any, Tensor, Tensor], Any] | None = None
    method: str = ""  # by this method of the block (of the router where there is no rule),
    instead: Callable[..., Any] | None = None  # which is called instead, with the module first
    reason: str = ""  # why no rule of ops.route gives the choice; "" where one does
    options: dict[str, Any] | None = None  # of ops.route for the selection, where there is no rule


def family_of(block: nn.Module) -> Family | None:
    """Return the family of a block; a class of another library with such a name is no member."""
    for cls in type(block).__mro__:
        if cls.__name__ in FAMILIES and cls.__module__.startswith("transformers.models."):
            return FAMILIES[cls.__name__]
    return None


class AsTriple(nn.Module):
    """A router as if it returned logits, weights and ids. The block is there for its settings only."""

    def __init__(self, family: Family, block: nn.Module, router: nn.Module) -> None:
        super().__init__()
        settings = copy.copy(block)
        settings._modules = {}  # a copy of this module shall not copy the experts
        self.router, self.read = router, partial(family.read, settings)
        self.renormalize_p = float(getattr(block, "moe_normalize_expert_weights", None) or 1)

    def forward(self, hidden_states: Tensor) -> Triple:
        """Return logits, weights and ids."""
        return self.read(self.router, self.router(hidden_states))


def _jamba(block: Host, router: Host, router_logits: Tensor) -> Triple:
    ids, weights = type(block).route_tokens_to_experts(block, router_logits, router_logits)
    return router_logits, weights, ids


def _jamba_again(block: Host, steer: Callable[[Triple], Triple], hidden_states: Tensor, logits: Tensor) -> Any:  # noqa: ANN401
    ids, weights = type(block).route_tokens_to_experts(block, hidden_states, logits)
    _, weights, ids = steer((logits, weights, ids))
    return ids, weights


def _dbrx(block: Host, router: Host, router_logits: Tensor) -> Triple:
    return router_logits, *type(block).route_tokens_to_experts(block, router_logits)


def _dbrx_again(block: Host, steer: Callable[[Triple], Triple], router_logits: Tensor) -> Any:  # noqa: ANN401
    return steer(_dbrx(block, block.router, router_logits))[1:]


def _llama4(block: Host, router: Host, output: tuple[Tensor, Tensor]) -> Triple:
    """Read scores (num_tokens, num_experts) that are zero where an expert is not chosen."""
    scores, router_logits = output
    weights, ids = scores.topk(router.top_k, dim=1)
    return router_logits, weights, ids


def _write_llama4(router: Host, output: tuple[Tensor, Tensor], weights: Tensor, ids: Tensor) -> Any:  # noqa: ANN401
    scores, router_logits = output
    return torch.zeros_like(scores).scatter(1, ids, weights), router_logits


def read_jetmoe(block: Host, router: Host, output: tuple[Any, ...]) -> Triple:
    """Read slots in the order of their experts: their numbers, their tokens, their weights, and the experts' counts."""
    slots, _, sorted_weights, counts, router_logits = output
    shape = (-1, router.top_k)
    experts = torch.arange(router.num_experts, device=slots.device)
    experts = experts.repeat_interleave(torch.tensor(counts, device=slots.device), output_size=slots.numel())
    ids = torch.empty_like(slots).scatter(0, slots, experts)
    weights = torch.zeros_like(sorted_weights).scatter(0, slots, sorted_weights)
    return router_logits, weights.view(shape), ids.view(shape)


def _write_jetmoe(router: Host, output: tuple[Any, ...], weights: Tensor, ids: Tensor) -> Any:  # noqa: ANN401
    experts = ids.flatten()
    slots = experts.sort(0).indices
    counts = experts.bincount(minlength=router.num_experts).tolist()
    return slots, slots.div(router.top_k, rounding_mode="trunc"), weights.flatten()[slots], counts, output[4]


def _switch(block: Host, router: Host, output: tuple[Tensor, Tensor, Tensor]) -> Triple:
    """Read a one-hot choice after capacity: what a dropped token wanted is in the logits only."""
    _, weights, router_logits = output
    probabilities = router_logits.softmax(dim=-1, dtype=router.dtype).to(weights.dtype).flatten(0, -2)
    return router_logits.flatten(0, -2), weights.flatten(0, -2), probabilities.argmax(dim=-1, keepdim=True)


def _write_switch(router: Host, output: tuple[Tensor, Tensor, Tensor], weights: Tensor, ids: Tensor) -> Any:  # noqa: ANN401
    one_hot, old, router_logits = output
    wanted = functional.one_hot(ids.view(one_hot.shape[:-1]), router.num_experts)
    kept = wanted * (wanted.cumsum(dim=-2) <= router.expert_capacity)
    return kept, weights.view_as(old), router_logits


def _nllb(block: Host, router: Host, output: tuple[Tensor, Tensor, Tensor]) -> Triple:
    """Read dense weights after capacity, zero where an expert is not chosen."""
    _, dense, router_logits = output
    weights, ids = dense.topk(min(2, router.num_experts), dim=-1)
    return router_logits, weights, ids.masked_fill(weights == 0, -1)


def _nllb_again(
    router: Host, router_logits: Tensor, input_dtype: torch.dtype = torch.float32, padding_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Choose two experts by probability plus bias; the rest is that of ``NllbMoeTop2Router.route_tokens``.

    A token whose second choice the bias does not change keeps it, however rounding ties its probabilities.
    """
    bias, num_tokens = getattr(router, OWN_BIAS), router_logits.shape[0]
    probabilities = functional.softmax(router_logits, dim=-1, dtype=router.dtype).to(input_dtype)

    def mask_of(ids: Tensor) -> Tensor:
        return functional.one_hot(ids, num_classes=router.num_experts)

    first = mask_of((probabilities + bias).argmax(dim=-1))
    if router.second_expert_policy == "sampling":
        # In place, as there: the logits that a model records are those with the noise.
        router_logits += torch.distributions.Gumbel(0, 1).rsample(router_logits.shape).to(router_logits.device)
    others = router_logits.masked_fill(first.bool(), -torch.inf)
    scores = router_logits.softmax(dim=-1, dtype=router.dtype).masked_fill(first.bool(), -torch.inf)
    biased = (scores + bias).argmax(dim=-1)
    second = mask_of(torch.where(biased == scores.argmax(dim=-1), others.argmax(dim=-1), biased))

    def shares() -> tuple[Tensor, Tensor]:
        return router.normalize_router_probabilities(probabilities, first, second)  # type: ignore[no-any-return]

    weights = shares() if router.normalize_router_prob_before_dropping else None
    if router.second_expert_policy == "random":
        # NOTE: not divided by the sum any more, there as here.
        probability = (probabilities * second).sum(dim=1)
        second = second * (2 * probability > torch.rand_like(probability.float())).unsqueeze(1)
        weights = None if weights is None else (weights[0], probability)
    if padding_mask is not None and not router.router_ignore_padding_tokens:
        if padding_mask.dim() == 4:
            padding_mask = padding_mask[:, :, -1, :].reshape(-1)[-num_tokens:]
        tokens = ~padding_mask.bool().unsqueeze(-1)
        first, second = first * tokens, second * tokens

    order = torch.arange(num_tokens, device=first.device)
    if router.batch_prioritized_routing:
        order = (-probabilities.max(dim=1).values).argsort(dim=0)
    back = order.argsort(dim=0)
    # Places are counted from 0, those of second choices after all first ones.
    first_place = first[order].cumsum(dim=0)[back] - 1
    second_place = (second[order].cumsum(dim=0) - 1)[back]
    if router.batch_prioritized_routing:
        first_place, second_place = first_place * first, second_place * second
    second_place = second_place + first.sum(dim=0, keepdim=True)
    if not router.training and router.moe_eval_capacity_token_fraction > 0:
        router.expert_capacity = math.ceil(router.moe_eval_capacity_token_fraction * num_tokens)
    elif router.expert_capacity is None:
        router.expert_capacity = 2 * math.ceil(num_tokens / router.num_experts)
    first, second = first * (first_place < router.expert_capacity), second * (second_place < router.expert_capacity)
    first_weight, second_weight = shares() if weights is None else weights
    return first, first_weight[:, None] * first + second_weight[:, None] * second


def _phimoe(block: Host, router: Host, output: Triple) -> Triple:
    return output


def _phimoe_again(router: Host, hidden_states: Tensor) -> Triple:
    """Draw experts by logit plus bias."""
    noise = router.input_jitter_noise
    if router.training and noise > 0:
        # In place, as there: the experts see what the router saw.
        hidden_states *= torch.empty_like(hidden_states).uniform_(1 - noise, 1 + noise)
    router_logits = nn.Linear.forward(router, hidden_states)
    draws = 0

    def uniform(like: Tensor) -> Tensor:
        nonlocal draws
        draws += 1
        drawn = torch.rand_like(like)
        # There the second expert's number is drawn twice; without that, what is random after it would differ.
        return drawn if draws == 1 else drawn.uniform_()

    weights, ids = sparsemixer(
        router_logits,
        2,
        router.router_jitter_noise,
        training=router.training,
        expert_bias=getattr(router, OWN_BIAS),
        uniform=uniform,
    )
    return router_logits, weights, ids


def _zaya(block: Host, router: Host, output: tuple[Tensor, ...]) -> Triple:
    """Read weight 0 and id 0 as the class without an expert."""
    router_logits, weights, ids, _ = output
    return router_logits, weights, ids.masked_fill(weights == 0, router.num_experts)


_METHOD = "route_tokens_to_experts"
_JETMOE = Family(read_jetmoe, _write_jetmoe)
# By the class of the block, because a router may be a bare Linear.
FAMILIES = {
    "JambaSparseMoeBlock": Family(_jamba, method=_METHOD, instead=_jamba_again),
    "DbrxFFN": Family(_dbrx, method=_METHOD, instead=_dbrx_again),
    "Llama4TextMoe": Family(_llama4, _write_llama4),
    "JetMoeMoE": _JETMOE,
    "JetMoeMoA": _JETMOE,
    "SwitchTransformersSparseMLP": Family(_switch, _write_switch),
    "NllbMoeSparseMLP": Family(
        _nllb, method="route_tokens", instead=_nllb_again, reason="its two choices have a capacity"
    ),
    "PhimoeSparseMoeBlock": Family(_phimoe, method="forward", instead=_phimoe_again, reason="it draws its choice"),
    "ZayaSparseMoeBlock": Family(_zaya, reason="a class of it has no expert", options={"renormalize": False}),
}
