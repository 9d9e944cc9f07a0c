"""torch.export: the layer's graph holds the operators, takes any number of tokens, and is loaded without the layer."""

import io

import pytest
import torch
from helpers import randn

from torch_moe import MoE
from torch_moe.nn import Routing

T, H, I, E, K = 7, 16, 24, 5, 2  # noqa: E741


def exported(layer, x, strict):
    tokens = torch.export.Dim("tokens", min=2, max=1 << 16)
    return torch.export.export(layer, (x,), dynamic_shapes=({0: tokens},), strict=strict)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_shared_experts": 1, "bias": True, "score_function": "sigmoid", "expert_bias": True},
        {"capacity_factor": 1.25},
    ],
    ids=["plain", "deepseek", "capacity"],
)
def test_any_number_of_tokens(options, strict):
    torch.manual_seed(0)
    layer = MoE(H, I, E, K, **options)
    program = exported(layer, randn(T, H), strict)
    called = {node.target for node in program.graph.nodes if node.op == "call_function"}
    assert {torch.ops.moe.route.default, torch.ops.moe.plan.default, torch.ops.moe.experts.default} <= called
    graph = program.module()
    for num_tokens in (2, T, 100):
        x = randn(num_tokens, H)
        assert torch.equal(graph(x), layer(x))


@pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")  # by torch 2.11's own reader
def test_saved_and_loaded():
    torch.manual_seed(0)
    layer, x = MoE(H, I, E, K, num_shared_experts=1), randn(T, H)
    file = io.BytesIO()
    torch.export.save(exported(layer, x, strict=False), file)
    file.seek(0)
    assert torch.equal(torch.export.load(file).module()(x), layer(x))


def test_routing_is_exported_as_the_tuple_it_is():
    layer, x = MoE(H, I, E, K), randn(T, H)
    program = torch.export.export(layer, (x,), {"return_routing": True})
    output, routing = program.module()(x, return_routing=True)
    expected, expected_routing = layer(x, return_routing=True)
    assert torch.equal(output, expected)
    assert type(routing) is type(expected_routing) is Routing
    assert all(torch.equal(a, b) for a, b in zip(routing, expected_routing, strict=True))
