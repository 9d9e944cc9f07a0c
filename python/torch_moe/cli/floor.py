"""The floor: no implementation on this machine can be faster than its arithmetic or its memory.

    floor = max(FLOPs / measured arithmetic rate, bytes / measured read bandwidth)

FLOPs of the forward: 2 R (P + I) H for the experts and 2 T H E for the router; forward and backward is three times
that (each GEMM has two gradients of its own size). Bytes: the weights of the experts that got a token, once in the
forward; in the backward they are read again and a gradient of every expert is written.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from torch_moe import _C
from torch_moe.cli.shapes import LayerShape
from torch_moe.testing.timing import interleave

# Far more than any cache, so that the bandwidth is that of memory.
BANDWIDTH_MEBIBYTES = 1024
SECONDS = 0.4
MATMUL_SIZE = 1536


@dataclass(frozen=True)
class Machine:
    """Measured limits, for all threads together."""

    gflops: float
    read_gbytes: float

    def best(self, other: Machine) -> Machine:
        """Return the faster of two readings: a slow one only tells that others used the machine."""
        return Machine(max(self.gflops, other.gflops), max(self.read_gbytes, other.read_gbytes))


@dataclass(frozen=True)
class Work:
    """What one call must do at the least."""

    flops: float
    bytes: float

    def floor(self, machine: Machine) -> float:
        """Return the least time in seconds."""
        return max(self.flops / (machine.gflops * 1e9), self.bytes / (machine.read_gbytes * 1e9))


def measure(dtype: torch.dtype, available: int) -> Machine:
    """Measure the limits now, with the threads torch is set to.

    Parameters
    ----------
    dtype : torch.dtype
        The rate of arithmetic depends on it: that of fp32 FMAs, or of a matmul where that is faster.
    available : int
        Free memory in bytes; the bandwidth test takes at most an eighth of it.
    """
    return read(dtype, memory_reader(available))


def memory_reader(available: int) -> _C.MemoryReader:
    """Return memory to read, an eighth of what is available at most."""
    return _C.MemoryReader(max(64, min(BANDWIDTH_MEBIBYTES, available // 8 >> 20)))


def read(dtype: torch.dtype, memory: _C.MemoryReader) -> Machine:
    """Do what `measure` does, with memory at hand."""
    rate = _C.fma_rate(seconds=SECONDS)
    if dtype != torch.float32:
        rate = max(rate, _matmul_gflops(dtype))
    return Machine(rate, memory.best(SECONDS))


def spin() -> float:
    """Multiply and add on registers for a few milliseconds, by the fastest instruction set; return GFLOP/s."""
    return _by_the_fastest(lambda: _C.fma_rate(seconds=0.0))


def cached_spin() -> float:
    """Do the same with operands in the first-level caches, as the tiles of a GEMM do; return GFLOP/s."""
    return _by_the_fastest(lambda: _C.tile_rate(seconds=0.0))


def _by_the_fastest(rate: Callable[[], float]) -> float:
    before = _C.isa()
    _C.set_isa(_C.available_isas()[0])
    try:
        return rate()
    finally:
        _C.set_isa(before)


def _matmul_gflops(dtype: torch.dtype) -> float:
    """Return the rate of torch's own large matmul: it knows the processor's units for 16-bit products, FMAs do not."""
    factor = torch.randn(MATMUL_SIZE, MATMUL_SIZE).to(dtype)
    with torch.no_grad():
        fastest = min(interleave({"matmul": lambda: factor @ factor}, rounds=3)["matmul"].samples)
    return 2e-9 * MATMUL_SIZE**3 / fastest


def moe_work(
    shape: LayerShape,
    tokens_per_expert: tuple[int, ...],
    element_size: int,
    *,
    backward: bool,
    given_routing: bool = False,
) -> Work:
    """Count the operations and bytes of one call of the MoE layer.

    Parameters
    ----------
    shape : LayerShape
        Sizes.
    tokens_per_expert : tuple of int
        The routing; experts without tokens cost nothing in the forward.
    element_size : int
        Bytes per weight.
    backward : bool
        Whether the call is forward and backward, or the forward alone.
    given_routing : bool, default=False
        Whether the router's work is left out.
    """
    hit = sum(count > 0 for count in tokens_per_expert)
    router_flops = 0.0 if given_routing else 2.0 * shape.num_tokens * shape.hidden_size * shape.num_experts
    flops = _ffn_flops(shape, sum(tokens_per_expert)) + router_flops
    return _work(shape, flops, hit, shape.num_experts, element_size, backward)


def dense_work(shape: LayerShape, num_experts: int, element_size: int, *, backward: bool) -> Work:
    """Count the same for a dense FFN as large as `num_experts` experts, which every token passes."""
    flops = _ffn_flops(shape, num_experts * shape.num_tokens)
    return _work(shape, flops, num_experts, num_experts, element_size, backward)


def _ffn_flops(shape: LayerShape, rows: int) -> float:
    return 2.0 * rows * (shape.pre_activation_size + shape.intermediate_size) * shape.hidden_size


def _work(shape: LayerShape, flops: float, read: int, written: int, element_size: int, backward: bool) -> Work:
    expert_bytes = shape.params_per_expert * element_size
    return Work(3 * flops, (2 * read + written) * expert_bytes) if backward else Work(flops, read * expert_bytes)
