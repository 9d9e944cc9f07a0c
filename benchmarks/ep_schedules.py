"""Ways to compute experts that are spread over ranks: what bench_expert_parallel_network.py compares, forward only.

``deduplicated`` sends a token once per rank, in one exchange or in chunks that overlap the experts' work. ``k_copies``
is the algorithm of plain dispatchers: one copy of the token per expert, each way. ``all_gather`` sends every token
everywhere and sums by reduce-scatter.
"""

import itertools
import time
from dataclasses import dataclass

import torch
from torch import distributed

from torch_moe import ops
from torch_moe.ops.ep_pack import row_bytes


@dataclass
class Problem:
    """The data of one rank: its tokens and its experts, ``num_experts / world_size`` of them, in order."""

    hidden_states: torch.Tensor  # [T, H]
    topk_weights: torch.Tensor  # [T, K]
    topk_ids: torch.Tensor  # [T, K]
    gate_up_proj: torch.Tensor  # [L, 2I, H]
    down_proj: torch.Tensor  # [L, H, I]
    num_experts: int

    @property
    def world_size(self):
        return self.num_experts // self.gate_up_proj.shape[0]

    def compute(self, tokens, weights, plan):
        return ops.experts(tokens, self.gate_up_proj, self.down_proj, weights, plan)


def draw(rank, world_size, *, tokens, hidden, intermediate, experts, top_k):
    """Every rank draws all experts from one seed and keeps its own, and its own tokens from another."""
    generator = torch.Generator().manual_seed(0)
    local = experts // world_size
    gate_up = torch.randn(experts, 2 * intermediate, hidden, generator=generator) / hidden**0.5
    down = torch.randn(experts, hidden, intermediate, generator=generator) / intermediate**0.5
    own = slice(rank * local, (rank + 1) * local)
    generator.manual_seed(1 + rank)
    states = torch.randn(tokens, hidden, generator=generator)
    weights, ids = ops.route(torch.randn(tokens, experts, generator=generator), top_k)
    return Problem(states, weights, ids, gate_up[own].clone(), down[own].clone(), experts), (gate_up, down)


def exchange(rows, send, receive):
    """Start an exchange of rows; return what arrives, and the work to wait for."""
    arriving = rows.new_empty((sum(receive), *rows.shape[1:]))
    return arriving, distributed.all_to_all_single(arriving, rows.contiguous(), receive, send, async_op=True)


def exchange_counts(counts):
    received = torch.empty_like(counts)
    distributed.all_to_all_single(received, counts.contiguous())
    return received


def deduplicated(problem, chunks, ahead=4):
    """Each token once per rank, both ways; chunk ``i`` is computed while later ones arrive and earlier ones return."""
    world, like = problem.world_size, problem.hidden_states
    hidden, top_k = like.shape[1], problem.topk_ids.shape[1]
    plan = ops.ep_plan(problem.topk_ids, problem.num_experts, world, ep_rank=distributed.get_rank(), num_chunks=chunks)
    counts = exchange_counts(plan.counts).tolist()
    packed = ops.ep_pack(like, problem.topk_weights, plan)
    bounds = plan.rank_offsets.tolist()
    size = row_bytes(hidden, like.dtype)
    returned = packed.new_empty((bounds[-1], size))
    arriving, returning = {}, []

    def send_tokens(chunk):
        starts = bounds[chunk * world : (chunk + 1) * world + 1]
        send = [b - a for a, b in itertools.pairwise(starts)]
        arriving[chunk] = *exchange(packed[starts[0] : starts[-1]], send, [row[chunk] for row in counts]), send

    # Every rank issues its exchanges in this one order: gloo and NCCL match them by it.
    for chunk in range(min(ahead, chunks)):
        send_tokens(chunk)
    for chunk in range(chunks):
        rows, work, send = arriving.pop(chunk)
        work.wait()
        pairs = sum(row[chunks + chunk] for row in counts)
        received = ops.ep_index(rows, like, hidden, top_k, problem.gate_up_proj.shape[0], pairs)
        sums = problem.compute(received.hidden_states, received.topk_weights, received.plan)
        back = torch.ops.moe.ep_pack(sums, None, None, None, world, plan.num_local_experts)
        first = bounds[chunk * world]
        target = returned[first : first + sum(send)]
        work = distributed.all_to_all_single(target, back, send, [row[chunk] for row in counts], async_op=True)
        returning.append((work, back))
        if chunk + ahead < chunks:
            send_tokens(chunk + ahead)
    for work, _ in returning:
        work.wait()
    return ops.ep_reduce(returned, like, plan, hidden)[0]


def k_copies(problem):
    """One row per (token, expert) pair, sorted by expert; the weighted sum is taken where the tokens are."""
    world, local = problem.world_size, problem.gate_up_proj.shape[0]
    plan = ops.plan(problem.topk_ids, problem.num_experts)
    send = plan.tokens_per_expert.view(world, local)
    receive = exchange_counts(send)
    splits = send.sum(dim=1).tolist(), receive.sum(dim=1).tolist()
    rows, work = exchange(ops.permute(problem.hidden_states, plan), *splits)
    work.wait()
    ids = torch.arange(local, dtype=torch.int32).repeat(world).repeat_interleave(receive.flatten())[:, None]
    results = problem.compute(rows, torch.ones(len(ids), 1), ops.plan(ids, local))
    rows, work = exchange(results, *reversed(splits))
    work.wait()
    return ops.combine(rows, problem.topk_weights, plan)


def all_gather(problem):
    """Every token to every rank; each computes its experts for all of them; reduce-scatter sums."""
    world, local = problem.world_size, problem.gate_up_proj.shape[0]

    def gather(tensor):
        whole = tensor.new_empty((world * tensor.shape[0], *tensor.shape[1:]))
        distributed.all_gather_into_tensor(whole, tensor)
        return whole

    tokens, weights = gather(problem.hidden_states), gather(problem.topk_weights)
    ids = gather(problem.topk_ids) - distributed.get_rank() * local
    partial = problem.compute(tokens, weights, ops.plan(ids, local))
    output = torch.empty_like(problem.hidden_states)
    distributed.reduce_scatter_tensor(output, partial)
    return output


def fit_chunks(problem, candidates, reserve=0.05):
    """Return the number of chunks that a measured model finds fastest; 1 unless it promises more than ``reserve``.

    Measured are an empty exchange (alpha), an exchange of all rows, whole and as 8 pieces in flight (beta), and the
    experts' work on all tokens and on an eighth of them: small chunks read the weights as often and fill fewer tiles.
    C chunks take ``max(exchange, work) + min(exchange, work) / C + 2 C alpha``, with the work of C chunks. All ranks
    take the slowest rank's times, so they agree.
    """
    world, ids, local = problem.world_size, problem.topk_ids, problem.gate_up_proj.shape[0]
    share = problem.hidden_states.shape[0] // world  # rows for one rank: every rank sends and receives as many
    empty, rows = problem.hidden_states[:0], problem.hidden_states[: share * world]

    def seconds(call):
        distributed.barrier()
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def least(call):
        call()
        return min(seconds(call) for _ in range(3))

    def in_pieces(number):
        # As many rows to each rank as there are tokens: with several choices a token goes to nearly every rank of few.
        parts = [len(part) for part in torch.arange(share).tensor_split(number)]
        works = [exchange(rows[: part * world], [part] * world, [part] * world)[1] for part in parts * world]
        for work in works:
            work.wait()

    def compute(number):
        some = ids[: len(ids) // number] % local
        plan, count = ops.plan(some, local), len(some)
        problem.compute(problem.hidden_states[:count], problem.topk_weights[:count], plan)

    calls = (
        lambda: exchange(empty, [0] * world, [0] * world)[1].wait(),
        lambda: in_pieces(1),
        lambda: in_pieces(8),
        lambda: compute(1),
        lambda: compute(8),
    )
    measured = torch.tensor([least(call) for call in calls], dtype=torch.float64)
    distributed.all_reduce(measured, op=distributed.ReduceOp.MAX)
    alpha, whole, pieces, work, work_of_eighth = measured.tolist()
    per_chunk = max(0.0, (8 * work_of_eighth - work) / 7)

    def predicted(chunks):
        if chunks == 1:
            return 2 * whole + work
        exchanged, computed = 2 * pieces, work + (chunks - 1) * per_chunk
        return max(exchanged, computed) + min(exchanged, computed) / chunks + 2 * chunks * alpha

    best = min(candidates, key=predicted)
    return best if predicted(best) < (1 - reserve) * predicted(1) else 1
