"""Experts that go to other ranks: a new placement for a layer in training, or the same experts on fewer ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, distributed, nn

from torch_moe.distributed import exchange
from torch_moe.distributed.layer import ExpertParallel
from torch_moe.nn.layer import OPTIONAL_PARTS, MoE

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    from torch_moe.distributed.placement import Placement


@torch.no_grad()
def move_experts(
    layer: ExpertParallel,
    placement: Placement,
    group: DeviceMesh | ProcessGroup | None = None,
    *,
    optimizer: torch.optim.Optimizer | None = None,
) -> ExpertParallel:
    """Return the layer with its experts placed anew: each comes from a rank that has it, in one exchange per parameter.

    Parameters
    ----------
    layer : ExpertParallel
        With any placement. All but its experts, and its options, are those of the result; its experts are given up.
    placement : Placement
        Which rank of ``group`` computes which expert from now on.
    group : DeviceMesh or ProcessGroup, default=None
        The ranks from now on, each of which calls this: after a loss, those that are left (:func:`regroup`). None: the
        same as before.
    optimizer : Optimizer, default=None
        That has the layer's parameters: it gets the new ones in their place, with the moments of the moved experts.

    Returns
    -------
    ExpertParallel
        The layer over ``group``. Gradients are not moved.

    Raises
    ------
    ValueError
        On every rank alike, if no rank of the group has an expert that the placement wants.
    """
    old = layer.experts
    whole = _whole(layer)
    options = {name: getattr(old, name) for name in ("num_chunks", "wire", "check")}
    moved = ExpertParallel(
        whole, old.mesh if group is None else group, placement=placement, capacity=old.capacity or None, **options
    )
    new = moved.experts
    # Ranks are told apart by their number in the default group.
    places = dict(enumerate(distributed.get_process_group_ranks(old.mesh.get_group())))
    had = {number: old.placement.experts_of(rank) for rank, number in places.items()}
    ranks = distributed.get_process_group_ranks(new.mesh.get_group())
    before = [had.get(number, []) for number in ranks]
    after = [new.placement.experts_of(rank) for rank in range(len(ranks))]
    missing = sorted({e for held in after for e in held if e >= 0} - {e for held in before for e in held})
    if missing:
        raise ValueError(
            f"move_experts: experts {missing} are on no rank of the group (leave them out, or load a checkpoint)"
        )
    for name, parameter in old.named_parameters(recurse=False):
        tensor = _moved(exchange.local(parameter.detach()), before, after, new.ep_rank, new.group_name)
        replacement = nn.Parameter(tensor, requires_grad=parameter.requires_grad)
        setattr(new, name, replacement)
        if optimizer is not None:
            state = {
                key: _moved(exchange.local(value), before, after, new.ep_rank, new.group_name)
                if isinstance(value, Tensor) and value.shape == parameter.shape
                else value
                for key, value in _state_of(optimizer, parameter).items()
            }
            _replace(optimizer, parameter, replacement, state)
    new._table = placement.table.to(new.down_proj.device)
    return moved.train(layer.training)


def _whole(layer: ExpertParallel) -> MoE:
    """Return the layer in one process, its experts without memory."""
    with torch.device("meta"):
        whole = MoE.from_config(layer.config)
    whole.router = layer.router
    for name in OPTIONAL_PARTS:
        setattr(whole, name, getattr(layer, name))
    for name, parameter in layer.experts.named_parameters(recurse=False):
        getattr(whole.experts, name).requires_grad_(parameter.requires_grad)
    return whole


def _moved(own: Tensor, before: list[list[int]], after: list[list[int]], rank: int, group_name: str) -> Tensor:
    """Return ``own[before[rank].index(e)]`` for each expert ``e`` of ``after[rank]``, wherever it is; zeros for -1."""
    # Of several holders the next one after the rank that asks: the work is spread, and every rank knows who sends.
    wanted: list[list[list[int]]] = [[[] for _ in after] for _ in before]  # [from][to]: experts
    for to, held in enumerate(after):
        for expert in held:
            if expert >= 0 and expert not in before[to]:
                holders = [number for number, theirs in enumerate(before) if expert in theirs]
                wanted[min(holders, key=lambda number: (number - to) % len(before))][to].append(expert)
    send, receive = [len(of) for of in wanted[rank]], [len(of[rank]) for of in wanted]
    order = [before[rank].index(expert) for experts in wanted[rank] for expert in experts]
    rows = own[torch.tensor(order, dtype=torch.long, device=own.device)]
    arrived = exchange.wait(exchange.start(rows, send, receive, group_name))
    result = own.new_zeros((len(after[rank]), *own.shape[1:]))
    come = [expert for of in wanted for expert in of[rank]]
    for place, expert in enumerate(after[rank]):
        if expert >= 0:
            kept = expert in before[rank]
            result[place] = own[before[rank].index(expert)] if kept else arrived[come.index(expert)]
    return result


def _state_of(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, object]:
    state: dict[str, object] = optimizer.state.get(parameter, {})
    return state


def _replace(optimizer: torch.optim.Optimizer, old: Tensor, new: nn.Parameter, state: dict[str, object]) -> None:
    for group in optimizer.param_groups:
        group["params"] = [new if parameter is old else parameter for parameter in group["params"]]
    if optimizer.state.pop(old, None) is not None:
        optimizer.state[new] = state
