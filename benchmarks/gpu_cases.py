"""What is measured on a GPU: each operator, and the layer, next to what one would run instead on the same tensors.

A case has candidates (functions without arguments), the work that each of them does, and a check of the first one's
result. Its tensors are made when it is entered and dropped before the next: the largest takes some 20 GiB.
"""

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from gpu_time import graphed, relative_error
from torch import Tensor
from torch.nn import functional

from torch_moe import ops
from torch_moe.testing import Shape, routing

DTYPE = torch.bfloat16
LAYER = Shape(num_tokens=32768, hidden_size=4096, intermediate_size=1024, num_experts=128, top_k=8)
EXCHANGE = Shape(num_tokens=4096, hidden_size=2048, intermediate_size=768, num_experts=128, top_k=8)
FINE = Shape(num_tokens=65536, hidden_size=1024, intermediate_size=672, num_experts=31, top_k=3)
DECODE = Shape(num_tokens=1, hidden_size=2816, intermediate_size=704, num_experts=128, top_k=8)
TINY = Shape(num_tokens=24, hidden_size=32, intermediate_size=16, num_experts=4, top_k=2)
TOLERATED = 2e-2  # relative error of a chain of bf16 products; a wrong row or expert is near 1


@dataclass
class Case:
    """One comparison; the first candidate is ours."""

    name: str
    candidates: dict[str, Callable[[], object]]
    flops: float = 0.0  # of each candidate
    bytes: float = 0.0  # the least that has to be moved
    error: Callable[[], float] = lambda: 0.0
    skipped: dict[str, str] = field(default_factory=dict)  # candidate: why it is not there


def randn(*size: int, device: torch.device, seed: int, scale: float = 1.0, dtype: torch.dtype = DTYPE) -> Tensor:
    """Return seeded normal numbers, made on the device: zeros would run faster than data."""
    generator = torch.Generator(device).manual_seed(seed)
    return (torch.randn(*size, generator=generator, device=device) * scale).to(dtype)


@dataclass
class Problem:
    """Tokens, weights and a routing."""

    shape: Shape
    hidden_states: Tensor
    gate_up_proj: Tensor
    down_proj: Tensor
    topk_weights: Tensor
    topk_ids: Tensor

    @classmethod
    def make(cls, shape: Shape, routing_name: str, device: torch.device) -> "Problem":
        tokens, hidden, intermediate, experts, top_k = shape
        return cls(
            shape=shape,
            hidden_states=randn(tokens, hidden, device=device, seed=1),
            gate_up_proj=randn(experts, 2 * intermediate, hidden, device=device, seed=2, scale=hidden**-0.5),
            down_proj=randn(experts, hidden, intermediate, device=device, seed=3, scale=intermediate**-0.5),
            topk_weights=randn(tokens, top_k, device=device, seed=4, dtype=torch.float32).softmax(dim=-1),
            topk_ids=routing(routing_name, tokens, experts, top_k).to(device),
        )

    @property
    def device(self) -> torch.device:
        return self.hidden_states.device

    @property
    def forward_flops(self) -> float:
        return 6.0 * self.shape.num_tokens * self.shape.top_k * self.shape.hidden_size * self.shape.intermediate_size

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self.hidden_states, self.gate_up_proj, self.down_proj, self.topk_weights


def torch_moe_experts(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """Ours: plan and experts, or what takes their place without gradients."""
    return ops.experts(x, gate_up, down, weights, ids)


def grouped_mm_experts(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """Sort, `torch.nn.functional.grouped_mm` twice, and the sum, without a wait for the device."""
    num_experts, top_k = gate_up.shape[0], ids.shape[1]
    sorted_ids, order = ids.flatten().sort(stable=True)
    experts = torch.arange(num_experts, dtype=ids.dtype, device=ids.device)
    ends = torch.searchsorted(sorted_ids, experts, right=True, out_int32=True)
    rows = functional.grouped_mm(x.index_select(0, order // top_k), gate_up.transpose(1, 2), offs=ends)
    gate, up = rows.chunk(2, dim=-1)
    rows = functional.grouped_mm(functional.silu(gate) * up, down.transpose(1, 2), offs=ends)
    slots = torch.empty_like(rows).index_copy(0, order, rows).view(*ids.shape, -1)
    return (slots * weights[..., None].to(rows.dtype)).sum(dim=1)


def transformers_experts(problem: Problem) -> Callable[..., Tensor]:
    """Mixtral's experts of transformers, on its grouped_mm path."""
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    shape = problem.shape
    config = SimpleNamespace(
        _experts_implementation="grouped_mm", num_local_experts=shape.num_experts, hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size, hidden_act="silu",
    )  # fmt: skip
    with torch.device("meta"):
        module = MixtralExperts(config)
    for name in ("gate_up_proj", "down_proj"):
        delattr(module, name)

    def experts(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        module.gate_up_proj, module.down_proj = gate_up, down
        return module(x, ids.long(), weights)

    return experts


def triton_experts(problem: Problem) -> Callable[..., Tensor]:
    """vLLM's fused experts in Triton; forward only."""
    from vllm.model_executor.layers.fused_moe import fused_experts

    return lambda x, gate_up, down, weights, ids: fused_experts(x, gate_up, down, weights, ids)


def in_short(error: Exception) -> str:
    """Return the kind of an error and its first line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def contenders(problem: Problem, backward: bool) -> tuple[dict[str, Callable[..., Tensor]], dict[str, str]]:
    """Return the implementations that run here on this problem, ours first, and why others do not."""
    found: dict[str, Callable[..., Tensor]] = {"torch_moe": torch_moe_experts}
    skipped = {}
    others = {"grouped_mm": lambda _: grouped_mm_experts, "transformers": transformers_experts, "vllm": triton_experts}
    for name, make in others.items():
        if name == "vllm" and backward:
            skipped[name] = "has no backward"
        elif name != "grouped_mm" and importlib.util.find_spec(name) is None:
            skipped[name] = f"{name} is not installed"
        else:
            try:
                found[name] = make(problem)
                found[name](*problem.leaves, problem.topk_ids)
            except Exception as error:  # a guest in any version: what it says is the reason
                found.pop(name, None)
                skipped[name] = in_short(error)
    return found, skipped


def dense_calls(problem: Problem, backward: bool) -> Callable[[], object]:
    """Return the products of equal work, each expert with as many rows, as cuBLAS does them: no gather, no act."""
    shape = problem.shape
    rows = max(1, shape.num_tokens * shape.top_k // shape.num_experts)
    x, grad = (randn(shape.num_experts, rows, shape.hidden_size, device=problem.device, seed=s) for s in (5, 6))
    a = randn(shape.num_experts, rows, shape.intermediate_size, device=problem.device, seed=7)
    h = randn(shape.num_experts, rows, 2 * shape.intermediate_size, device=problem.device, seed=8)

    def forward() -> None:
        torch.bmm(x, problem.gate_up_proj.transpose(1, 2))
        torch.bmm(a, problem.down_proj.transpose(1, 2))

    def both() -> None:
        forward()
        torch.bmm(grad, problem.down_proj)
        torch.bmm(grad.transpose(1, 2), a)
        torch.bmm(h, problem.gate_up_proj)
        torch.bmm(h.transpose(1, 2), x)

    return both if backward else forward


def check_tokens(problem: Problem, output: Tensor, count: int = 16) -> float:
    """Return the relative error of some tokens' outputs against fp64, computed expert by expert."""
    tokens = torch.linspace(0, problem.shape.num_tokens - 1, count, device=problem.device).long().unique()
    expected = torch.zeros(len(tokens), problem.shape.hidden_size, dtype=torch.float64, device=problem.device)
    for row, token in enumerate(tokens.tolist()):
        x = problem.hidden_states[token].double()
        for weight, expert in zip(problem.topk_weights[token].tolist(), problem.topk_ids[token].tolist(), strict=True):
            gate, up = (problem.gate_up_proj[expert].double() @ x).chunk(2)
            expected[row] += weight * (problem.down_proj[expert].double() @ (functional.silu(gate) * up))
    return relative_error(output[tokens], expected)


def layer_case(shape: Shape, routing_name: str, device: torch.device, *, backward: bool) -> Iterator[Case]:
    """Plan and experts, forward or forward and backward."""
    problem = Problem.make(shape, routing_name, device)
    found, skipped = contenders(problem, backward)
    leaves = [tensor.requires_grad_(backward) for tensor in problem.leaves]
    grad = randn(shape.num_tokens, shape.hidden_size, device=device, seed=9)

    def call(experts: Callable[..., Tensor]) -> Callable[[], object]:
        if not backward:
            return lambda: experts(*leaves, problem.topk_ids)
        return lambda: torch.autograd.grad(experts(*leaves, problem.topk_ids), leaves, grad)

    calls = {name: call(experts) for name, experts in found.items()}
    calls["cublas_equal_flops"] = dense_calls(problem, backward)
    direction = "forward+backward" if backward else "forward"

    def error() -> float:
        with torch.no_grad():
            worst = check_tokens(problem, torch_moe_experts(*leaves, problem.topk_ids))
        if backward and "grouped_mm" in calls:
            pairs = zip(calls["torch_moe"](), calls["grouped_mm"](), strict=True)
            worst = max(worst, *(relative_error(mine, theirs) for mine, theirs in pairs))
        return worst

    flops = problem.forward_flops * (3 if backward else 1)
    yield Case(f"layer {tuple(shape)} {routing_name} {direction}", calls, flops=flops, error=error, skipped=skipped)


def decode_case(num_tokens: int, device: torch.device, shape: Shape = DECODE) -> Iterator[Case]:
    """A few tokens, replayed from a CUDA graph: as fast as the weights of the active experts can be read."""
    problem = Problem.make(shape._replace(num_tokens=num_tokens), "uniform", device)
    found, skipped = contenders(problem, backward=False)
    calls = {}
    for name, experts in found.items():
        try:
            calls[name] = graphed(lambda experts=experts: experts(*problem.leaves, problem.topk_ids), device)
        except RuntimeError as error:
            skipped[name] = f"cannot be captured: {str(error).splitlines()[0]}"
    active = len(problem.topk_ids.unique())
    moved = active * 3 * shape.hidden_size * shape.intermediate_size * DTYPE.itemsize
    output = torch_moe_experts(*problem.leaves, problem.topk_ids)
    yield Case(
        f"decode {num_tokens} tokens", calls, bytes=moved, error=lambda: check_tokens(problem, output), skipped=skipped
    )


def grouped_gemm_cases(shape: Shape, device: torch.device) -> Iterator[Case]:
    """The up projection by itself: product, dgrad and wgrad, with equally many rows per expert."""
    problem = Problem.make(shape, "uniform", device)
    rows_per_expert = max(1, shape.num_tokens * shape.top_k // shape.num_experts)
    num_rows, experts = rows_per_expert * shape.num_experts, shape.num_experts
    weight, width = problem.gate_up_proj, 2 * shape.intermediate_size
    offsets = torch.arange(experts + 1, dtype=torch.int32, device=device) * rows_per_expert
    rows = randn(num_rows, shape.hidden_size, device=device, seed=5)
    grad = randn(num_rows, width, device=device, seed=6)
    batch, grad_batch = rows.view(experts, rows_per_expert, -1), grad.view(experts, rows_per_expert, -1)
    flops = 2.0 * num_rows * shape.hidden_size * width
    products = {
        "grouped_gemm": (
            lambda: ops.grouped_gemm(rows, weight, offsets),
            lambda: torch.bmm(batch, weight.transpose(1, 2)).view(num_rows, -1),
            lambda: functional.grouped_mm(rows, weight.transpose(1, 2), offs=offsets[1:]),
        ),
        "grouped_gemm dgrad": (
            lambda: ops.grouped_gemm(grad, weight, offsets, weight_layout="in_out"),
            lambda: torch.bmm(grad_batch, weight).view(num_rows, -1),
            lambda: functional.grouped_mm(grad, weight, offs=offsets[1:]),
        ),
        "grouped_gemm wgrad": (
            lambda: torch.ops.moe.grouped_gemm_wgrad(grad, rows, offsets),
            lambda: torch.bmm(grad_batch.transpose(1, 2), batch),
            lambda: functional.grouped_mm(grad.T, rows, offs=offsets[1:]),
        ),
    }
    for name, (ours, cublas, grouped_mm) in products.items():
        yield Case(
            name,
            {"torch_moe": ours, "cublas_equal_flops": cublas, "grouped_mm": grouped_mm},
            flops=flops,
            error=lambda ours=ours, cublas=cublas: relative_error(ours()[:512], cublas()[:512]),
        )


def gather_case(shape: Shape, device: torch.device) -> Iterator[Case]:
    """The experts on tokens in any order, whose rows are gathered, next to the same on tokens in the experts' order.

    One expert per token, so that there is a row per token and both orders do the same work.
    """
    one = shape._replace(num_tokens=shape.num_tokens * shape.top_k, top_k=1)
    problem = Problem.make(one, "uniform", device)
    order = problem.topk_ids.flatten().sort(stable=True).indices
    ordered_ids, ordered = problem.topk_ids[order].contiguous(), problem.hidden_states[order].contiguous()
    weights = torch.ones_like(problem.topk_weights)
    gathered, contiguous = (ops.plan(ids, one.num_experts) for ids in (problem.topk_ids, ordered_ids))
    tensors = (problem.gate_up_proj, problem.down_proj, weights)

    def stages() -> Tensor:
        rows = ops.activation(ops.grouped_gemm(ordered, problem.gate_up_proj, contiguous.expert_offsets))
        return ops.grouped_gemm(rows, problem.down_proj, contiguous.expert_offsets)

    yield Case(
        "gather",
        {
            "torch_moe": lambda: ops.experts(problem.hidden_states, *tensors, gathered),
            "rows_in_order": lambda: ops.experts(ordered, *tensors, contiguous),
            "grouped_gemm_in_order": stages,  # neither gathers nor fuses
        },
        flops=problem.forward_flops,
        error=lambda: relative_error(
            ops.experts(problem.hidden_states, *tensors, gathered)[order], ops.experts(ordered, *tensors, contiguous)
        ),
    )
