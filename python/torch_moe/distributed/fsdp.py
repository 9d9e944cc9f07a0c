"""Expert parallelism under FSDP2: experts over the dimensions ``ep`` and ``fsdp``, everything else over all ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn
from torch.distributed.tensor import DTensor, Shard

from torch_moe.distributed.layer import ShardedExperts

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def prepare_fsdp(model: nn.Module, mesh: DeviceMesh) -> None:
    """Apply FSDP2 to the experts of every :class:`ExpertParallel` layer; gradients become those of the mean loss.

    Each rank's experts are sharded over the ranks that hold the same ones (``mesh["fsdp"]``). Their gradient is a sum
    over the tokens of all ranks of the mesh and is divided by that number, where FSDP alone would divide by the size of
    its dimension. Then apply ``fully_shard`` to the layers around, over all ranks: it leaves the experts alone.

    Parameters
    ----------
    model : Module
        With layers made by ``ExpertParallel(layer, mesh)``.
    mesh : DeviceMesh
        With the dimensions ``fsdp`` and ``ep``.

    Raises
    ------
    ValueError
        If the mesh lacks one of the dimensions, or a layer has a placement: its experts are no shard of all experts.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    names = mesh.mesh_dim_names or ()
    if not {"fsdp", "ep"} <= set(names):
        raise ValueError(f"prepare_fsdp: mesh must have the dimensions 'fsdp' and 'ep', got {list(names)}")
    layers = [module for module in model.modules() if isinstance(module, ShardedExperts)]
    if any(experts._table is not None for experts in layers):
        raise ValueError("prepare_fsdp: layers must have no placement (their experts are no DTensor)")
    for experts in layers:
        # Shards of whole experts where each rank gets at least one, else parts of every expert.
        fewest = min(p.to_local().shape[0] for p in experts.parameters() if isinstance(p, DTensor))
        placed = None if fewest >= mesh["fsdp"].size() else _by_rows
        sharded: Any = fully_shard(experts, mesh=mesh["fsdp"], shard_placement_fn=placed)
        sharded.set_gradient_divide_factor(float(mesh["fsdp"].size() * mesh["ep"].size()))
        sharded.set_force_sum_reduction_for_comms(True)  # a factor folded into the sum is unknown to gloo
        register_fsdp_forward_method(experts, "finish")


def _by_rows(parameter: nn.Parameter) -> Shard:
    return Shard(1)
