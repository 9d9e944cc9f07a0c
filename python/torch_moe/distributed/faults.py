"""When a rank is lost: who is left, a group of those, and placements without it.

A killed rank breaks the exchange on the others at once, a hung one when the group's ``timeout`` is over; but backends
say only that a connection closed. :func:`guard` finds out who is missing and names them, :func:`regroup` makes a group
of the others, and :func:`without_ranks` a placement for it.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import distributed

from torch_moe.distributed.placement import Placement

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.distributed_c10d import Store

_KEY = "torch_moe/alive"


class RankLost(RuntimeError):
    """Ranks of a group that no longer answer.

    Attributes
    ----------
    lost : list of int
        The missing ranks, numbered as in the default group.
    survivors : list of int
        The others: the same list on each of them.
    """

    def __init__(self, message: str, lost: list[int], survivors: list[int]) -> None:
        super().__init__(message)
        self.lost = lost
        self.survivors = survivors


def agree_on_survivors(
    store: Store, rank: int, ranks: Sequence[int], *, timeout: float, round_name: str = "0"
) -> list[int]:
    """Return which ranks answer within ``timeout`` seconds; all that answer get the same list.

    Each rank leaves a mark in the store and waits for the others'. Who first stops to wait writes the list, and that
    list holds for all.

    Parameters
    ----------
    store : Store
        That all ranks can reach. It has to outlive the lost ranks: torchrun's does, one inside rank 0 lives as long as
        that.
    rank : int
        This rank.
    ranks : sequence of int
        All that may be there.
    timeout : float
        Seconds to wait for the others.
    round_name : str, default="0"
        Names the occasion: another for each time it is asked.

    Returns
    -------
    list of int
        The ranks that answered, ascending.

    Raises
    ------
    RuntimeError
        If this rank answered too late and the others go on without it.
    """
    prefix = f"{_KEY}/{round_name}"
    store.set(f"{prefix}/{rank}", "1")
    deadline = time.monotonic() + timeout
    there = [rank]
    for other in ranks:
        if other == rank:
            continue
        left = max(deadline - time.monotonic(), 0.001)
        try:
            store.wait([f"{prefix}/{other}"], datetime.timedelta(seconds=left))
        except RuntimeError:  # DistStoreError: not there in time
            continue
        there.append(other)
    told = store.compare_set(f"{prefix}/list", "", ",".join(map(str, sorted(there)))).decode()
    survivors = [int(number) for number in told.split(",")]
    if rank not in survivors:
        raise RuntimeError(f"agree_on_survivors: rank {rank} answered too late, ranks {survivors} go on without it")
    return survivors


@contextmanager
def guard(group: ProcessGroup | None = None, *, timeout: float = 10.0, round_name: str = "0") -> Iterator[None]:
    """Name the ranks that are missing when an exchange inside fails.

    Every rank of the group has to be inside one: those whose exchange failed tell the others that they live.

    Parameters
    ----------
    group : ProcessGroup, default=None
        The group that the code inside uses; None is the default group. Its own ``timeout`` bounds how long a hung rank
        is waited for.
    timeout : float, default=10.0
        Seconds that the survivors wait for each other's sign of life. Longer than they may be apart: ranks that do not
        talk to a lost one learn of it only by their group's timeout.
    round_name : str, default="0"
        As in :func:`agree_on_survivors`: another after every loss.

    Raises
    ------
    RankLost
        On the survivors, in place of the backend's error, if a rank is missing. An error with all ranks alive stays.

    Examples
    --------
    >>> with guard(timeout=5.0):  # outside of any group nothing is guarded
    ...     pass
    """
    try:
        yield
    except RuntimeError as error:
        if not distributed.is_initialized():
            raise
        ranks = distributed.get_process_group_ranks(group or distributed.group.WORLD)
        rank, store = distributed.get_rank(), distributed.distributed_c10d._get_default_store()
        survivors = agree_on_survivors(store, rank, ranks, timeout=timeout, round_name=round_name)
        lost = [other for other in ranks if other not in survivors]
        if not lost:
            raise
        words = f"guard: rank {lost[0]} does" if len(lost) == 1 else f"guard: ranks {lost} do"
        message = f"{words} not answer, {len(survivors)} of {len(ranks)} are left"
        raise RankLost(message, lost, survivors) from error


def regroup(survivors: Sequence[int], *, timeout: float | None = None) -> ProcessGroup:
    """Return a new group of the ranks that are left; only they call it.

    Parameters
    ----------
    survivors : sequence of int
        As :class:`RankLost` names them, the same on each.
    timeout : float, default=None
        Seconds after which an exchange of the group fails; None is the backend's default.

    Returns
    -------
    ProcessGroup
        Its ranks are numbered by their order in ``survivors``.
    """
    limit = None if timeout is None else datetime.timedelta(seconds=timeout)
    made: ProcessGroup = distributed.new_group(list(survivors), timeout=limit, use_local_synchronization=True)
    return made


def without_ranks(placement: Placement, lost: Sequence[int], ep_size: int) -> Placement:
    """Return the placement for the ranks that are left, renumbered: experts that only lost ranks had are left out.

    Tokens skip an expert that is left out, as they skip an id of -1. To move experts instead, solve anew for fewer
    ranks (:func:`solve_placement`) and load the weights from a checkpoint.

    Parameters
    ----------
    placement : Placement
        Of the whole group.
    lost : sequence of int
        Ranks of the group that are gone.
    ep_size : int
        Size of the whole group.

    Returns
    -------
    Placement
        For ``ep_size - len(lost)`` ranks.

    Raises
    ------
    ValueError
        If no rank is left, or one is not of the group.
    """
    left = [rank for rank in range(ep_size) if rank not in lost]
    if not left or any(not 0 <= rank < ep_size for rank in lost):
        raise ValueError(f"without_ranks: lost must leave some of {ep_size} ranks, got {list(lost)}")
    local = placement.num_local_experts
    renumbered = torch.full((ep_size,), -1, dtype=torch.int64)
    renumbered[left] = torch.arange(len(left))
    table = placement.table.long()
    known = (table >= 0) & (table < ep_size * local)
    rank = renumbered[torch.where(known, table // local, 0)]
    moved = torch.where(known & (rank >= 0), rank * local + table % local, -1)
    # The replicas first, then -1; those left keep their order.
    order = (moved < 0).long().argsort(dim=1, stable=True)
    return Placement(moved.gather(1, order).to(torch.int32), local)
