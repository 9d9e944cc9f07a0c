"""Exchange of rows between ranks: the functional collectives of torch.distributed, and what is agreed beforehand.

An exchange that was started is a tensor whose content is there after :func:`wait`: several can be in flight. Groups go
by name, so that operators and compiled graphs can carry them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def start(rows: Tensor, send: Sequence[int], receive: Sequence[int], group_name: str, *, check: bool = False) -> Tensor:
    """Start to send ``send[d]`` rows to each rank ``d`` and to receive ``receive[d]`` from it, in the order of ranks.

    Parameters
    ----------
    rows : Tensor of shape (sum(send), ...)
        The rows, contiguous.
    send, receive : sequence of int
        One number per rank of the group. Backends do not compare them between ranks: see :func:`check_splits`.
    group_name : str
        Of the process group.
    check : bool, default=False
        Compare the numbers between ranks first.

    Returns
    -------
    Tensor of shape (sum(receive), ...), same dtype
        To be read after :func:`wait`.

    Raises
    ------
    ValueError
        If ``rows`` are not ``sum(send)``.
    RuntimeError
        With ``check``, as :func:`check_splits`.
    """
    if rows.shape[0] != sum(send):
        raise ValueError(f"exchange: rows must have sum(send) = {sum(send)} rows, got {rows.shape[0]}")
    if check:
        check_splits(send, receive, group_name, rows.device)
    received: Tensor = torch.ops._c10d_functional.all_to_all_single(rows, list(receive), list(send), group_name)
    return received


def wait(received: Tensor) -> Tensor:
    """Wait for what :func:`start` or a functional collective returned, and return it."""
    done: Tensor = torch.ops._c10d_functional.wait_tensor(received)
    return done


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a ``DTensor``; a plain tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def check_splits(send: Sequence[int], receive: Sequence[int], group_name: str, device: torch.device) -> None:
    """Compare the numbers of rows that ranks are about to exchange, and raise the same error on all if two differ.

    Parameters
    ----------
    send, receive : sequence of int
        This rank's numbers, one per rank of the group.
    group_name : str
        Of the process group.
    device : torch.device
        Where its collectives work.

    Raises
    ------
    RuntimeError
        Naming both ranks, the number expected and the number sent.
    """
    own = torch.tensor([*send, *receive], dtype=torch.int64, device=device)
    ranks = len(send)
    table = wait(torch.ops._c10d_functional.all_gather_into_tensor(own, ranks, group_name)).view(ranks, 2, ranks)
    wrong = [
        f"rank {d} expects {expected} rows from rank {s}, which sends {got}"
        for s, (sent, _) in enumerate(table.tolist())
        for d, got in enumerate(sent)
        if (expected := int(table[d, 1, s])) != got
    ]
    if wrong:
        raise RuntimeError("exchange: the numbers of rows must agree between ranks, but " + "; ".join(wrong))


def read_later(flag: Tensor) -> Callable[[], int]:
    """Return a function that gives the flag's value: on a GPU it waits for the flag alone, not for what came after."""
    if not flag.is_cuda:
        return lambda: int(flag)
    host = torch.empty(flag.shape, dtype=flag.dtype, pin_memory=True)
    host.copy_(flag, non_blocking=True)
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()

    def read() -> int:
        event.synchronize()
        return int(host)

    return read


class Blocks:
    """As many rows for each rank, filled or not: sizes that nobody has to read.

    Parameters
    ----------
    num_chunks, ranks, capacity : int
        Blocks of ``capacity`` rows, by (chunk, rank).
    pairs_per_row : int
        At most so many (row, expert) pairs come with a row.
    """

    def __init__(self, num_chunks: int, ranks: int, capacity: int, pairs_per_row: int) -> None:
        self.num_chunks, self.ranks, self.capacity = num_chunks, ranks, capacity
        self.rows_sent = num_chunks * ranks * capacity
        self._pairs = ranks * capacity * pairs_per_row

    def bounds(self, chunk: int) -> slice:
        """Return which of the rows to send are those of a chunk."""
        size = self.ranks * self.capacity
        return slice(chunk * size, (chunk + 1) * size)

    def send(self, chunk: int) -> list[int]:
        """Return the rows of a chunk that go to each rank."""
        return [self.capacity] * self.ranks

    receive = send

    def pairs(self, chunk: int) -> int:
        """Return how many (row, expert) pairs come with a chunk, at most."""
        return self._pairs

    def few_rows(self, limit: int) -> bool:
        """Return whether no expert has more rows than ``limit``: not known, so no."""
        return False

    def slots(self, rank_offsets: Tensor, row_to_slot: Tensor) -> Tensor:
        """Return the slots of rows that lie in blocks; -1 for a row that is not filled."""
        places = torch.arange(self.capacity, dtype=torch.int32, device=rank_offsets.device)
        filled = places < rank_offsets.diff().unsqueeze(1)  # [blocks, capacity]
        rows = (rank_offsets[:-1].unsqueeze(1) + places).where(filled, row_to_slot.shape[0])
        return torch.cat([row_to_slot, row_to_slot.new_full((1,), -1)])[rows.flatten()]

    def returned(self, rows: Tensor, rank_offsets: Tensor, row_to_slot: Tensor) -> tuple[Tensor, Tensor]:
        """Return what came back in blocks as rows of the plan, and their slots."""
        number = torch.arange(row_to_slot.shape[0], dtype=torch.int32, device=rank_offsets.device)
        block = torch.bucketize(number, rank_offsets[1:], right=True, out_int32=True)
        block = block.clamp(max=self.num_chunks * self.ranks - 1)  # rows that the plan left empty are in none
        place = (number - rank_offsets[block]).clamp(max=self.capacity - 1)
        return rows[block * self.capacity + place], row_to_slot


class Counts:
    """Who sends how much to whom: read from the plan and from what the other ranks told.

    Parameters
    ----------
    rank_offsets : Tensor of shape (C * W + 1,), dtype=int32
        Of the :class:`torch_moe.ops.EpPlan`.
    received : Tensor of shape (W, 2 * C + L + 1), dtype=int32
        ``EpPlan.counts`` of every rank for this one; the last column is the size of its rows, in bytes.
    """

    def __init__(self, rank_offsets: Tensor, received: Tensor) -> None:
        ranks = received.shape[0]
        offsets = rank_offsets.tolist()
        self.num_chunks = (len(offsets) - 1) // ranks
        self.rows_sent = offsets[-1]
        self._offsets, self._ranks, self._received = offsets, ranks, received.tolist()

    def bounds(self, chunk: int) -> slice:
        """Return which of the rows to send are those of a chunk."""
        return slice(self._offsets[chunk * self._ranks], self._offsets[(chunk + 1) * self._ranks])

    def send(self, chunk: int) -> list[int]:
        """Return the rows of a chunk that go to each rank."""
        first = chunk * self._ranks
        return [end - begin for begin, end in pairwise(self._offsets[first : first + self._ranks + 1])]

    def receive(self, chunk: int) -> list[int]:
        """Return the rows of a chunk that come from each rank."""
        return [row[chunk] for row in self._received]

    def pairs(self, chunk: int) -> int:
        """Return how many (row, expert) pairs come with a chunk."""
        return sum(row[self.num_chunks + chunk] for row in self._received)

    def few_rows(self, limit: int) -> bool:
        """Return whether no expert of this rank has more rows than ``limit``, over all chunks."""
        loads = [row[2 * self.num_chunks : -1] for row in self._received]
        return max(map(sum, zip(*loads, strict=True)), default=0) <= limit

    def returned(self, rows: Tensor, _: Tensor, row_to_slot: Tensor) -> tuple[Tensor, Tensor]:
        """Return what came back, which is in the order of the plan, and the slots of these rows."""
        return rows, row_to_slot[: self.rows_sent]

    def check(self, row_bytes: int, top_k: int) -> None:
        """Raise where what a rank told cannot be: another row format, or another number of pairs than its experts'."""
        for rank, row in enumerate(self._received):
            if row[-1] != row_bytes:
                raise RuntimeError(
                    f"ep_dispatch: rows from rank {rank} must have {row_bytes} bytes, got {row[-1]} "
                    "(hidden_size, top_k, dtype and wire have to be the same on every rank)"
                )
            rows, pairs = row[: self.num_chunks], row[self.num_chunks : 2 * self.num_chunks]
            loads = row[2 * self.num_chunks : -1]
            possible = all(0 <= r <= p <= r * top_k for r, p in zip(rows, pairs, strict=True))
            if not possible or sum(loads) != sum(pairs):
                raise RuntimeError(
                    f"ep_dispatch: rank {rank} must announce as many pairs as its rows have experts here, "
                    f"got {sum(rows)} rows, {sum(pairs)} pairs and loads {loads}"
                )
