"""Experts in a checkpoint: every expert once, as a part of one tensor of all, whichever ranks hold it.

A layer with the identity placement has ``DTensor`` parameters, which torch's checkpoints know. With another placement a
rank's experts are no range of all experts, and several ranks may hold one: :class:`ExpertShards` tells the distributed
checkpoint (DCP) which rows they are, that one holder writes each, and that every holder reads it. What lies on disk is
the same for both, so either loads what the other saved, on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
    from torch.distributed.checkpoint.planner import WriteItem

    from torch_moe.distributed.layer import ShardedExperts

# What torch's checkpoints do with a tensor before they read it.
_COPIES = ("detach", "clone", "_to_copy", "new_empty", "empty_like")


class ExpertShards(Tensor):
    """A rank's experts as rows of a tensor of all experts, for DCP; the memory is that of the rank's own tensor.

    It is nothing to compute with: :attr:`local` is.

    Parameters
    ----------
    local : Tensor of shape (num_held, ...)
        The rank's experts.
    experts : sequence of int
        Which expert each of them is; -1 for none.
    writes : sequence of bool
        Which of them this rank saves: each expert is saved by one rank.
    num_experts : int
        Experts of all ranks.
    lost : sequence of int
        Experts that no rank holds, with which nothing can be saved.
    """

    local: Tensor
    experts: tuple[int, ...]
    writes: tuple[bool, ...]
    lost: tuple[int, ...]

    def __new__(
        cls: type[ExpertShards],
        local: Tensor,
        experts: tuple[int, ...],
        writes: tuple[bool, ...],
        num_experts: int,
        lost: tuple[int, ...] = (),
    ) -> ExpertShards:
        """Make the view of ``local``."""
        size = (num_experts, *local.shape[1:])
        make: Any = Tensor._make_wrapper_subclass
        view: ExpertShards = make(cls, size, dtype=local.dtype, device=local.device)
        view.local, view.experts, view.writes, view.lost = local, experts, writes, lost
        return view

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: torch._ops.OpOverload,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[Any, Any] | None = None,
    ) -> ExpertShards:
        """Copy, and refuse everything else."""
        name, view, options = func.overloadpacket.__name__, args[0], dict(kwargs or {})
        if name not in _COPIES or not isinstance(view, ExpertShards):
            raise NotImplementedError(
                f"ExpertShards: {name} is not for experts that are spread over ranks (use .local)"
            )
        if name == "new_empty":
            name = "empty_like"  # the size is that of all experts, always
        local = getattr(torch.ops.aten, name)(view.local.detach(), **options)
        return cls(local, view.experts, view.writes, view.shape[0], view.lost)

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        """Return what it is; its values are those of ``local``."""
        return f"ExpertShards(shape={list(self.shape)}, experts={list(self.experts)}, writes={list(self.writes)})"

    def _chunk(self, expert: int) -> ChunkStorageMetadata:
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

        rest = self.shape[1:]
        return ChunkStorageMetadata(torch.Size([expert, *[0] * len(rest)]), torch.Size([1, *rest]))

    def __create_write_items__(self, fqn: str, view: ExpertShards) -> list[WriteItem]:
        """Tell DCP what this rank saves."""
        from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
        from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

        if self.lost:
            raise RuntimeError(f"ExpertShards: experts {list(self.lost)} are on no rank, so {fqn} cannot be saved")
        items = []
        for expert, writes in zip(self.experts, self.writes, strict=True):
            if writes:
                chunk = self._chunk(expert)
                data = TensorWriteData(chunk, TensorProperties.create_from_tensor(self.local), self.size())
                items.append(WriteItem(MetadataIndex(fqn, chunk.offsets), WriteItemType.SHARD, tensor_data=data))
        return items

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        """Tell DCP what this rank loads."""
        return [self._chunk(expert) for expert in self.experts if expert >= 0]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        """Return the memory of one expert."""
        assert index.offset is not None
        place = self.experts.index(index.offset[0])
        return self.local[place : place + 1]


def shards_of(experts: ShardedExperts, tensor: Tensor) -> ExpertShards:
    """Return the view of a tensor of a placed layer's own experts."""
    table, local = experts.placement.table.tolist(), experts.placement.num_local_experts
    first = experts.ep_rank * local
    writes = tuple(e >= 0 and table[e][0] == first + place for place, e in enumerate(experts.experts))
    everywhere = range(experts.ep_size * local)
    lost = tuple(e for e, places in enumerate(table) if not any(place in everywhere for place in places))
    return ExpertShards(tensor.detach(), tuple(experts.experts), writes, experts.num_experts, lost)


def expert_shards(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state dict in which tensors of experts stand for all experts: for DCP to save and load.

    The layers' own ``state_dict`` does this by itself. An optimizer's does not: its averages would be saved by rank,
    replicas and all. Loading fills the memory of the tensors that are in ``state``.

    Parameters
    ----------
    model : Module
        With :class:`ExpertParallel` layers; those with a placement are concerned.
    state : mapping
        By the model's parameter names, at any depth: what ``get_optimizer_state_dict`` returns.

    Returns
    -------
    dict
        A copy; the tensors share memory.

    Examples
    --------
    >>> expert_shards(nn.Linear(2, 2), {"state": {"weight": {"step": 3}}})
    {'state': {'weight': {'step': 3}}}
    """
    from torch_moe.distributed.layer import ShardedExperts

    owners = {
        f"{name}.{of}" if name else of: (module, parameter.shape)
        for name, module in model.named_modules()
        if isinstance(module, ShardedExperts) and module._table is not None
        for of, parameter in module.named_parameters()
    }

    def view(value: object, owner: tuple[ShardedExperts, torch.Size] | None) -> object:
        if isinstance(value, Mapping):
            return {name: view(part, owners.get(name, owner)) for name, part in value.items()}
        if owner is not None and isinstance(value, Tensor) and value.shape == owner[1]:
            return shards_of(owner[0], value)
        return value

    return {name: view(part, owners.get(name)) for name, part in state.items()}


def save_experts(experts: nn.Module, state_dict: dict[str, Any], prefix: str, _: object) -> None:
    """State-dict hook of a placed layer: its parameters, as a part of all experts."""
    for name, parameter in experts.named_parameters(recurse=False):
        if prefix + name in state_dict:
            state_dict[prefix + name] = shards_of(experts, parameter)  # type: ignore[arg-type]


def load_experts(experts: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
    """Take this rank's experts, from what :func:`save_experts` made or from a plain tensor of all experts."""
    held = [max(expert, 0) for expert in experts.experts]  # type: ignore[union-attr]
    for name in experts._parameters:
        value = state_dict.get(prefix + name)
        if isinstance(value, ExpertShards):
            state_dict[prefix + name] = value.local
        elif isinstance(value, Tensor) and not isinstance(value, DTensor) and len(value) == experts.num_experts:
            state_dict[prefix + name] = value.detach()[torch.tensor(held, dtype=torch.long, device=value.device)]
