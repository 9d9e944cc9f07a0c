"""Placement: which rank computes which expert."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Placement(NamedTuple):
    """Where experts are computed, as data for :func:`torch_moe.ops.ep_plan`.

    Rank ``r`` owns the physical experts ``[r * num_local_experts, (r + 1) * num_local_experts)``; some of them may be
    nobody's.

    Attributes
    ----------
    table : Tensor of shape (num_experts, num_replicas), dtype=int32
        The physical experts of each expert, padded with -1 at the end. An expert without any is skipped.
    num_local_experts : int
        Physical experts per rank.
    """

    table: Tensor
    num_local_experts: int

    @classmethod
    def identity(cls, num_experts: int, ep_size: int) -> Placement:
        """Return the placement of ``DTensor``'s ``Shard(0)``: each rank the next ``ceil(num_experts / ep_size)``.

        Parameters
        ----------
        num_experts : int
            Experts of all ranks.
        ep_size : int
            Number of ranks.

        Returns
        -------
        Placement
            With one replica of each expert.
        """
        table = torch.arange(num_experts, dtype=torch.int32).unsqueeze(1)
        return cls(table, -(-num_experts // ep_size))

    @property
    def num_experts(self) -> int:
        """Number of experts that routers choose from."""
        return self.table.shape[0]

    def experts_of(self, rank: int) -> list[int]:
        """Return which expert each physical expert of a rank holds.

        Parameters
        ----------
        rank : int
            Of the group.

        Returns
        -------
        list of int
            In order; -1 for one that is nobody's. Those at the end that are nobody's are left out: the list is as long
            as the rank's weights.
        """
        held = [-1] * self.num_local_experts
        first = rank * self.num_local_experts
        for expert, replicas in enumerate(self.table.tolist()):
            for physical in replicas:
                if first <= physical < first + self.num_local_experts:
                    held[physical - first] = expert
        while held and held[-1] < 0:
            held.pop()
        return held
