"""`torch-moe bench --ep`: a layer over the ranks that torchrun started, or the traffic of any number, counted."""

from __future__ import annotations

import argparse
import datetime
import math
import os
import statistics
import time
from typing import Any

import torch

from torch_moe import MoE, ops
from torch_moe.cli import machine, report
from torch_moe.cli.display import Display
from torch_moe.cli.errors import UsageError
from torch_moe.cli.problem import DTYPES, draw_input
from torch_moe.cli.shapes import LayerShape
from torch_moe.ops.ep_pack import row_bytes
from torch_moe.testing import routing


def expected_ranks(num_experts: int, ep_size: int, top_k: int) -> float:
    """Return how many ranks a token visits when all choices are alike: ``W (1 - C(E - E/W, K) / C(E, K))``."""
    local = -(-num_experts // ep_size)
    visited = 0.0
    for first in range(0, num_experts, local):
        held = min(local, num_experts - first)
        visited += 1 - math.comb(num_experts - held, top_k) / math.comb(num_experts, top_k)
    return visited


def run(options: argparse.Namespace, shape: LayerShape) -> int:
    """Run `torch-moe bench --ep` and return the exit code.

    Raises
    ------
    UsageError
        If there is neither torchrun's environment nor --ranks, or options do not fit.
    """
    if len(options.dtype) > 1:
        raise UsageError(f"--ep takes one --dtype, got {','.join(options.dtype)}")
    if options.ranks is None and "WORLD_SIZE" not in os.environ:
        raise UsageError(
            "--ep needs ranks: torchrun --nproc-per-node 4 -m torch_moe bench --ep; or count with --ranks 64"
        )
    if options.ranks is not None and options.routing == "text":
        raise UsageError("--ranks counts without a router: --routing must be uniform, zipf or one_expert, got text")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    record = count(options, shape) if options.ranks is not None else measure(options, shape)
    if int(os.environ.get("RANK", "0")) == 0:  # one rank speaks for all
        display = Display(json_only=options.json)
        _show(display, record)
        report.write(display, options, [machine.describe() | record])
    return 0


def count(options: argparse.Namespace, shape: LayerShape) -> dict[str, Any]:
    """Plan the exchange of every one of ``--ranks`` ranks in this process: rows, bytes and balance; nothing is sent."""
    start = time.perf_counter()
    ranks, name = options.ranks, options.routing or "uniform"
    rows = torch.zeros(ranks, ranks, dtype=torch.int64)  # from, to
    pairs = torch.zeros(ranks, dtype=torch.int64)
    for rank in range(ranks):
        ids = routing(name, shape.num_tokens, shape.num_experts, shape.top_k, seed=options.seed + rank)
        plan = ops.ep_plan(ids, shape.num_experts, ranks, ep_rank=rank)
        rows[rank] = plan.counts[:, 0]
        pairs += plan.counts[:, 1]
    record = _record(options, shape, name, rows, pairs)
    if torch.distributed.is_available():
        record |= built(options, shape, name)
    return record | {"seconds": round(time.perf_counter() - start, 2)}


def group_copies() -> bool:
    """Tell whether torch's group that sends nothing gives a rank what it sends itself."""
    received = torch.zeros(torch.distributed.get_world_size())
    torch.distributed.all_to_all_single(received, torch.ones_like(received))
    return bool(received.all())


def built(options: argparse.Namespace, shape: LayerShape, name: str) -> dict[str, Any]:
    """Make the layer of rank 0 of so many, over a group that sends nothing, and let it dispatch its tokens.

    Parameters take no memory. What the layer holds and hands to the exchange are its own shapes, not a formula. Returns
    nothing where torch's group leaves what a rank receives as it was (2.11 does), for then no rank is told any counts.
    """
    from torch import distributed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from torch_moe.distributed import ExpertParallel, exchange

    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=options.ranks)
    try:
        if not group_copies():
            return {}
        dtype = DTYPES[options.dtype[0]]
        with torch.device("meta"):
            whole = MoE(**shape.layer_options(), dtype=dtype)
        layer = ExpertParallel(whole, distributed.group.WORLD, num_chunks=options.chunks)  # type: ignore[arg-type]
        ids = routing(name, shape.num_tokens, shape.num_experts, shape.top_k, seed=options.seed)
        weights = torch.full(ids.shape, 1 / shape.top_k)
        sent = layer.experts.send(torch.randn(shape.num_tokens, shape.hidden_size).to(dtype), weights, ids)
        for arriving in sent.received:
            exchange.wait(arriving)
        held = [exchange.local(parameter) for parameter in layer.experts.parameters()]
        return {
            "gate_up_proj_of_rank_0": list(held[0].shape),
            "mib_of_experts_on_rank_0": round(sum(tensor.nbytes for tensor in held) / 2**20, 1),
            "rows_of_rank_0": int(sent.plan.rank_offsets[-1]),
            "bytes_per_row": sent.received[0].shape[1],
        }
    finally:
        distributed.destroy_process_group()


def measure(options: argparse.Namespace, shape: LayerShape) -> dict[str, Any]:
    """Time the layer over the ranks of torchrun; the slowest rank counts."""
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh

    from torch_moe.distributed import ExpertParallel

    distributed.init_process_group("gloo", timeout=datetime.timedelta(minutes=5))
    try:
        rank, ranks = distributed.get_rank(), distributed.get_world_size()
        torch.manual_seed(options.seed)
        dtype = DTYPES[options.dtype[0]]
        whole = MoE(**shape.layer_options(), dtype=dtype)
        mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("ep",))
        layer = ExpertParallel(whole, mesh, num_chunks=options.chunks)
        drawn = options.routing or "text"
        tokens, forced = draw_input(shape, dtype, drawn, options.seed + rank)
        tokens.requires_grad_()

        def forward() -> torch.Tensor:
            output: torch.Tensor = layer(tokens, route_override=forced)
            return output

        passes: dict[str, Any] = {"forward": lambda: forward().detach()}
        if options.backward:
            passes["forward+backward"] = lambda: torch.autograd.backward(forward().sum())
        times: dict[str, list[float]] = {name: [] for name in passes}
        for number in range(1 + (options.rounds or 5)):
            for name, call in passes.items():
                layer.zero_grad()
                distributed.barrier()
                start = time.perf_counter()
                call()
                seconds = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
                distributed.all_reduce(seconds, op=distributed.ReduceOp.MAX)
                if number > 0:  # the first call warms up
                    times[name].append(1e3 * seconds.item())
        ids = layer.router(tokens)[2] if forced is None else forced
        plan = ops.ep_plan(ids, shape.num_experts, ranks, ep_rank=rank)
        rows, pairs = torch.zeros(ranks, ranks, dtype=torch.int64), plan.counts[:, 1].long()
        rows[rank] = plan.counts[:, 0]
        distributed.all_reduce(rows)
        distributed.all_reduce(pairs)
        medians = {name: round(statistics.median(samples), 2) for name, samples in times.items()}
        return _record(options, shape, drawn, rows, pairs) | {"chunks": options.chunks, "ms": medians}
    finally:
        distributed.destroy_process_group()


def _record(
    options: argparse.Namespace, shape: LayerShape, name: str, rows: torch.Tensor, pairs: torch.Tensor
) -> dict[str, Any]:
    ranks, tokens = rows.shape[0], rows.shape[0] * shape.num_tokens
    dtype = DTYPES[options.dtype[0]]
    there = row_bytes(shape.hidden_size, dtype, top_k=shape.top_k, has_ids=True, has_weights=True)
    both = there + row_bytes(shape.hidden_size, dtype)
    away = int(rows.sum() - rows.diagonal().sum())
    copies = shape.top_k * (1 - 1 / ranks)
    received = rows.sum(dim=0).double()
    return {
        "bench": "expert_parallel", "shape": shape.name, "dtype": options.dtype[0], "ranks": ranks,
        "experts": shape.num_experts, "top_k": shape.top_k, "tokens_per_rank": shape.num_tokens,
        "routing": name, "ranks_per_token": round(int(rows.sum()) / tokens, 4),
        "ranks_per_token_formula": round(expected_ranks(shape.num_experts, ranks, shape.top_k), 4),
        "off_rank_bytes_per_token": round(both * away / tokens, 1),
        "fewer_rows_than_copies": round(copies * tokens / max(away, 1), 2),
        "received_rows_most_over_mean": round((received.max() / received.mean()).item(), 3),
        "pairs_most_over_mean": round((pairs.max() / pairs.double().mean()).item(), 3),
        "mib_sent_by_busiest_rank": round(there * int((rows.sum(dim=1) - rows.diagonal()).max()) / 2**20, 2),
    }  # fmt: skip


def _show(display: Display, record: dict[str, Any]) -> None:
    flat = {name: value for name, value in record.items() if name not in ("bench", "ms")}
    flat |= {f"{name}, ms": value for name, value in record.get("ms", {}).items()}
    rows = [[name.replace("_", " "), str(value)] for name, value in flat.items()]
    display.table("expert parallelism", ["", "value"], rows)
