"""What ranks agree on when a layer is spread over them: compared once, so that none waits for another for ever."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from torch_moe.distributed import exchange


def agree(
    owner: str, facts: Mapping[str, object], problem: str | None, group_name: str, ranks: int, device: torch.device
) -> None:
    """Compare this rank's facts with those of all others; every rank raises the same error, or none does.

    Parameters
    ----------
    owner : str
        Who asks: the error starts with it.
    facts : mapping of str to object
        What has to be the same on every rank, by name; compared by ``repr``.
    problem : str or None
        What is wrong on this rank alone, if anything.
    group_name : str
        Of the process group, whose communicator is set up by this, too.
    ranks : int
        Its size.
    device : torch.device
        Where its collectives work.

    Raises
    ------
    ValueError
        If a rank has a problem, or facts differ; it names ranks and values.
    """
    texts = [problem or "", *(f"{name}={value!r}" for name, value in facts.items())]
    told = "\n".join(texts).encode()
    # Two exchanges of a known size: how long, and what. Rows of equal length, padded.
    lengths = _gathered(torch.tensor([len(told)], device=device), ranks, group_name).flatten().tolist()
    padded = torch.zeros(max(lengths), dtype=torch.uint8, device=device)
    padded[: len(told)] = torch.frombuffer(bytearray(told), dtype=torch.uint8).to(device)
    table = _gathered(padded, ranks, group_name).cpu()
    answers = [bytes(row[:n].tolist()).decode().split("\n") for row, n in zip(table, lengths, strict=True)]

    wrong = [f"rank {rank}: {answer[0]}" for rank, answer in enumerate(answers) if answer[0]]
    if wrong:
        raise ValueError(f"{owner}: " + "; ".join(wrong))
    for rank, answer in enumerate(answers):
        if answer != answers[0]:
            pairs = zip(answers[0], answer, strict=False)
            differing = next(((a, b) for a, b in pairs if a != b), (f"{len(answers[0])} facts", f"{len(answer)} facts"))
            raise ValueError(
                f"{owner}: must be the same on every rank: {differing[0]} on rank 0, {differing[1]} on {rank}"
            )
    # The first all-to-all makes connections that no gather has made.
    equal = [1] * ranks
    exchange.wait(exchange.start(torch.zeros(ranks, dtype=torch.uint8, device=device), equal, equal, group_name))


def _gathered(own: Tensor, ranks: int, group_name: str) -> Tensor:
    return exchange.wait(torch.ops._c10d_functional.all_gather_into_tensor(own, ranks, group_name)).view(ranks, -1)
