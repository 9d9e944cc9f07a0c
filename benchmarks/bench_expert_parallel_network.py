"""Expert parallelism between two simulated machines, over links of 100, 300 and 1000 Mbit/s.

    python benchmarks/bench_expert_parallel_network.py [--output FILE]      # root: it makes network namespaces

One rank per machine, one thread each. The experts' width is chosen such that at --balance Mbit/s the exchange, at the
full rate of the link both ways, takes as long as the experts' work. Compared, interleaved in one process per rank,
after each result was verified against the whole layer on one rank: one exchange each way (serial), chunks in flight, K
copies per token (plain dispatchers), and all-gather with reduce-scatter. Medians; the slowest rank counts.
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

import ep_network
import ep_schedules
import torch
from torch import distributed

from torch_moe import ops
from torch_moe.cli import machine

CHUNKS = (2, 4, 8, 16)
SIZES = {"tokens": 1024, "hidden": 512, "experts": 32, "top_k": 4}


def schedules():
    chunked = {f"chunks-{n}": lambda problem, n=n: ep_schedules.deduplicated(problem, n) for n in CHUNKS}
    return {
        "serial": lambda problem: ep_schedules.deduplicated(problem, 1),
        **chunked,
        "k-copies": ep_schedules.k_copies,
        "all-gather": ep_schedules.all_gather,
    }


def balanced_width(mbit, world=2):
    """The intermediate size whose work takes as long as the exchange; every rank takes the same, of measured speed."""
    problem, _ = ep_schedules.draw(0, 1, **{**SIZES, "experts": 16}, intermediate=256)
    plan = ops.plan(problem.topk_ids, 16)

    def seconds():
        start = time.perf_counter()
        problem.compute(problem.hidden_states, problem.topk_weights, plan)
        return time.perf_counter() - start

    tokens, hidden = problem.hidden_states.shape
    distributed.barrier()
    work = torch.tensor(statistics.median(seconds() for _ in range(9)), dtype=torch.float64)
    distributed.all_reduce(work, op=distributed.ReduceOp.MAX)
    exchange = 2 * tokens * hidden * 4 / (mbit * 1e6 / 8)
    return max(32, round(exchange / (work.item() / 256) / 32) * 32)


def worker(options):
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=60)
    distributed.init_process_group("gloo", rank=rank, world_size=2, timeout=timeout)
    width = options.intermediate or balanced_width(options.balance)
    problem, (gate_up, down) = ep_schedules.draw(rank, 2, **SIZES, intermediate=width)
    whole = ops.experts(
        problem.hidden_states, gate_up, down, problem.topk_weights, ops.plan(problem.topk_ids, SIZES["experts"])
    )
    candidates = schedules()
    for name, schedule in candidates.items():
        torch.testing.assert_close(schedule(problem), whole, rtol=1e-4, atol=1e-4, msg=f"{name} is wrong")
    del gate_up, down
    tuned = ep_schedules.fit_chunks(problem, CHUNKS)
    times = {name: [] for name in candidates}
    for _ in range(options.rounds):
        for name, schedule in candidates.items():
            distributed.barrier()
            start = time.perf_counter()
            schedule(problem)
            seconds = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
            distributed.all_reduce(seconds, op=distributed.ReduceOp.MAX)
            times[name].append(1e3 * seconds.item())
    if rank == 0:
        medians = {name: round(statistics.median(samples), 1) for name, samples in times.items()}
        chosen = "serial" if tuned == 1 else f"chunks-{tuned}"
        best = min(medians[f"chunks-{n}"] for n in CHUNKS)
        record = {
            "bench": "expert_parallel_network", "mbit": options.mbit, **SIZES, "intermediate": width,
            "rounds": options.rounds, "ms": medians,
            "spread_ms": {name: [round(min(samples), 1), round(max(samples), 1)] for name, samples in times.items()},
            "tuned_chunks": tuned, "serial_over_tuned": round(medians["serial"] / medians[chosen], 2),
            "serial_over_best": round(medians["serial"] / best, 2),
            "k_copies_over_best": round(medians["k-copies"] / best, 2),
        }  # fmt: skip
        options.record.write_text(json.dumps(record))
    distributed.destroy_process_group()


def measure(options, mbit, intermediate, folder):
    """Run both ranks over a link of ``mbit`` and return the record of rank 0."""
    record = Path(folder) / f"{mbit}.json"
    command = ["chrt", "-f", "1"] if options.realtime else []
    command += [sys.executable, __file__, "--worker", "--mbit", str(mbit), "--rounds", str(options.rounds)]
    command += ["--balance", str(options.balance), "--intermediate", str(intermediate), "--record", str(record)]
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
    environment = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": machine.source_commit(), "cpu": machine.cpu_model(), "cores": machine.num_cores(),
        "torch": torch.__version__, "load": round(os.getloadavg()[0], 1), "realtime": options.realtime,
    }  # fmt: skip
    links = [options.mbit] if options.mbit else list(dict.fromkeys([options.balance, 100, 1000]))
    intermediate = options.intermediate
    with tempfile.TemporaryDirectory() as folder:
        for mbit in links:
            record = measure(options, mbit, intermediate, folder)
            intermediate = record["intermediate"]  # the same layer over every link
            print(json.dumps(record))
            if options.output is not None:
                with options.output.open("a") as lines:
                    lines.write(json.dumps({**record, **environment}) + "\n")
    return None


if __name__ == "__main__":
    main()
