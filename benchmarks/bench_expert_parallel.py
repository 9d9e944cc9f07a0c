"""What expert parallelism costs one rank beside its experts: bytes per token, time per phase, balance.

All ranks are played by one process, so nothing is exchanged: rank 0 packs its tokens for every rank, and what it gets
is what each of the others would send. Rows per token stand beside W (1 - C(E - E/W, K) / C(E, K)), those of uniform
routing; bytes beside those of K copies per token.

    python benchmarks/bench_expert_parallel.py --ranks 2,4,8 --dtype bf16
"""

import argparse
import statistics
import time

import torch

from torch_moe import ops
from torch_moe.cli.expert_parallel import expected_ranks
from torch_moe.cli.problem import DTYPES
from torch_moe.ops.ep_pack import WIRES
from torch_moe.testing import ROUTINGS, routing


class Rank:
    """Rank 0 of a group whose ranks all have as many tokens."""

    def __init__(self, options: argparse.Namespace, ranks: int) -> None:
        self.options, self.ranks, dtype = options, ranks, DTYPES[options.dtype]
        hidden, inter, experts = options.hidden_size, options.intermediate_size, options.experts
        self.ids = [
            routing(options.routing, options.tokens, experts, options.top_k, seed=rank) for rank in range(ranks)
        ]
        self.tokens = torch.randn(options.tokens, hidden).to(dtype)
        self.weights = torch.rand(options.tokens, options.top_k)
        local = -(-experts // ranks)
        self.gate_up = (torch.randn(local, 2 * inter, hidden) / hidden**0.5).to(dtype)
        self.down = (torch.randn(local, hidden, inter) / inter**0.5).to(dtype)
        self.received, self.pairs, self.loads = self._receive()

    def plan(self, rank: int = 0) -> ops.EpPlan:
        return ops.ep_plan(self.ids[rank], self.options.experts, self.ranks, ep_rank=rank)

    def pack(self, plan: ops.EpPlan) -> torch.Tensor:
        return ops.ep_pack(self.tokens, self.weights, plan, wire=self.options.wire)

    def _receive(self) -> tuple[torch.Tensor, int, list[int]]:
        plans = [self.plan(rank) for rank in range(self.ranks)]
        rows = [self.pack(plan)[: plan.rank_offsets[1]] for plan in plans]
        loads = sum(plan.counts[:, 1] for plan in plans).tolist()
        return torch.cat(rows), loads[0], loads

    def index(self) -> ops.Received:
        like, (hidden, top_k) = self.tokens, (self.options.hidden_size, self.options.top_k)
        local = self.gate_up.shape[0]
        return ops.ep_index(self.received, like, hidden, top_k, local, self.pairs, wire=self.options.wire)

    def experts(self, index: ops.Received) -> torch.Tensor:
        return ops.experts(
            index.hidden_states, self.gate_up, self.down, index.topk_weights, index.plan, row_invariant=True
        )


def measure(options: argparse.Namespace, ranks: int) -> dict[str, float]:
    rank = Rank(options, ranks)
    plan, index = rank.plan(), rank.index()
    packed = rank.pack(plan)
    returned = torch.ops.moe.ep_pack(rank.tokens.repeat(min(ranks, options.top_k), 1), None, None, None, 1, 1)
    phases = {
        "plan": rank.plan,
        "pack": lambda: rank.pack(plan),
        "index": rank.index,
        "experts": lambda: rank.experts(index),
        "reduce": lambda: ops.ep_reduce(returned, rank.tokens, plan, options.hidden_size),
    }
    assert phases["experts"]().isfinite().all()
    times: dict[str, list[float]] = {name: [] for name in phases}
    for _ in range(options.rounds):  # interleaved
        for name, phase in phases.items():
            start = time.perf_counter()
            phase()
            times[name].append(time.perf_counter() - start)
    result = {name: statistics.median(values) * 1e3 for name, values in times.items()}
    own = int(plan.rank_offsets[1])
    result["rows"] = int(plan.rank_offsets[-1]) / options.tokens
    result["formula"] = expected_ranks(options.experts, ranks, options.top_k)
    result["bytes"] = (int(plan.rank_offsets[-1]) - own) * packed.shape[1] / options.tokens
    k_copies = options.top_k * (1 - 1 / ranks) * packed.shape[1]
    result["fewer"] = k_copies / result["bytes"] if result["bytes"] else 1.0  # one rank sends nothing either way
    result["balance"] = max(rank.loads) * ranks / sum(rank.loads)
    return result


def group_sizes(text: str) -> list[int]:
    """Parse numbers of ranks, separated by commas."""
    sizes = [int(number) if number.isdecimal() else 0 for number in text.split(",")]
    if min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"expected numbers of ranks like 2,4,8, got {text!r}")
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=group_sizes, default="2,4,8", help="group sizes (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=4096, help="of each rank (default: %(default)s)")
    parser.add_argument("--hidden-size", type=int, default=2048)
    parser.add_argument("--intermediate-size", type=int, default=768)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--wire", choices=WIRES, default="input")
    parser.add_argument("--routing", choices=ROUTINGS, default="uniform")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    phases = ("plan", "pack", "index", "reduce", "experts")
    print("ranks  " + "  ".join(f"{name:>7}" for name in phases) + " ms   share  rows/token (formula)  "
          "bytes away/token  fewer than K copies  balance")  # fmt: skip
    for ranks in options.ranks:
        result = measure(options, ranks)
        share = sum(result[name] for name in phases[:-1]) / result["experts"]
        print(
            f"{ranks:5}  " + "  ".join(f"{result[name]:7.1f}" for name in phases) + f"     {share:5.1%}"
            f"  {result['rows']:10.3f} ({result['formula']:.3f})  {result['bytes']:16.0f}  {result['fewer']:18.2f}x"
            f"  {result['balance']:7.2f}"
        )


if __name__ == "__main__":
    main()
