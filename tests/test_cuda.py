"""What only a GPU can break: agreement with the CPU, streams, graphs, devices, a host that must never wait.

Run with `pytest --device cuda`. Without a GPU the agreement is checked between the CPU and itself, for the sake of its
own code.
"""

import pytest
import torch
from helpers import ALL_DTYPES, DTYPES, expert_inputs, make_plan, plan_to, randn, run, weight_dtype

import torch_moe
from torch_moe import _C, ops
from torch_moe.testing import SHAPES, assert_close, routing

SHAPE = SHAPES["several_tiles"]
T, H, I, E, K = SHAPE  # noqa: E741
R = T * K


def cases(dtype):
    """By operator: the call, its differentiable inputs, and the steps of each result as in the operator's own test."""
    rows, weights = randn(R, H, dtype=dtype), randn(T, K, dtype=weight_dtype(dtype), seed=1)
    gradient = (H, H, 1)
    return {
        "route": (
            lambda plan, router_logits: ops.route(router_logits, K)[0],
            {"router_logits": randn(T, E, dtype=dtype)},
            {"output": (E, K), "router_logits": (E, K, K, E)},
        ),
        "permute": (
            lambda plan, x: ops.permute(x, plan),
            {"x": randn(T, H, dtype=dtype)},
            {"output": (), "x": (K,)},
        ),
        "activation": (
            lambda plan, x: ops.activation(x),
            {"x": randn(R, 2 * I, dtype=dtype)},
            {"output": (1, 1), "x": (1, 1, 1)},
        ),
        "grouped_gemm": (
            lambda plan, rows, weight, bias: ops.grouped_gemm(rows, weight, plan.expert_offsets, bias),
            {"rows": rows, "weight": randn(E, I, H, dtype=dtype, seed=2), "bias": randn(E, I, dtype=dtype, seed=3)},
            {"output": (H,), "rows": (I,), "weight": (R,), "bias": (R,)},
        ),
        "combine": (
            lambda plan, rows, weights: ops.combine(rows, weights, plan),
            {"rows": rows, "weights": weights},
            {"output": (K,), "rows": (1,), "weights": (H,)},
        ),
        "experts": (
            lambda plan, **tensors: ops.experts(**tensors, plan=plan),
            expert_inputs(SHAPE, dtype, "cpu", bias=True),
            {
                "output": (H, 1, I, K),
                "hidden_states": (*gradient, 2 * I, K),
                "gate_up_proj": (*gradient, R),
                "down_proj": (H, 1, R),
                "topk_weights": (H, H, 1, I),
                "gate_up_bias": (*gradient, R),
                "down_bias": (R,),
            },
        ),
    }


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("op", cases(torch.float32))
def test_agrees_with_the_cpu(op, dtype, device):
    """Output and every gradient; both sides round, so each may take the tolerance."""
    call, inputs, lengths = cases(dtype)[op]
    plan = make_plan(SHAPE, "zipf")
    expected = run(lambda **tensors: call(plan, **tensors), inputs)
    there = plan_to(plan, device)
    moved = {name: tensor.to(device) for name, tensor in inputs.items()}
    for name, value in run(lambda **tensors: call(there, **tensors), moved).items():
        assert value.device.type == device.type
        steps = lengths[name]
        assert_close(value.cpu(), expected[name].double(), *steps, *steps, dtype=dtype)


def off_by_one(tensor):
    """The same numbers, contiguous, on an address that is a multiple of an element's size alone."""
    moved = tensor.new_empty(tensor.numel() + 1)[1:].view(tensor.shape)
    return moved.copy_(tensor)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", cases(torch.float32))
def test_storage_may_start_anywhere(op, dtype, device):
    """Wide loads and copies by descriptor need 16 bytes: without, another path, the same result."""
    call, inputs, lengths = cases(dtype)[op]
    plan = plan_to(make_plan(SHAPE, "zipf"), device)
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    expected = run(lambda **tensors: call(plan, **tensors), inputs)
    leaves = {name: off_by_one(tensor).requires_grad_() for name, tensor in inputs.items()}
    output = call(plan, **leaves)
    grad = off_by_one(randn(*output.shape, dtype=torch.bfloat16, device=device, seed=99).to(output.dtype))
    grads = torch.autograd.grad(output, list(leaves.values()), grad)
    for name, value in {"output": output, **dict(zip(leaves, grads, strict=True))}.items():
        assert_close(value.detach(), expected[name].double(), *lengths[name], *lengths[name], dtype=dtype)


@pytest.mark.parametrize("capacity", [None, 7])
@pytest.mark.parametrize("ids", ["zipf", "garbage"])
def test_plans_are_equal(ids, capacity, device):
    if ids == "garbage":
        generator = torch.Generator().manual_seed(0)
        wanted = torch.randint(-(2**31), 2**31 - 1, (T, K), generator=generator, dtype=torch.int64).int()
        wanted[::2] %= E + 1
    else:
        wanted = routing(ids, T, E, K)
    for actual, expected in zip(ops.plan(wanted.to(device), E, capacity), ops.plan(wanted, E, capacity), strict=True):
        assert torch.equal(actual.cpu(), expected)


def layer_and_tokens(device, dtype=torch.bfloat16):
    torch.manual_seed(0)
    layer = torch_moe.MoE(H, I, E, K, device=device, dtype=dtype)
    return layer, randn(T, H, dtype=dtype, device=device)


def step(layer, x):
    """Forward and backward; the gradients in the order of the parameters."""
    layer.zero_grad()
    layer(x).float().square().sum().backward()
    return [parameter.grad for parameter in layer.parameters()]


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
def test_nothing_waits_for_the_device(gpu):
    layer, x = layer_and_tokens(gpu)
    step(layer, x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(layer, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_forward_and_backward_are_captured_in_a_graph(gpu):
    """A capture also fails when an operator waits, or reads memory of the device on the host."""
    layer, x = layer_and_tokens(gpu)
    other = randn(T, H, dtype=x.dtype, device=gpu, seed=7)
    expected = [grad.clone() for grad in step(layer, other)]
    static = x.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(layer, static)
    torch.cuda.current_stream().wait_stream(stream)
    layer.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer(static).float().square().sum().backward()
    static.copy_(other)
    for parameter in layer.parameters():
        parameter.grad.fill_(float("nan"))
    graph.replay()
    for parameter, grad in zip(layer.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, grad)


def test_runs_on_the_current_stream(gpu):
    """The input is written late on a stream of its own: kernels on any other would read what was there before."""
    layer, x = layer_and_tokens(gpu)
    expected = layer(x).detach()
    late = torch.zeros_like(x)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.no_grad():
        torch.cuda._sleep(50_000_000)
        late.copy_(x)
        output = layer(late)
    stream.synchronize()
    assert torch.equal(output, expected)


def test_runs_on_the_device_of_its_tensors(gpu):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    layer, x = layer_and_tokens(gpu)
    expected = [grad.cpu() for grad in step(layer, x)]
    second = torch.device("cuda", 1)
    grads = step(layer.to(second), x.to(second))
    assert torch.cuda.current_device() == 0
    for actual, reference in zip(grads, expected, strict=True):
        assert actual.device == second
        assert torch.equal(actual.cpu(), reference)


def test_tensors_of_two_devices_are_refused(gpu):
    plan = make_plan(SHAPE, device=gpu)
    with pytest.raises(RuntimeError, match=r"permute: \w+ must be on (cuda:0|cpu) like the other tensors, got"):
        ops.permute(randn(T, H), plan)


def test_tf32_is_used_only_when_torch_allows_it(gpu):
    architecture = 10 * torch.cuda.get_device_capability(gpu)[0]
    if _C.cuda_kernel(architecture, "float32", 8, 64, 64, True) == _C.cuda_kernel(architecture, "float32", 8, 64, 64):
        pytest.skip("no kernel in tf32")
    rows, weight = randn(R, 64, device=gpu), randn(E, 64, 64, device=gpu, seed=1)
    offsets = make_plan(SHAPE, device=gpu).expert_offsets
    exact = ops.grouped_gemm(rows, weight, offsets)
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        rounded = ops.grouped_gemm(rows, weight, offsets)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert not torch.equal(rounded, exact)
    assert torch.equal(ops.grouped_gemm(rows, weight, offsets), exact)


def test_a_check_of_the_logits_names_them(gpu):
    logits = randn(T, E, device=gpu)
    ops.route(logits, K, check_finite=True)
    logits[-1, -1] = float("inf")
    with pytest.raises(RuntimeError, match="route: router_logits must be finite"):
        ops.route(logits, K, check_finite=True)
