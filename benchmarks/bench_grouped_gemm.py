"""grouped_gemm by rows per expert: which kernel runs, and how near it comes to the machine's floor.

The constants of cpp/cpu/gemm/block.h, which choose the kernel by the number of rows, are read off this table: move one,
build, run again, and compare the two kernels on the rows in between.

    python benchmarks/bench_grouped_gemm.py --n 1536 --k 2048 --dtype bf16 --layout out_in
"""

import argparse

import torch

from torch_moe import _C, ops
from torch_moe.cli.floor import Machine, Work
from torch_moe.cli.problem import DTYPES
from torch_moe.testing.timing import interleave

ROWS = (1, 2, 4, 8, 12, 16, 20, 24, 32, 48, 64, 96, 128, 256)
WEIGHT_BYTES = 256 << 20  # all experts together: far more than the caches, as a model's weights are


def main() -> None:
    """Print one line per number of rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=1536, help="output columns")
    parser.add_argument("--k", type=int, default=2048, help="contracted width")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--layout", choices=("out_in", "in_out"), default="out_in")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()

    dtype = DTYPES[args.dtype]
    num_experts = max(2, WEIGHT_BYTES // (args.n * args.k * dtype.itemsize))
    shape = (args.n, args.k) if args.layout == "out_in" else (args.k, args.n)
    weight = torch.randn(num_experts, *shape, dtype=dtype)
    calls = {}
    for rows in ROWS:
        offsets = torch.arange(num_experts + 1, dtype=torch.int32) * rows
        tokens = torch.randn(num_experts * rows, args.k, dtype=dtype)
        calls[rows] = lambda tokens=tokens, offsets=offsets: ops.grouped_gemm(
            tokens, weight, offsets, weight_layout=args.layout
        )
    memory = _C.MemoryReader(1024)
    before = Machine(_C.fma_rate(seconds=0.5), memory.best())
    timings = interleave({str(rows): call for rows, call in calls.items()}, rounds=args.rounds)
    machine = before.best(Machine(_C.fma_rate(seconds=0.5), memory.best()))

    print(f"{_C.isa()}, {_C.num_threads()} threads, {machine.gflops:.0f} GFLOP/s, {machine.read_gbytes:.1f} GB/s")
    print(f"{'rows':>5} {'kernel':<17} {'ms':>8} {'GFLOP/s':>8} {'% of floor':>10} {'bound by':>9}")
    for rows in ROWS:
        flops = 2.0 * num_experts * rows * args.n * args.k
        work = Work(flops, float(weight.numel() * weight.element_size()))
        seconds = timings[str(rows)].median
        kernel = _C.kernel(rows, args.layout, str(dtype).removeprefix("torch."))
        by_memory = work.bytes / machine.read_gbytes > work.flops / machine.gflops
        print(
            f"{rows:>5} {kernel:<17} {1e3 * seconds:>8.2f} {flops / seconds / 1e9:>8.1f} "
            f"{100 * work.floor(machine) / seconds:>10.1f} {'memory' if by_memory else 'FMAs':>9}"
        )


if __name__ == "__main__":
    main()
