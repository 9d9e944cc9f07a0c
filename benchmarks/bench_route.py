"""route against the same arithmetic in eager torch: forward, backward alone, and both.

The eager router is written as published model code writes it: scores, bias, groups by topk and a mask, topk, gather,
sum. Both sides must agree on every id and weight before anything is timed.

    python benchmarks/bench_route.py --tokens 4096 --experts 256 --top-k 8 --groups 8 --topk-groups 4
"""

import argparse

import torch
from torch import Tensor

from torch_moe import _C, ops
from torch_moe.testing import assert_close
from torch_moe.testing.timing import interleave

SCORES = {
    "softmax": lambda z: z.softmax(dim=-1),
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda z: torch.nn.functional.softplus(z).sqrt(),
}
SCALING = 2.5  # of DeepSeek-V3


def eager(logits: Tensor, bias: Tensor, args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Route in plain torch, in the fewest operators that published code needs."""
    scores = SCORES[args.score](logits)
    choice = scores.detach() + bias
    if args.groups > 1:
        grouped = choice.view(len(logits), args.groups, -1)
        best = grouped.topk(2, dim=-1).values.sum(dim=-1).topk(args.topk_groups, dim=-1, sorted=False).indices
        keep = torch.zeros(grouped.shape[:2], dtype=torch.bool).scatter_(1, best, True)
        choice = grouped.masked_fill(~keep[..., None], float("-inf")).flatten(1)
    ids = choice.topk(args.top_k, dim=-1).indices
    weights = scores.gather(1, ids)
    return weights / (weights.sum(dim=-1, keepdim=True) + 1e-20) * SCALING, ids


def main() -> None:
    """Print one line per direction: milliseconds of both, and how many times faster route is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--topk-groups", type=int, default=4)
    parser.add_argument("--score", choices=SCORES, default="sigmoid")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(args.tokens, args.experts, generator=generator).requires_grad_()
    bias = 0.1 * torch.randn(args.experts, generator=generator)
    grad = torch.randn(args.tokens, args.top_k, generator=generator)
    groups = {"num_groups": args.groups, "topk_groups": args.topk_groups}
    routers = {
        "eager": lambda z: eager(z, bias, args),
        "route": lambda z: ops.route(
            z, args.top_k, bias, score_function=args.score, routed_scaling_factor=SCALING, **groups
        ),
    }

    outputs = {name: router(logits) for name, router in routers.items()}
    (eager_weights, eager_ids), (weights, ids) = outputs["eager"], outputs["route"]
    # Two scores that eager torch and the kernel round differently may change places: compare where the ids agree.
    same = (ids == eager_ids).all(dim=1)
    assert same.float().mean() > 0.999, "route and eager torch choose different experts"
    assert_close(weights[same], eager_weights[same].double(), args.experts, args.top_k)
    grads = [torch.autograd.grad(out[0], logits, grad, retain_graph=True)[0][same] for out in outputs.values()]
    assert_close(grads[1], grads[0].double(), args.experts, args.top_k, args.top_k, args.experts)

    directions = {
        "forward": {name: lambda router=router: router(logits.detach()) for name, router in routers.items()},
        "backward": {
            name: lambda out=out: torch.autograd.grad(out[0], logits, grad, retain_graph=True)
            for name, out in outputs.items()
        },
        "forward+backward": {
            name: lambda router=router: torch.autograd.grad(router(logits)[0], logits, grad)
            for name, router in routers.items()
        },
    }
    print(f"{_C.isa()}, {_C.num_threads()} threads, {args}")
    print(f"{'':<17} {'eager ms':>9} {'route ms':>9} {'± %':>5} {'times faster':>13}")
    for direction, calls in directions.items():
        timings = interleave(calls, rounds=args.rounds)
        print(
            f"{direction:<17} {1e3 * timings['eager'].median:>9.2f} {1e3 * timings['route'].median:>9.2f} "
            f"{50 * timings['route'].spread:>5.1f} {timings['eager'].ratio_to(timings['route']):>13.1f}"
        )


if __name__ == "__main__":
    main()
