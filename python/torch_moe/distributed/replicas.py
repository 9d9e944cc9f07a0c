"""Experts that several ranks hold: their gradients are summed, so that replicas stay equal."""

from __future__ import annotations

import torch

from torch_moe.distributed import exchange
from torch_moe.distributed.layer import ShardedExperts


@torch.no_grad()
def sum_replica_gradients(experts: ShardedExperts) -> None:
    """Give every replica of an expert the sum of all replicas' gradients: the expert's gradient.

    A replica has the gradient of the tokens it computed. Each rank sends its part to the other holders, in one
    exchange, and each adds the parts in the order of the replicas: all get the same bits, so replicas that were equal
    stay equal under the same optimizer.

    Parameters
    ----------
    experts : ShardedExperts
        After the backward; every rank of its group has to call. Without replicas nothing is done.
    """
    placement, rank = experts.placement, experts.ep_rank
    local = placement.num_local_experts
    # By expert that has replicas: the ranks that hold it, in the order of the replicas, and where.
    holders = {
        expert: [divmod(physical, local) for physical in row if 0 <= physical < experts.ep_size * local]
        for expert, row in enumerate(placement.table.tolist())
    }
    holders = {expert: places for expert, places in holders.items() if len(places) > 1}
    parameters = [parameter for parameter in experts.parameters() if parameter.requires_grad]
    if not holders or not parameters:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    grads = torch.cat([parameter.grad.flatten(1) for parameter in parameters if parameter.grad is not None], dim=1)
    own = {expert: place for expert, places in holders.items() for holder, place in places if holder == rank}
    # What two ranks hold in common both know, and in the same order: no counts are exchanged.
    common = [
        [expert for expert in own if other != rank and any(holder == other for holder, _ in holders[expert])]
        for other in range(experts.ep_size)
    ]
    sizes = [len(of_rank) for of_rank in common]
    order = [own[expert] for of_rank in common for expert in of_rank]
    rows = grads[torch.tensor(order, dtype=torch.long, device=grads.device)]
    received = exchange.wait(exchange.start(rows, sizes, sizes, experts.group_name))
    parts = torch.split(received, sizes)
    for expert, place in own.items():
        terms = [
            grads[place] if holder == rank else parts[holder][common[holder].index(expert)]
            for holder, _ in holders[expert]
        ]
        total = terms[0].clone()
        for term in terms[1:]:
            total += term
        for parameter, part in zip(parameters, torch.split(total, [p[0].numel() for p in parameters]), strict=True):
            if parameter.grad is not None:
                parameter.grad[place].copy_(part.view_as(parameter.grad[place]))
