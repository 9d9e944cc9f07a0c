"""The operators that move bytes, forward and backward, next to plain torch and to a copy of as many bytes."""

from collections.abc import Callable, Iterator

import torch
from gpu_cases import DTYPE, Case, randn
from gpu_time import relative_error
from torch import Tensor
from torch.nn import functional

from torch_moe import ops
from torch_moe.testing import Shape, routing

RANKS = 8  # of the exchange that the ep_ operators prepare
ROUTE = {
    "score_function": "softmax", "score_order": "score_then_topk", "renormalize": True, "renormalize_p": 1.0,
    "renormalize_eps": 1e-20, "renormalize_eps_mode": "add", "routed_scaling_factor": 1.0,
}  # fmt: skip
SILU = {"gate_layout": "concat", "alpha": 1.0, "limit": None, "up_offset": 0.0}


def copy_of(count: float, device: torch.device) -> Callable[[], object]:
    """Return a copy that reads and writes ``count`` bytes in all: what the card can do with so few, launch included."""
    source = torch.zeros(max(1, int(count) // 2), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def memory_case(
    name: str,
    ours: Callable[[], object],
    moved: float,
    device: torch.device,
    error: Callable[[], float],
    **others: Callable[[], object],
) -> Case:
    """Return a case whose ceiling is bandwidth, with the copy among its candidates."""
    return Case(
        name, {"torch_moe": ours, **others, "copy_equal_bytes": copy_of(moved, device)}, bytes=moved, error=error
    )


def router_cases(shape: Shape, device: torch.device) -> Iterator[Case]:
    """Route and plan; the router of 256 experts too, and on bf16 logits."""
    tokens, top_k = shape.num_tokens, shape.top_k
    for experts, dtype in ((shape.num_experts, torch.float32), (256, torch.float32), (shape.num_experts, DTYPE)):
        logits = randn(tokens, experts, device=device, seed=1, dtype=dtype)
        name = "route" if (experts, dtype) == (shape.num_experts, torch.float32) else f"route {experts} {dtype}"

        def torch_route(logits: Tensor = logits) -> Tensor:
            values = logits.softmax(dim=-1, dtype=torch.float32).topk(top_k, dim=-1).values
            return values / values.sum(dim=-1, keepdim=True)

        yield memory_case(
            name,
            lambda logits=logits: ops.route(logits, top_k),
            logits.nbytes + 8 * tokens * top_k,
            device,
            lambda logits=logits, check=torch_route: relative_error(ops.route(logits, top_k)[0], check()),
            torch=torch_route,
        )
    logits = randn(tokens, shape.num_experts, device=device, seed=1, dtype=torch.float32).requires_grad_()
    chosen = ops.route(logits, top_k)[1]
    grad = randn(tokens, top_k, device=device, seed=2, dtype=torch.float32)
    yield memory_case(
        "route backward",
        lambda: torch.ops.moe.route_backward(grad, logits.detach(), chosen, **ROUTE),
        2 * logits.nbytes + 8 * tokens * top_k,
        device,
        lambda: relative_error(
            torch.ops.moe.route_backward(grad, logits.detach(), chosen, **ROUTE),
            torch.autograd.grad(torch_weights(logits, chosen), logits, grad)[0],
        ),
    )
    ids = routing("uniform", tokens, shape.num_experts, top_k).to(device)
    order = ids.flatten().sort(stable=True).indices
    yield memory_case(
        "plan",
        lambda: ops.plan(ids, shape.num_experts),
        12 * tokens * top_k,
        device,
        lambda: relative_error(ops.plan(ids, shape.num_experts).row_to_slot, order),
        torch=lambda: ids.flatten().sort(stable=True),
    )


def torch_weights(logits: Tensor, chosen: Tensor) -> Tensor:
    """Return the weights of a selection by plain torch."""
    values = logits.softmax(dim=-1).gather(1, chosen.long())
    return values / values.sum(dim=-1, keepdim=True)


def row_cases(shape: Shape, device: torch.device) -> Iterator[Case]:
    """Permute, combine, activation and the last two's gradients."""
    tokens, hidden, intermediate, experts, top_k = shape
    num_rows = tokens * top_k
    plan = ops.plan(routing("uniform", tokens, experts, top_k).to(device), experts)
    weights = randn(tokens, top_k, device=device, seed=2, dtype=torch.float32).softmax(dim=-1)
    x = randn(tokens, hidden, device=device, seed=3)
    source = (plan.row_to_slot // top_k).long()
    moved = (tokens + num_rows) * hidden * DTYPE.itemsize
    yield memory_case(
        "permute",
        lambda: ops.permute(x, plan),
        moved,
        device,
        lambda: relative_error(ops.permute(x, plan), x.index_select(0, source)),
        torch=lambda: x.index_select(0, source),
    )
    rows = ops.permute(x, plan)
    back = plan.slot_to_row.flatten().long()
    yield memory_case(
        "combine",
        lambda: ops.combine(rows, weights, plan),
        moved,
        device,
        lambda: relative_error(ops.combine(rows, weights, plan), x),  # the weights of a token sum to one
        torch=lambda: (rows.index_select(0, back).view(tokens, top_k, hidden) * weights[..., None].to(DTYPE)).sum(1),
    )
    slots = plan.row_to_slot.long()
    yield memory_case(
        "combine backward",
        lambda: torch.ops.moe.combine_backward(x, rows, weights, *plan),
        moved + num_rows * hidden * DTYPE.itemsize,
        device,
        lambda: relative_error(
            torch.ops.moe.combine_backward(x, rows, weights, *plan)[0],
            rows * weights.flatten()[slots][:, None].to(DTYPE),
        ),
    )
    pre_activation = randn(num_rows, 2 * intermediate, device=device, seed=4)
    gate, up = pre_activation.chunk(2, dim=-1)
    yield memory_case(
        "activation",
        lambda: ops.activation(pre_activation),
        3 * num_rows * intermediate * DTYPE.itemsize,
        device,
        lambda: relative_error(ops.activation(pre_activation), functional.silu(gate.float()) * up.float()),
        torch=lambda: functional.silu(gate) * up,
    )
    grad = randn(num_rows, intermediate, device=device, seed=5)

    def expected() -> Tensor:
        leaf = pre_activation.float().requires_grad_()
        left, right = leaf.chunk(2, dim=-1)
        return torch.autograd.grad(functional.silu(left) * right, leaf, grad.float())[0]

    yield memory_case(
        "activation backward",
        lambda: torch.ops.moe.activation_backward(grad, pre_activation, "swiglu", **SILU),
        5 * num_rows * intermediate * DTYPE.itemsize,
        device,
        lambda: relative_error(torch.ops.moe.activation_backward(grad, pre_activation, "swiglu", **SILU), expected()),
    )


def exchange_cases(shape: Shape, device: torch.device) -> Iterator[Case]:
    """One rank's side of an exchange between 8: its tokens packed, as many rows received, read, and summed again."""
    tokens, hidden, _, experts, top_k = shape
    x = randn(tokens, hidden, device=device, seed=1)
    weights = randn(tokens, top_k, device=device, seed=2, dtype=torch.float32).softmax(dim=-1)
    ids = routing("uniform", tokens, experts, top_k).to(device)
    plan = ops.ep_plan(ids, experts, RANKS)
    local, used = plan.num_local_experts, int(plan.rank_offsets[-1])
    first_row = plan._replace(row_to_slot=plan.row_to_slot[:used])
    rows = ops.ep_pack(x, weights, first_row)
    pairs = int(plan.counts[:, 1].sum())
    returned = torch.ops.moe.ep_pack(randn(used, hidden, device=device, seed=3), None, None, None, 1, 1)
    slots = plan.slot_to_row.clamp(min=0).long()
    there = (plan.slot_to_row >= 0)[..., None]

    def summed() -> Tensor:
        wide = returned.view(DTYPE)[:, :hidden].float()
        return (wide[slots] * there).sum(dim=1)

    yield memory_case(
        "ep_plan",
        lambda: ops.ep_plan(ids, experts, RANKS),
        4.0 * (2 * tokens * top_k + 2 * tokens * RANKS),
        device,
        lambda: relative_error(ops.ep_plan(ids, experts, RANKS).physical_ids, ids),
    )
    yield memory_case(
        "ep_pack",
        lambda: ops.ep_pack(x, weights, first_row),
        x.nbytes + rows.nbytes,
        device,
        lambda: relative_error(
            ops.ep_pack(x, weights, first_row).view(DTYPE)[:, :hidden], x[first_row.row_to_slot.long() // RANKS]
        ),
    )
    yield memory_case(
        "ep_index",
        lambda: ops.ep_index(rows, x, hidden, top_k, local, pairs),
        rows.nbytes + used * hidden * DTYPE.itemsize + 16.0 * used * top_k,
        device,
        lambda: relative_error(
            ops.ep_index(rows, x, hidden, top_k, local, pairs).hidden_states, rows.view(DTYPE)[:, :hidden]
        ),
    )
    yield memory_case(
        "ep_reduce",
        lambda: ops.ep_reduce(returned, x, plan, hidden),
        returned.nbytes + x.nbytes,
        device,
        lambda: relative_error(ops.ep_reduce(returned, x, plan, hidden)[0], summed()),
    )
