"""Selections that are no top-k of a row: each returns ids, which ``ops.route`` then weighs as ``route_override``.

Legend: T tokens, E choices of a token, K top_k. All ids are int32; -1 is no expert.
"""

import heapq

import torch
from torch import Tensor


def balanced_ids(num_tokens: int, top_k: int, num_experts: int, device: torch.device) -> Tensor:
    """Return ids [T, K] that visit the experts in turn: the most even load, distinct within a token."""
    slots = torch.arange(num_tokens * top_k, device=device, dtype=torch.int32)
    return (slots % num_experts).view(num_tokens, top_k)


def zipf_ids(num_tokens: int, top_k: int, num_experts: int, exponent: float, device: torch.device) -> Tensor:
    """Return ids [T, K], distinct within a token, of which expert i has a share of about ``(i + 1) ** -exponent``.

    Always the same: the K best of the logarithm of the shares plus Gumbel noise, made of the slots' numbers.
    """
    mask = 2**32 - 1
    number = torch.arange(1, num_tokens * num_experts + 1, device=device) * 0x9E3779B1 & mask
    for factor in (0x85EBCA77, 0xC2B2AE3D):  # a hash of 32 bits
        number = (number ^ (number >> 15)) * factor & mask
    uniform = (((number ^ (number >> 16)).double() + 0.5) / 2**32).view(num_tokens, num_experts)
    shares = -exponent * torch.arange(1, num_experts + 1, device=device, dtype=torch.float64).log()
    return (shares - (-uniform.log()).log()).topk(top_k, dim=-1).indices.int()


def sinkhorn_ids(router_logits: Tensor, top_k: int, iterations: int) -> Tensor:
    """Return the top-k ids [T, K] of exp(logits), alternately normalised to equal rows and to equal columns.

    In the logarithm, so that no logit overflows. The last step is over the rows: each token has the same mass.
    """
    plan = router_logits.detach()
    for _ in range(iterations):
        plan = plan - plan.logsumexp(dim=0, keepdim=True)
        plan = plan - plan.logsumexp(dim=1, keepdim=True)
    return plan.topk(top_k, dim=-1).indices.int()


def expert_choice_ids(scores: Tensor, tokens_per_expert: int) -> Tensor:
    """Let every expert take its ``tokens_per_expert`` best tokens by its column of ``scores`` [T, E].

    Returns the experts of each token, ascending, [T, most experts of any token]; -1 where a token has fewer. How many
    columns that are depends on the scores.
    """
    num_tokens, num_experts = scores.shape
    best = scores.detach().topk(min(tokens_per_expert, num_tokens), dim=0).indices  # [C, E]
    chosen = torch.zeros(num_tokens, num_experts, dtype=torch.bool, device=scores.device).scatter_(0, best, True)
    most = int(chosen.sum(dim=1).amax()) if num_tokens else 0
    experts = torch.arange(num_experts, device=scores.device).where(chosen, num_experts)
    ids = experts.sort(dim=1).values[:, : max(most, 1)]
    return ids.where(ids < num_experts, -1).int()


def sampled_second_ids(router_logits: Tensor) -> Tensor:
    """Take the best expert, and draw the second of the others by its probability (NLLB-MoE)."""
    logits = router_logits.detach()
    first = logits.argmax(dim=-1, keepdim=True)
    gumbel = torch.empty_like(logits).exponential_().log()
    second = (logits - gumbel).scatter(-1, first, -torch.inf).argmax(dim=-1, keepdim=True)
    return torch.cat([first, second], dim=-1).int()


def random_second_ids(topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
    """Keep the second expert with probability 2 w2 / (w1 + w2) (GShard, arXiv 2006.16668, algorithm 1)."""
    share = topk_weights[:, 1] / topk_weights.sum(dim=1)
    kept = torch.rand_like(share) < 2 * share.detach()
    return torch.stack([topk_ids[:, 0], topk_ids[:, 1].where(kept, -1)], dim=1)


def ids_within_capacity(
    topk_ids: Tensor,
    topk_weights: Tensor,
    num_experts: int,
    capacity: int,
    *,
    tokens_per_sequence: int | None = None,
    by_weight: bool = False,
    first_choices_first: bool = False,
) -> Tensor:
    """Return ``topk_ids`` [T, K] with -1 for every slot that comes too late for its expert.

    Parameters
    ----------
    topk_ids, topk_weights : Tensor of shape (num_tokens, top_k)
        What the router decided.
    num_experts : int
        Experts that have a capacity: ids outside of ``[0, num_experts)`` are left alone.
    capacity : int
        Slots an expert takes.
    tokens_per_sequence : int, default=None
        Count per run of so many tokens; None counts over all.
    by_weight : bool, default=False
        The slots of most weight come first, else the earlier ones.
    first_choices_first : bool, default=False
        The first choices of all tokens come before any second choice.
    """
    num_tokens, top_k = topk_ids.shape
    ids = topk_ids.flatten().long()
    limited = (ids >= 0) & (ids < num_experts)
    slots = torch.arange(ids.numel(), device=ids.device)
    sequence = slots // top_k // (tokens_per_sequence or max(num_tokens, 1))
    queue = torch.where(limited, sequence * num_experts + ids, -1)  # whose capacity a slot takes

    # Slots by priority, then stably by queue: a slot's rank is its distance from the first of its queue.
    order = topk_weights.detach().flatten().argsort(descending=True, stable=True) if by_weight else slots
    if first_choices_first:
        order = order[(order % top_k).argsort(stable=True)]
    order = order[queue[order].argsort(stable=True)]
    in_order = queue[order].contiguous()
    rank = torch.arange(ids.numel(), device=ids.device) - torch.searchsorted(in_order, in_order)
    kept = torch.empty_like(limited).scatter_(0, order, rank < capacity) | ~limited
    return topk_ids.where(kept.view_as(topk_ids), -1)


def hash_table(
    vocab_size: int, num_experts: int, top_k: int, *, token_counts: Tensor | None = None, seed: int = 0
) -> Tensor:
    """Return a table [vocab_size, top_k] that gives every token id ``top_k`` distinct experts.

    Without ``token_counts`` the experts follow a random order in turn: every expert has the same number of ids. With
    them, the most frequent id goes first, always to the experts with the least traffic (arXiv 2106.04426).

    Parameters
    ----------
    vocab_size : int
        Number of token ids.
    num_experts : int
        Number of experts.
    top_k : int
        Experts per id.
    token_counts : Tensor of shape (vocab_size,), default=None
        How often each id occurs.
    seed : int, default=0
        Of the random order.

    Returns
    -------
    Tensor of shape (vocab_size, top_k), dtype=int32
        The experts of each id.
    """
    if token_counts is None:
        order = torch.randperm(vocab_size, generator=torch.Generator().manual_seed(seed))
        return balanced_ids(vocab_size, top_k, num_experts, torch.device("cpu"))[order]
    table = torch.empty(vocab_size, top_k, dtype=torch.int32)
    load = [(0.0, expert) for expert in range(num_experts)]
    for token in token_counts.argsort(descending=True, stable=True).tolist():
        lightest = [heapq.heappop(load) for _ in range(top_k)]
        table[token] = torch.tensor([expert for _, expert in lightest])
        for traffic, expert in lightest:
            heapq.heappush(load, (traffic + float(token_counts[token]), expert))
    return table
