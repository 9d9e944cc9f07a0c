r"""How many chunks: a fit of what exchanges cost, measured on the group itself.

An exchange of n bytes takes :math:`\alpha + n / \beta`. In C chunks, one of which is computed while the others travel,
dispatch, compute and combine take about

.. math:: t(C) = 2 C\,\alpha + (d + x + c) / C + (1 - 1/C) \max(d + c,\; x)

with :math:`d, c` the time of the bytes each way and :math:`x` that of the experts: the first chunk arrives and the last
one returns while nothing is computed; in between the slower of wire and experts is what takes time. C = 1 is serial.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from torch_moe.distributed import exchange
from torch_moe.distributed.layer import ExpertParallel

_CANDIDATES = (1, 2, 4, 8, 16)
# More chunks have to promise, and to gain, this much: neither a model nor a noisy machine is any better.
_LEAST_GAIN = 0.05


class ExchangeCost(NamedTuple):
    """What an exchange costs: ``latency + bytes / bandwidth``.

    Attributes
    ----------
    latency : float
        Seconds that any exchange takes.
    bandwidth : float
        Bytes per second that leave a rank.
    """

    latency: float
    bandwidth: float

    def seconds(self, num_bytes: float) -> float:
        """Return the time of one exchange."""
        return self.latency + num_bytes / self.bandwidth


def measure_exchange(layer: ExpertParallel, *, num_bytes: int = 1 << 20, rounds: int = 5) -> ExchangeCost:
    """Time a tiny and a large exchange on the layer's group; every rank has to call this, and gets the same.

    Parameters
    ----------
    layer : ExpertParallel
        Whose group and device are measured.
    num_bytes : int, default=1048576
        What the large one sends to each rank.
    rounds : int, default=5
        Exchanges of either size; the medians count, and of the ranks the slowest.

    Returns
    -------
    ExchangeCost
        The fit. Bytes are those that leave a rank.
    """
    experts = layer.experts
    ranks, device = experts.ep_size, torch.device(experts.mesh.device_type)
    times = []
    for size in (16, num_bytes):
        rows, equal = torch.zeros(ranks, size, dtype=torch.uint8, device=device), [1] * ranks
        times.append(_median(lambda: exchange.wait(exchange.start(rows, equal, equal, experts.group_name)), rounds))  # noqa: B023
    latency, large = _slowest(times, experts.group_name, device)
    away = (ranks - 1) * (num_bytes - 16)
    return ExchangeCost(latency, max(away, 1) / max(large - latency, 1e-9))


def tune_chunks(layer: ExpertParallel, hidden_states: Tensor, *, rounds: int = 3, backward: bool = False) -> int:
    """Set ``layer.experts.num_chunks`` to what is fastest for such a batch; every rank has to call this.

    The fit proposes a number from the exchange's cost and the experts' time (one forward less its exchange); then that,
    half, double, and a single chunk are timed on the layer itself. The fewest chunks within 5 % of the fastest are
    taken. The bits of results do not change.

    Parameters
    ----------
    layer : ExpertParallel
        The layer, in the mode it will run in.
    hidden_states : Tensor of shape (..., hidden_size)
        A batch of the usual size.
    rounds : int, default=3
        Runs of each kind that are timed. The quickest counts, as others only disturb; of the ranks the slowest.
    backward : bool, default=False
        Time forward and backward, not the forward alone. Gradients of the layer are left as they are.

    Returns
    -------
    int
        The number of chunks, the same on every rank.
    """
    experts = layer.experts
    device = torch.device(experts.mesh.device_type)
    cost = measure_exchange(layer)
    experts.num_chunks = 1
    tokens = hidden_states.detach().reshape(-1, hidden_states.shape[-1])
    with torch.no_grad():
        _, weights, ids = layer.router(tokens)
        sent = experts.send(tokens, weights, ids)
        rows = int(sent.plan.rank_offsets[-1]) - int(sent.plan.counts[experts.ep_rank, 0])
        dispatch, combine = rows * sent.received[0].shape[1], rows * tokens.shape[1] * tokens.element_size()
        experts.finish(sent)
        forward = _median(lambda: experts.finish(experts.send(tokens, weights, ids)), rounds)
    forward, send, back = _slowest([forward, dispatch, combine], experts.group_name, device)
    serial = cost.seconds(send) + cost.seconds(back)
    fitted = best_chunks(cost, send, back, max(forward - serial, 0.0))

    candidates = sorted({1, max(1, fitted // 2), fitted, 2 * fitted})
    times: dict[int, list[float]] = {chunks: [] for chunks in candidates}
    for _ in range(rounds):  # interleaved: what disturbs the machine for a while disturbs all
        for chunks, samples in times.items():
            experts.num_chunks = chunks
            samples.append(_median(lambda: _run(layer, tokens, backward), 1))
    least = _slowest([min(samples) for samples in times.values()], experts.group_name, device)
    enough = min(least) / (1 - _LEAST_GAIN)
    chunks = next(number for number, seconds in zip(candidates, least, strict=True) if seconds <= enough)
    experts.num_chunks = chunks
    return chunks


def _run(layer: ExpertParallel, tokens: Tensor, backward: bool) -> Tensor:
    if not backward:
        with torch.no_grad():
            output: Tensor = layer(tokens)
        return output
    leaf = tokens.clone().requires_grad_()
    wanted = [leaf, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]
    output = layer(leaf)
    return torch.autograd.grad(output, wanted, torch.ones_like(output), allow_unused=True)[0]


def best_chunks(cost: ExchangeCost, dispatch_bytes: float, combine_bytes: float, compute: float) -> int:
    """Return the number of chunks that the model of this module calls fastest, 1 unless others promise 5 %.

    Parameters
    ----------
    cost : ExchangeCost
        Latency and bandwidth of an exchange.
    dispatch_bytes, combine_bytes : float
        What a rank sends before and after its experts.
    compute : float
        Seconds of the experts.

    Returns
    -------
    int
        One of the numbers that are considered.
    """
    d, c = dispatch_bytes / cost.bandwidth, combine_bytes / cost.bandwidth

    def seconds(chunks: int) -> float:
        rest = (chunks - 1) / chunks
        return 2 * chunks * cost.latency + (d + c + compute) / chunks + max((d + c) * rest, compute * rest)

    best = min(_CANDIDATES, key=seconds)
    return best if seconds(best) < (1 - _LEAST_GAIN) * seconds(1) else 1


def _median(call: Callable[[], Tensor], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        result = call()
        if result.is_cuda:
            torch.cuda.synchronize(result.device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _slowest(numbers: list[float], group_name: str, device: torch.device) -> list[float]:
    """Return the largest of each number over the ranks: all ranks decide by the same."""
    own = torch.tensor(numbers, dtype=torch.float64, device=device)
    largest: list[float] = exchange.wait(torch.ops._c10d_functional.all_reduce(own, "max", group_name)).tolist()
    return largest
