"""Gradients of a model whose parameters live on several meshes: their norm, and their scale."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from torch_moe.distributed.exchange import local
from torch_moe.distributed.layer import ShardedExperts
from torch_moe.distributed.replicas import sum_replica_gradients


@torch.no_grad()
def clip_grad_norm_(parameters: Iterable[Tensor], max_norm: float, norm_type: float = 2.0) -> Tensor:
    """Scale all gradients so that their common norm is at most ``max_norm``; parameters may be on different meshes.

    ``torch.nn.utils.clip_grad_norm_`` refuses to mix meshes, and a norm over one rank's experts alone would differ
    between ranks. Here each mesh's norm is taken over its whole tensors, and the norms are put together.

    Parameters
    ----------
    parameters : iterable of Tensor
        With their gradients: ``DTensor`` on any mesh, and plain tensors, whose gradients must be the same on all ranks:
        not the experts of a layer that has a placement.
    max_norm : float
        The norm wanted at most.
    norm_type : float, default=2.0
        The p of the p-norm; may be infinite.

    Returns
    -------
    Tensor of shape (), dtype=float32 or float64
        The norm before, the same on every rank.

    Raises
    ------
    ValueError
        If ``max_norm`` or ``norm_type`` is not positive.
    """
    if not (max_norm > 0 and norm_type > 0):
        raise ValueError(f"clip_grad_norm_: max_norm and norm_type must be positive, got {max_norm} and {norm_type}")
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not grads:
        return torch.zeros(())
    by_mesh: dict[object, list[Tensor]] = {}
    for grad in grads:
        by_mesh.setdefault((grad.device_mesh, grad.placements) if isinstance(grad, DTensor) else None, []).append(grad)
    norms = []
    for of_mesh in by_mesh.values():
        norm = torch.nn.utils.get_total_norm(of_mesh, norm_type)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        norms.append(norm.to(torch.promote_types(norm.dtype, torch.float32)))
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms), norm_type)
    factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for grad in grads:
        own = local(grad)
        own.mul_(factor.to(own.dtype))
    return total


@torch.no_grad()
def average_gradients(model: nn.Module, group: torch.distributed.ProcessGroup | None = None) -> None:
    """Make gradients those of the mean loss over all ranks of a group, of a model without FSDP.

    A parameter that every rank has (router, attention) has the gradient of this rank's tokens: these are averaged. An
    expert has the sum over the tokens of all ranks, once its replicas' are added: it is divided by their number.

    Parameters
    ----------
    model : Module
        After the backward of each rank's mean loss. Its :class:`ExpertParallel` layers are spread over the group.
    group : ProcessGroup, default=None
        The ranks; None is the default group.
    """
    ranks = torch.distributed.get_world_size(group)
    of_experts = set()
    for module in model.modules():
        if isinstance(module, ShardedExperts):
            sum_replica_gradients(module)
            of_experts |= {id(parameter) for parameter in module.parameters()}
    for parameter in model.parameters():
        grad = parameter.grad
        if isinstance(grad, DTensor) or id(parameter) in of_experts:
            if grad is not None:
                local(grad).div_(ranks)
            continue
        # A rank whose tokens did not touch a parameter takes part, too.
        if grad is None:
            if not parameter.requires_grad:
                continue
            grad = parameter.grad = torch.zeros_like(parameter)
        torch.distributed.all_reduce(grad, group=group)
        grad.div_(ranks)
