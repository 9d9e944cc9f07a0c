"""Expert parallelism between two simulated machines, over links of 300, 100 and 1000 Mbit/s.

    python benchmarks/bench_expert_parallel_network.py [--output FILE]      # root: it makes network namespaces

One rank per machine, one thread each, runs ExpertParallel: one exchange each way (serial), several chunks, and among
them the number that tune_chunks finds. The experts' width is chosen such that at --balance Mbit/s the exchange of a
forward, at the full rate of the link both ways, takes as long as the experts' work. Beside it K copies per token (plain
dispatchers), and all-gather with reduce-scatter. All are verified against the whole layer on one rank, output and
gradient, and timed interleaved in one process per rank. Medians; the slowest rank counts.
"""

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ep_baselines
import ep_network
import torch
from torch import distributed

from torch_moe import MoE, ops
from torch_moe.cli import machine, report
from torch_moe.distributed import ExpertParallel, tune_chunks
from torch_moe.ops.ep_pack import row_bytes

CHUNKS = (1, 2, 4, 8, 16)
PASSES = ("forward", "forward_backward")


def make(options, width):
    torch.manual_seed(0)
    return MoE(options.hidden, width, options.experts, options.top_k)


def slowest(seconds):
    """The largest of each number over the ranks."""
    numbers = torch.tensor(seconds, dtype=torch.float64)
    distributed.all_reduce(numbers, op=distributed.ReduceOp.MAX)
    return numbers.tolist()


def exchange_seconds(layer, tokens, mbit):
    """What the link takes for the rows of a forward, there and back."""
    _, _, ids = layer.router(tokens)
    plan = ops.ep_plan(ids, layer.config.experts.num_experts, layer.experts.ep_size, ep_rank=layer.experts.ep_rank)
    away = int(plan.rank_offsets[-1]) - int(plan.counts[layer.experts.ep_rank, 0])
    there = row_bytes(tokens.shape[1], tokens.dtype, top_k=ids.shape[1], has_ids=True, has_weights=True)
    return slowest([away * (there + row_bytes(tokens.shape[1], tokens.dtype)) / (mbit * 1e6 / 8)])[0]


def work_seconds(layer, tokens):
    """What the experts' work of a forward takes: that of this rank's tokens on its own experts, all choices."""
    _, weights, ids = layer.router(tokens)
    local = len(layer.experts.experts)
    plan = ops.plan(ids % local, local)
    times = []
    for _ in range(5):
        distributed.barrier()
        start = time.perf_counter()
        layer.experts(tokens, weights, plan)
        times.append(time.perf_counter() - start)
    return slowest([statistics.median(times[1:])])[0]


@torch.no_grad()
def balanced_width(options, tokens):
    """The intermediate size whose work takes as long as the exchange, found by measuring twice."""
    width = 256
    for _ in range(2):
        layer = ExpertParallel(make(options, width), distributed.group.WORLD)
        work, exchange = work_seconds(layer, tokens), exchange_seconds(layer, tokens, options.balance)
        width = max(32, round(width * exchange / work / 32) * 32)
    return width


def verify(name, call, tokens, whole):
    """Hold output and gradient of the tokens against those of the whole layer."""
    expected, actual = tokens.clone().requires_grad_(), tokens.clone().requires_grad_()
    for layer, x in ((whole, expected), (call, actual)):
        output = layer(x)
        output.square().sum().backward()
        x.output = output.detach()
    close = {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(actual.output, expected.output, **close, msg=lambda text: f"{name}: output: {text}")
    torch.testing.assert_close(actual.grad, expected.grad, **close, msg=lambda text: f"{name}: gradient: {text}")


def candidates(layer, tuned):
    def chunked(number):
        def call(x):
            layer.experts.num_chunks = number
            return layer(x)

        return call

    numbers = sorted({*CHUNKS, *tuned})
    named = {"serial" if number == 1 else f"chunks-{number}": chunked(number) for number in numbers}
    named["k-copies"] = lambda x: ep_baselines.k_copies(layer, x)
    named["all-gather"] = lambda x: ep_baselines.all_gather(layer, x)
    return named


def timed(call, tokens, grads):
    """Seconds of a forward, and of a forward and backward, of the slowest rank."""
    distributed.barrier()
    start = time.perf_counter()
    with torch.no_grad():
        call(tokens)
    middle = time.perf_counter()
    distributed.barrier()
    again = time.perf_counter()
    x = tokens.clone().requires_grad_()
    call(x).backward(grads)
    return slowest([middle - start, time.perf_counter() - again])


def worker(options):
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=60)
    distributed.init_process_group("gloo", rank=rank, world_size=2, timeout=timeout)
    if options.realtime:
        # The threads of gloo, which are there by now, go first, as they do in the usual class because they sleep more.
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    generator = torch.Generator().manual_seed(1 + rank)
    tokens, grads = torch.randn(2, options.tokens, options.hidden, generator=generator)
    width = options.intermediate or balanced_width(options, tokens)
    whole = make(options, width)
    layer = ExpertParallel(whole, distributed.group.WORLD)
    with torch.no_grad():
        work, exchange = work_seconds(layer, tokens), exchange_seconds(layer, tokens, options.mbit)
    tuned = {name: tune_chunks(layer, tokens, rounds=5, backward=name != "forward") for name in PASSES}
    named = candidates(layer, tuned.values())
    for name, call in named.items():
        verify(name, call, tokens, whole)
    del whole
    times = {name: [] for name in named}
    for _ in range(options.rounds):
        for name, call in named.items():
            times[name].append([1e3 * seconds for seconds in timed(call, tokens, grads)])
            layer.zero_grad()
    if rank == 0:
        record = {
            "bench": "expert_parallel_network", "mbit": options.mbit,
            **{name: getattr(options, name) for name in ("tokens", "hidden", "experts", "top_k", "rounds")},
            "intermediate": width, "work_ms": round(1e3 * work, 1), "exchange_ms": round(1e3 * exchange, 1),
        }  # fmt: skip
        for place, name in enumerate(PASSES):
            record[name] = summary({key: [pair[place] for pair in pairs] for key, pairs in times.items()}, tuned[name])
        options.record.write_text(json.dumps(record))
    distributed.destroy_process_group()


def summary(times, tuned):
    """Medians, spread, and what chunks gain."""
    medians = {name: round(statistics.median(samples), 1) for name, samples in times.items()}
    best = min(value for name, value in medians.items() if name.startswith("chunks"))
    chosen = medians["serial" if tuned == 1 else f"chunks-{tuned}"]
    return {
        "tuned_chunks": tuned, "ms": medians,
        "spread_ms": {name: [round(min(samples), 1), round(max(samples), 1)] for name, samples in times.items()},
        "serial_over_tuned": round(medians["serial"] / chosen, 2),
        "serial_over_best": round(medians["serial"] / best, 2),
        "k_copies_over_tuned": round(medians["k-copies"] / chosen, 2),
        "all_gather_over_tuned": round(medians["all-gather"] / chosen, 2),
    }  # fmt: skip


def measure(options, mbit, intermediate, folder):
    """Run both ranks over a link of ``mbit`` and return the record of rank 0."""
    record = Path(folder) / f"{mbit}.json"
    command = ["chrt", "-f", "2"] if options.realtime else []
    command += [sys.executable, __file__, "--worker", "--mbit", str(mbit), "--record", str(record)]
    given = {name: getattr(options, name) for name in ("rounds", "balance", "tokens", "hidden", "experts", "top_k")}
    for name, value in {**given, "intermediate": intermediate}.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    command += ["--realtime"] if options.realtime else []
    with ep_network.two_nodes(mbit) as nodes:
        ranks = [
            ep_network.start(*node, rank, command, stderr=subprocess.PIPE, text=True) for rank, node in enumerate(nodes)
        ]
        try:
            errors = [rank.communicate(timeout=300)[1] for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
    if any(rank.returncode for rank in ranks):
        raise RuntimeError("\n".join(errors))
    return json.loads(record.read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mbit", type=int, help="only this link (default: --balance, then 100 and 1000)")
    parser.add_argument("--balance", type=int, default=300, help="the link at which exchange and work are equal")
    parser.add_argument("--tokens", type=int, default=2048, help="of each rank (default: %(default)s)")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--intermediate", type=int, default=0, help="experts' width (default: by --balance)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--realtime", action="store_true", help="ranks in the real-time scheduling class")
    parser.add_argument("--output", type=Path, metavar="FILE", help="append JSON lines to FILE")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--record", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return worker(options)
    reason = ep_network.why_not()
    if reason is not None:
        print(f"skipped: {reason}", file=sys.stderr)
        return None
    torch.set_num_threads(1)  # as in the ranks: what the record says
    environment = {**machine.describe(), "load": round(os.getloadavg()[0], 1), "realtime": options.realtime}
    links = [options.mbit] if options.mbit else list(dict.fromkeys([options.balance, 100, 1000]))
    intermediate = options.intermediate
    with tempfile.TemporaryDirectory() as folder:
        for mbit in links:
            record = measure(options, mbit, intermediate, folder)
            intermediate = record["intermediate"]  # the same layer over every link
            print(json.dumps(record))
            if options.output is not None:
                report.append_jsonl(options.output, [{**record, **environment}])
    return None


if __name__ == "__main__":
    main()
