"""What other layers over ranks do, to compare ExpertParallel with: its router and its experts, other exchanges.

``k_copies`` is the algorithm of plain dispatchers: one copy of the token per expert, each way. ``all_gather`` sends
every token everywhere and sums by reduce-scatter. Both have gradients.
"""

import torch
from torch import distributed
from torch.distributed import _functional_collectives as collectives

from torch_moe import ops


def _experts(layer, tokens, weights, plan):
    projections = (layer.experts.gate_up_proj.to_local(), layer.experts.down_proj.to_local())
    return ops.experts(tokens, *projections, weights, plan)


def k_copies(layer, tokens):
    """One row per (token, expert) pair, sorted by expert; the weighted sum is taken where the tokens are."""
    _, weights, ids = layer.router(tokens)
    group, world, local = distributed.group.WORLD, layer.experts.ep_size, len(layer.experts.experts)
    plan = ops.plan(ids, world * local)
    send = plan.tokens_per_expert.view(world, local)
    receive = torch.empty_like(send)
    distributed.all_to_all_single(receive, send)
    there, back = send.sum(dim=1).tolist(), receive.sum(dim=1).tolist()
    rows = collectives.all_to_all_single_autograd(ops.permute(tokens, plan), back, there, group)
    received = torch.arange(local, dtype=torch.int32).repeat(world).repeat_interleave(receive.flatten())[:, None]
    results = _experts(layer, rows, torch.ones(len(received), 1), ops.plan(received, local))
    return ops.combine(collectives.all_to_all_single_autograd(results, there, back, group), weights, plan)


def all_gather(layer, tokens):
    """Every token to every rank; each computes its experts for all of them; reduce-scatter sums."""
    _, weights, ids = layer.router(tokens)
    group, local = distributed.group.WORLD, len(layer.experts.experts)
    everyone = collectives.all_gather_tensor(ids, 0, group) - layer.experts.ep_rank * local
    rows, their_weights = (collectives.all_gather_tensor_autograd(tensor, 0, group) for tensor in (tokens, weights))
    partial = _experts(layer, rows, their_weights, ops.plan(everyone, local))
    return collectives.reduce_scatter_tensor_autograd(partial, "sum", 0, group)
