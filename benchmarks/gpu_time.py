"""Times on a GPU: interleaved samples by device events, the cache emptied before each, and the card's two ceilings."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from torch_moe.testing.timing import Timing

FLUSH_BYTES = 256 << 20  # more than the L2 of any GPU; writing it also lets the host run ahead of the device


@dataclass(frozen=True)
class Ceilings:
    """What the card does at best, measured in the same process as what is compared with it."""

    copy_gbytes: float  # GB/s of a large copy, bytes read plus bytes written
    dense_tflops: float  # TFLOP/s of a large dense product in bf16, on normal random numbers


def synchronize(device: torch.device) -> None:
    """Wait until the device has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(candidates: Mapping[str, Callable[[], object]], device: torch.device, rounds: int) -> dict[str, Timing]:
    """Time each candidate once per round, in an order that rotates, after two calls of each to warm up."""
    scratch = torch.empty(FLUSH_BYTES if device.type == "cuda" else 1, dtype=torch.uint8, device=device)
    for call in candidates.values():
        call()
        call()
    synchronize(device)
    names = list(candidates)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        start = number % max(1, len(names))
        for name in names[start:] + names[:start]:
            scratch.zero_()
            samples[name].append(_sample(candidates[name], device))
    return {name: Timing(tuple(seconds)) for name, seconds in samples.items()}


def _sample(call: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3


def graphed(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """Return a replay of the call's kernels: without the gaps that the host leaves between small launches."""
    if device.type != "cuda":
        return call
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def measure_ceilings(device: torch.device, rounds: int, *, small: bool = False) -> Ceilings:
    """Measure the copy bandwidth on 2 GiB and the dense rate on 8192 x 8192 x 8192."""
    count, width = (1 << 16, 64) if small else (1 << 30, 8192)
    source = torch.randn(count >> 1, device=device)
    target = torch.empty_like(source)
    left, right = (torch.randn(width, width, device=device).bfloat16() for _ in range(2))
    timings = measure({"copy": lambda: target.copy_(source), "dense": lambda: left @ right}, device, rounds)
    return Ceilings(
        copy_gbytes=2 * source.nbytes / timings["copy"].median / 1e9,
        dense_tflops=2 * width**3 / timings["dense"].median / 1e12,
    )


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the norm of the difference over the norm of what is expected; infinite where it is not finite."""
    pieces = zip(actual.flatten().split(1 << 26), expected.flatten().split(1 << 26), strict=True)  # fp64 takes memory
    squares = [((a.double() - e.double()).square().sum(), e.double().square().sum()) for a, e in pieces]
    ratio = (sum(s[0] for s in squares) / sum(s[1] for s in squares)) ** 0.5
    return float(ratio) if ratio == ratio else float("inf")


def spread_text(timing: Timing) -> str:
    """Return "median ms +- spread %"."""
    return f"{1e3 * timing.median:9.3f} ms +-{100 * timing.spread:4.1f} %"
