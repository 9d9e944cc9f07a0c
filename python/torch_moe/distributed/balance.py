"""Where experts should be: placements solved from measured loads."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torch_moe import _C
from torch_moe.distributed.placement import Placement


def solve_placement(
    loads: Tensor,
    ep_size: int,
    *,
    num_redundant: int = 0,
    nodes: int = 1,
    num_groups: int = 1,
    current: Tensor | None = None,
    slack: float = 0.02,
    max_moves: int | None = None,
) -> Tensor:
    """Place experts on ranks so that the busiest rank has little to do and few experts move.

    The objective is the peak over ranks of ``sum(loads[e] / replicas[e])`` over the experts held. Replicas go greedily
    to the expert with most load per replica, then, heaviest first, to the least loaded rank without that expert; a
    local search follows. From ``current``, the search stops as soon as it is within ``slack`` of the fresh solution.

    Parameters
    ----------
    loads : Tensor of shape (num_experts,) or (num_layers, num_experts)
        Tokens of each expert, as :class:`torch_moe.RoutingStats` counts them; finite, not negative, in any scale.
    ep_size : int
        Number of ranks.
    num_redundant : int, default=0
        Replicas beyond one per expert, of the whole layer. A rank has ``ceil((num_experts + num_redundant) / ep_size)``
        places, and never holds an expert twice.
    nodes : int, default=1
        Machines with ``ep_size / nodes`` consecutive ranks each.
    num_groups : int, default=1
        Groups of consecutive experts that the router limits a token to. Where it is a multiple of ``nodes``, a group
        and its replicas stay on one node; else nodes play no part.
    current : Tensor of shape (..., ep_size, places), dtype=int32, default=None
        What this function returned before: the present placement.
    slack : float, default=0.02
        How much above the fresh solution's peak a placement with fewer moves may be.
    max_moves : int, default=None
        Experts per layer that may come to a rank anew; None sets no limit. Needs ``current``.

    Returns
    -------
    Tensor of shape (..., ep_size, places), dtype=int32
        The expert of each place, -1 for an empty one; :func:`placement_of` makes it a layer's :class:`Placement`.

    Raises
    ------
    ValueError
        If a size is impossible, or a load is negative or not finite.

    Notes
    -----
    64 layers of 256 experts, Zipf loads, two busy virtual cores of an EPYC (``benchmarks/bench_placement.py``): 0.08 s
    for 32 ranks with 32 redundant experts, the busiest rank 0.1 % above the mean (EPLB's greedy algorithm: 0.5 %).
    After the loads drifted by 20 %, 31 of 288 experts move from ``current`` to come within 2 %; a fresh solution moves
    269.

    Examples
    --------
    >>> solve_placement(torch.tensor([9.0, 1.0, 1.0, 1.0]), ep_size=2, num_redundant=2).sort().values
    tensor([[0, 1, 2],
            [0, 1, 3]], dtype=torch.int32)
    """
    _require(loads.dim() in (1, 2), f"loads must have 1 or 2 dimensions, got shape {list(loads.shape)}")
    _require(loads.shape[-1] >= 1, "loads must be of at least one expert, got none")
    flat = loads.detach().to("cpu", torch.float64).reshape(-1, loads.shape[-1])
    num_layers, num_experts = flat.shape
    _require(bool((flat >= 0).all() and flat.isfinite().all()), "loads must be finite and not negative")
    _require(ep_size >= 1, f"ep_size must be at least 1, got {ep_size}")
    _require(nodes >= 1 and ep_size % nodes == 0, f"nodes must divide ep_size = {ep_size}, got {nodes}")
    _require(
        num_groups >= 1 and num_experts % num_groups == 0,
        f"num_groups must divide the number of experts, {num_experts}, got {num_groups}",
    )
    ranks = ep_size // nodes if num_groups % nodes == 0 else ep_size
    most = num_experts * (ranks - 1)
    _require(
        0 <= num_redundant <= most,
        f"num_redundant must be in [0, {most}], got {num_redundant} "
        f"(an expert is on each of {ranks} ranks at most once)",
    )
    _require(math.isfinite(slack) and slack >= 0, f"slack must be finite and not negative, got {slack}")
    _require(max_moves is None or current is not None, "max_moves needs the current placement")
    _require(max_moves is None or max_moves >= 0, f"max_moves must not be negative, got {max_moves}")
    places = -(-(num_experts + num_redundant) // ep_size)
    shape = (*loads.shape[:-1], ep_size, places)
    if current is not None:
        _require(tuple(current.shape) == shape, f"current must have shape {list(shape)}, got {list(current.shape)}")
    placed = _C.solve_placement(
        flat.flatten().tolist(),
        [] if current is None else current.to(torch.int32).flatten().tolist(),
        num_layers=num_layers,
        num_experts=num_experts,
        ep_size=ep_size,
        places_per_rank=places,
        num_physical=num_experts + num_redundant,
        nodes=nodes,
        num_groups=num_groups,
        slack=slack,
        max_moves=-1 if max_moves is None else max_moves,
    )
    return torch.tensor(placed, dtype=torch.int32).view(shape)


def placement_of(physical_to_logical: Tensor, num_experts: int) -> Placement:
    """Return one layer's solution as the table that :func:`torch_moe.ops.ep_plan` takes.

    Parameters
    ----------
    physical_to_logical : Tensor of shape (ep_size, places), dtype=int32
        One layer of :func:`solve_placement`.
    num_experts : int
        Number of experts.

    Returns
    -------
    Placement
        The places of each expert; an expert without any is skipped by every router.
    """
    held = physical_to_logical.flatten()
    replicas = torch.zeros(num_experts, dtype=torch.int64).index_add_(
        0, held[held >= 0].long(), torch.ones(int((held >= 0).sum()), dtype=torch.int64)
    )
    table = torch.full((num_experts, max(int(replicas.max()), 1)), -1, dtype=torch.int32)
    used = [0] * num_experts
    for physical, expert in enumerate(held.tolist()):
        if expert >= 0:
            table[expert, used[expert]] = physical
            used[expert] += 1
    return Placement(table, physical_to_logical.shape[1])


def rank_loads(physical_to_logical: Tensor, loads: Tensor) -> Tensor:
    """Return the load of each rank when the replicas of an expert share its tokens evenly.

    Parameters
    ----------
    physical_to_logical : Tensor of shape (..., ep_size, places), dtype=int32
        What :func:`solve_placement` returned.
    loads : Tensor of shape (..., num_experts)
        Tokens of each expert.

    Returns
    -------
    Tensor of shape (..., ep_size), dtype=float64
        ``sum(loads[e] / replicas[e])`` over the experts of the rank. Its maximum over its mean is the imbalance: how
        much longer all ranks take than in perfect balance.
    """
    held = physical_to_logical.flatten(-2).long()  # [..., ep_size * places]
    filled = (held >= 0).double()
    ids = held.clamp(min=0)
    replicas = torch.zeros(loads.shape, dtype=torch.float64).scatter_add_(-1, ids, filled)
    share = loads.double() / replicas.clamp(min=1)
    return (share.gather(-1, ids) * filled).view(physical_to_logical.shape).sum(dim=-1)


def count_moves(before: Tensor, after: Tensor) -> Tensor:
    """Return how many experts come to a rank that did not hold them: weights to send.

    Parameters
    ----------
    before, after : Tensor of shape (..., ep_size, places), dtype=int32
        Two placements.

    Returns
    -------
    Tensor of shape (...), dtype=int64
        Moves per layer.
    """
    held = (after.unsqueeze(-1) == before.unsqueeze(-2)).any(dim=-1)
    return ((after >= 0) & ~held).sum(dim=(-2, -1))


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"solve_placement: {message}")
