"""torch.compile(fullgraph=True), forward and backward, gives what the eager call gives."""

import pytest
import torch
from helpers import expert_inputs, make_plan, randn, run
from torch._inductor.utils import fresh_cache

import torch_moe
from torch_moe import ops
from torch_moe.testing import SHAPES

SHAPE = SHAPES["unaligned"]
T, H, I, E, K = SHAPE  # noqa: E741

# The graph is traced, differentiated and split as for any backend; only the code generation is left out.
BACKEND = "aot_eager"


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()


def check(module, *inputs):
    compiled = torch.compile(module, fullgraph=True, backend=BACKEND)
    results = []
    for function in (module, compiled):
        module.zero_grad()
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        output = function(*leaves)
        output.square().sum().backward()
        results.append([output, *(leaf.grad for leaf in leaves), *(p.grad for p in module.parameters())])
    for eager, traced in zip(*results, strict=True):
        assert torch.equal(eager, traced)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"score_function": "sigmoid", "expert_bias": True, "num_shared_experts": 1, "bias": True, "recompute": True},
        {"capacity_factor": 1.0, "drop_policy": "probability", "selection": "sinkhorn"},
        {
            "num_zero_experts": 2,
            "weight_position": "input",
            "score_function": "sqrtsoftplus",
            "input_norm": True,
            "per_expert_scale": True,
            "projection_bias": True,
            "logit_softcap": 5.0,
        },
        {"capacity_factor": 1.25, "activation": "gelu", "weight_layout": "in_out", "check_finite": True},
    ],
    ids=["plain", "deepseek", "sinkhorn", "identity", "capacity"],
)
def test_layer(options, device):
    torch.manual_seed(0)
    check(torch_moe.MoE(H, I, E, K, device=device, **options), randn(2, T, H, device=device))


@pytest.mark.parametrize("capacity_factor", [None, 1.25])
def test_layer_with_any_number_of_tokens(capacity_factor, device):
    """One graph for all sizes: the second and third call must not trace again."""
    torch.manual_seed(0)
    layer = torch_moe.MoE(H, I, E, K, capacity_factor=capacity_factor, device=device)
    compiled = torch.compile(layer, fullgraph=True, backend=BACKEND, dynamic=True)
    compiled(randn(6, H, device=device)).sum().backward()
    with torch.compiler.set_stance("fail_on_recompile"):
        for num_tokens in (9, 30):
            x = randn(num_tokens, H, device=device)
            assert torch.equal(compiled(x), layer(x))


def test_return_routing(device):
    layer = torch_moe.MoE(H, I, E, K, device=device)
    x = randn(T, H, device=device)
    output, routing = torch.compile(layer, fullgraph=True, backend=BACKEND)(x, return_routing=True)
    eager_output, eager_routing = layer(x, return_routing=True)
    assert torch.equal(output, eager_output)
    assert type(routing) is type(eager_routing)
    assert all(torch.equal(a, b) for a, b in zip(routing, eager_routing, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_autocast(dtype, device):
    layer = torch_moe.MoE(H, I, E, K, num_shared_experts=1, device=device)
    x = randn(T, H, device=device)
    compiled = torch.compile(layer, fullgraph=True, backend=BACKEND)
    with torch.autocast(device.type, dtype=dtype):
        output, expected = compiled(x), layer(x)
    assert output.dtype == dtype
    assert torch.equal(output, expected)


def test_stages(device):
    plan = make_plan(SHAPE, device=device)

    def stages(hidden_states, gate_up_proj, down_proj, topk_weights):
        rows = ops.permute(hidden_states, plan)
        rows = ops.activation(ops.grouped_gemm(rows, gate_up_proj, plan.expert_offsets))
        return ops.combine(ops.grouped_gemm(rows, down_proj, plan.expert_offsets), topk_weights, plan)

    inputs = expert_inputs(SHAPE, torch.float32, device)
    compiled = run(torch.compile(stages, fullgraph=True, backend=BACKEND), inputs)
    for name, value in run(stages, inputs).items():
        assert torch.equal(compiled[name], value)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised by inductor about torch.jit
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
def test_inductor(device):
    """The default backend, once: it also checks the strides that the fakes promise.

    From an empty cache: its key does not tell what the fakes say, so that a graph compiled before would hide it.
    """
    layer = torch_moe.MoE(H, I, E, K, num_shared_experts=1, device=device)
    x = randn(T, H, device=device)
    results = []
    for forward in (torch.compile(layer, fullgraph=True), layer):
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        with fresh_cache():
            output = forward(leaf)
            output.square().mean().backward()
        results.append([output.detach(), leaf.grad, *(p.grad.clone() for p in layer.parameters())])
    for compiled, eager in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-6)
