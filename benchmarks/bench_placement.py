"""Time and quality of expert placements, against the greedy algorithm that EPLB published.

    python benchmarks/bench_placement.py [--json]

256 experts in 64 layers; loads drawn from Zipf's law and from a log-normal law, then drifted by 20 %. Imbalance is the
load of the busiest rank over the mean, averaged over layers. Moves are experts that come to a rank anew, per layer.
"""

import argparse
import json
import time

import torch

from torch_moe.cli import machine
from torch_moe.distributed import count_moves, rank_loads, solve_placement

LAYERS, EXPERTS = 64, 256
CASES = ((8, 0), (8, 32), (32, 32), (64, 64), (256, 256))  # ranks, redundant experts


def draw(law):
    generator = torch.Generator().manual_seed(0)
    if law == "zipf":
        zipf = 1 / torch.arange(1, EXPERTS + 1).double()
        loads = torch.stack([zipf[torch.randperm(EXPERTS, generator=generator)] for _ in range(LAYERS)])
    else:
        loads = torch.randn(LAYERS, EXPERTS, generator=generator, dtype=torch.float64).exp()
    return loads, loads * (0.2 * torch.randn(loads.shape, generator=generator, dtype=torch.float64)).exp()


def greedy(loads, ranks, redundant):
    """The global policy of EPLB: replicas to the most loaded expert, then heaviest first to the least loaded rank."""
    places, placed = (EXPERTS + redundant) // ranks, []
    for load in loads.tolist():
        count = [1] * EXPERTS
        for _ in range(redundant):
            count[max(range(EXPERTS), key=lambda e: load[e] / count[e])] += 1
        replicas = sorted((-load[e] / count[e], e) for e in range(EXPERTS) for _ in range(count[e]))
        held, sums = [[] for _ in range(ranks)], [0.0] * ranks
        for share, expert in replicas:
            rank = min((r for r in range(ranks) if len(held[r]) < places), key=sums.__getitem__)
            held[rank].append(expert)
            sums[rank] -= share
        placed.append(held)
    return torch.tensor(placed, dtype=torch.int32)


def imbalance(placed, loads):
    per_rank = rank_loads(placed, loads)
    return (per_rank.amax(dim=-1) / per_rank.mean(dim=-1)).mean().item()


def timed(function, *arguments, **options):
    start = time.perf_counter()
    result = function(*arguments, **options)
    return result, time.perf_counter() - start


def twice_on_a_rank(placed):
    ordered = placed.sort(dim=-1).values
    return int(((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).sum())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="JSON lines, which also say date, commit and machine")
    options = parser.parse_args()
    environment = machine.describe()
    for law in ("zipf", "lognormal"):
        before, after = draw(law)
        for ranks, redundant in CASES:
            baseline, baseline_seconds = timed(greedy, before, ranks, redundant)
            placed, seconds = timed(solve_placement, before, ranks, num_redundant=redundant)
            kept, kept_seconds = timed(solve_placement, after, ranks, num_redundant=redundant, current=placed)
            fresh = solve_placement(after, ranks, num_redundant=redundant)
            record = {
                "bench": "placement", "law": law, "layers": LAYERS, "experts": EXPERTS, "ranks": ranks,
                "redundant": redundant, "seconds": round(seconds, 4), "seconds_from_current": round(kept_seconds, 4),
                "imbalance": round(imbalance(placed, before), 4),
                "imbalance_greedy": round(imbalance(baseline, before), 4),
                "greedy_twice_on_a_rank": twice_on_a_rank(baseline), "seconds_greedy": round(baseline_seconds, 4),
                "imbalance_drifted": round(imbalance(placed, after), 4),
                "imbalance_kept": round(imbalance(kept, after), 4),
                "imbalance_fresh": round(imbalance(fresh, after), 4),
                "moves_kept": round(count_moves(placed, kept).double().mean().item(), 1),
                "moves_fresh": round(count_moves(placed, fresh).double().mean().item(), 1),
            }  # fmt: skip
            words = "  ".join(f"{name} {value}" for name, value in record.items())
            print(json.dumps({**environment, **record}) if options.json else words)


if __name__ == "__main__":
    main()
