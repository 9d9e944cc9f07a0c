"""torch.autograd.gradcheck in fp64: every derivative against finite differences."""

import itertools

import pytest
import torch
from helpers import expert_inputs, plan_to, randn
from torch.autograd import gradcheck

import torch_moe
from torch_moe import ops
from torch_moe.ops.activation import GATED_ACTIVATIONS, UNGATED_ACTIVATIONS, is_gated
from torch_moe.testing import Shape, routing

SHAPE = Shape(num_tokens=5, hidden_size=3, intermediate_size=4, num_experts=4, top_k=2)
IDS = routing("zipf", SHAPE.num_tokens, SHAPE.num_experts, SHAPE.top_k, seed=3)
PLAN = ops.plan(IDS, SHAPE.num_experts)
LIMITED = ops.plan(IDS, SHAPE.num_experts, capacity=2)


@pytest.fixture
def leaf(device):
    return lambda *size, seed=0: randn(*size, dtype=torch.float64, device=device, seed=seed).requires_grad_()


@pytest.mark.parametrize("plan", [PLAN, LIMITED], ids=["dropless", "capacity"])
def test_permute_and_combine(plan, leaf, device):
    plan = plan_to(plan, device)
    assert gradcheck(lambda x: ops.permute(x, plan), leaf(5, 3))
    assert gradcheck(lambda x, w: ops.combine(x, w, plan), (leaf(10, 3), leaf(5, 2, seed=1)))
    assert gradcheck(lambda x: ops.combine(x, None, plan), leaf(10, 3))


OPTIONS = [
    dict(zip(("score_function", "score_order", "renormalize"), options, strict=True))
    for options in itertools.product(
        ("softmax", "sigmoid", "sqrtsoftplus"), ("score_then_topk", "topk_then_score"), (True, False)
    )
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options.values())))
def test_route(options, leaf, device):
    bias = randn(8, dtype=torch.float64, device=device, seed=1)
    ids = torch.randint(0, 9, (5, 3), dtype=torch.int32, device=device)  # 8 is out of range: it has no weight
    for extra in (
        {},
        {"expert_bias": bias, "num_groups": 4, "topk_groups": 2, "routed_scaling_factor": 2.5},
        {"renormalize_p": 2.0, "renormalize_eps": 0.1},
        {"renormalize_eps": 5.0, "renormalize_eps_mode": "clamp"},
        {"route_override": ids},
    ):
        assert gradcheck(lambda z: ops.route(z, 3, **options, **extra)[0], leaf(5, 8))  # noqa: B023


@pytest.mark.parametrize("activation", GATED_ACTIVATIONS + UNGATED_ACTIVATIONS)
def test_activation(activation, leaf):
    for layout in ("concat", "interleaved"):
        assert gradcheck(lambda x: ops.activation(x, activation, gate_layout=layout), leaf(4, 6))  # noqa: B023


def test_clamped_swiglu(leaf):
    assert gradcheck(lambda x: ops.activation(x, alpha=1.702, limit=0.7, up_offset=1.0), leaf(4, 6))


@pytest.mark.parametrize("weight_layout", ["out_in", "in_out"])
def test_grouped_gemm(weight_layout, leaf, device):
    offsets = PLAN.expert_offsets.to(device)
    weight = leaf(4, 6, 3, seed=1) if weight_layout == "out_in" else leaf(4, 3, 6, seed=1)
    assert gradcheck(
        lambda x, w, b: ops.grouped_gemm(x, w, offsets, b, weight_layout),
        (leaf(10, 3), weight, leaf(4, 6, seed=2)),
    )


@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recompute"])
@pytest.mark.parametrize("weight_layout", ["out_in", "in_out"])
@pytest.mark.parametrize("activation", ["swiglu", "geglu", "gelu_tanh"])
def test_experts(activation, weight_layout, recompute, device):
    inputs = expert_inputs(
        SHAPE, torch.float64, device, gated=is_gated(activation), bias=True, weight_layout=weight_layout
    )
    hidden, gate_up, down, weights, *biases = (tensor.requires_grad_() for tensor in inputs.values())
    shaping = {"alpha": 1.5, "limit": 2.0, "up_offset": 0.5} if activation == "swiglu" else {}
    for plan in (plan_to(PLAN, device), plan_to(LIMITED, device)):
        assert gradcheck(
            lambda x, w1, w2, s, b1, b2: ops.experts(
                x, w1, w2, s, plan, b1, b2,  # noqa: B023
                activation=activation, weight_layout=weight_layout, recompute=recompute, **shaping,
            ),
            (hidden, gate_up, down, weights, *biases),
        )  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"score_function": "sigmoid", "expert_bias": True, "num_shared_experts": 1, "bias": True},
        {"capacity_factor": 1.0},
    ],
    ids=["plain", "deepseek", "capacity"],
)
def test_layer(options, leaf, device):
    torch.manual_seed(0)
    layer = torch_moe.MoE(3, 4, 4, 2, dtype=torch.float64, device=device, **options)
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def forward(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), x)

    assert gradcheck(forward, (leaf(5, 3), *parameters))
