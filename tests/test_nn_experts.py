"""Experts: parameters, their initialisation, the operator behind, and what it refuses."""

import pathlib
import re

import pytest
import torch
from helpers import make_plan, randn

from torch_moe import Experts, ops
from torch_moe.testing import SHAPES, routing

SHAPE = SHAPES["unaligned"]
T, H, I, E, K = SHAPE  # noqa: E741


@pytest.mark.parametrize(
    ("options", "gate_up", "down"),
    [
        ({}, (E, 2 * I, H), (E, H, I)),
        ({"activation": "gelu"}, (E, I, H), (E, H, I)),
        ({"weight_layout": "in_out"}, (E, H, 2 * I), (E, I, H)),
    ],
    ids=["gated", "not_gated", "in_out"],
)
def test_parameters(options, gate_up, down):
    experts = Experts(H, I, E, bias=True, **options)
    shapes = {name: tuple(parameter.shape) for name, parameter in experts.named_parameters()}
    width = gate_up[2] if "weight_layout" in options else gate_up[1]
    biases = {"gate_up_proj_bias": (E, width), "down_proj_bias": (E, H)}
    assert shapes == {"gate_up_proj": gate_up, "down_proj": down, **biases}
    assert set(Experts(H, I, E).state_dict()) == {"gate_up_proj", "down_proj"}


def test_every_option_reaches_the_operator(device):
    options = {"activation": "swiglu", "gate_layout": "interleaved", "weight_layout": "in_out"}
    options |= {"alpha": 1.702, "limit": 0.5, "up_offset": 1.0}
    experts = Experts(H, I, E, bias=True, device=device, **options)
    x, weights, plan = randn(T, H, device=device), randn(T, K, device=device, seed=1), make_plan(SHAPE, device=device)
    p = dict(experts.named_parameters())
    expected = ops.experts(
        x, p["gate_up_proj"], p["down_proj"], weights, plan, p["gate_up_proj_bias"], p["down_proj_bias"], **options
    )
    assert torch.equal(experts(x, weights, plan), expected)


def test_recompute_keeps_no_pre_activation(device):
    plan, weights = make_plan(SHAPE, device=device), randn(T, K, device=device)
    kept = {}
    for recompute in (False, True):
        experts = Experts(H, I, E, recompute=recompute, device=device)
        shapes = kept.setdefault(recompute, [])
        with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(t.shape) or t, lambda t: t):  # noqa: B023
            experts(randn(T, H, device=device), weights, plan)
    assert (T * K, 2 * I) in kept[False]
    assert (T * K, 2 * I) not in kept[True]


@pytest.mark.parametrize("bias", [False, True])
def test_more_experts_begin_with_the_same(bias):
    """Parameters are drawn expert by expert."""
    few, many = {}, {}
    for num_experts, into in ((3, few), (7, many)):
        torch.manual_seed(0)
        into.update(Experts(H, I, num_experts, bias=bias).state_dict())
    assert len(few) == (4 if bias else 2)
    for name, values in few.items():
        assert torch.equal(many[name][:3], values)


def test_weight_layouts_are_the_same_function():
    state = {}
    for layout in ("out_in", "in_out"):
        torch.manual_seed(0)
        state[layout] = Experts(H, I, E, bias=True, weight_layout=layout).state_dict()
    for name in ("gate_up_proj", "down_proj"):
        assert torch.equal(state["out_in"][name], state["in_out"][name].transpose(1, 2))
    for name in ("gate_up_proj_bias", "down_proj_bias"):
        assert torch.equal(state["out_in"][name], state["in_out"][name])


@pytest.mark.parametrize("weight_layout", ["out_in", "in_out"])
def test_initialisation_is_that_of_linear(weight_layout):
    torch.manual_seed(1)
    experts = Experts(256, 64, 3, bias=True, weight_layout=weight_layout)
    for name, fan_in in (("gate_up_proj", 256), ("down_proj", 64)):
        for parameter in (getattr(experts, name), getattr(experts, f"{name}_bias")):
            assert parameter.abs().max() <= fan_in**-0.5
            assert parameter.abs().max() > 0.95 * fan_in**-0.5
    before = {name: value.clone() for name, value in experts.state_dict().items()}
    torch.manual_seed(1)
    experts.reset_parameters()
    assert all(torch.equal(before[name], value) for name, value in experts.state_dict().items())


def test_repr_names_every_option_that_is_set():
    text = repr(Experts(H, I, E, gate_layout="interleaved", alpha=1.702, limit=7.0, up_offset=1.0, recompute=True))
    for part in ("hidden_size=37", "intermediate_size=53", "num_experts=5", "activation=swiglu", "bias=False",
                 "gate_layout=interleaved", "weight_layout=out_in", "alpha=1.702, limit=7.0, up_offset=1.0",
                 "recompute=True"):  # fmt: skip
        assert part in text
    plain = repr(Experts(H, I, E))
    assert "alpha" not in plain
    assert "recompute" not in plain


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 0}, "hidden_size must be at least 1, got 0"),
        ({"intermediate_size": -1}, "intermediate_size must be at least 1, got -1"),
        ({"num_experts": 0}, "num_experts must be at least 1, got 0"),
        ({"activation": "tanh"}, "activation must be in .*'swiglu'.*, got 'tanh'"),
        ({"gate_layout": "mixed"}, "gate_layout must be in .*, got 'mixed'"),
        ({"weight_layout": "nk"}, "weight_layout must be in .*, got 'nk'"),
        ({"limit": 0.0}, "limit must be positive and finite, or None, got 0.0"),
        ({"activation": "geglu", "alpha": 1.702}, "alpha, limit and up_offset shape swiglu, not geglu"),
    ],
)
def test_refused(change, message):
    with pytest.raises(ValueError, match=f"ExpertsConfig: {message}"):
        Experts(**{"hidden_size": H, "intermediate_size": I, "num_experts": E, **change})


@pytest.mark.parametrize(
    "options", [{}, {"weight_position": "input"}, {"dropout": 0.5}], ids=["plain", "input", "dropout"]
)
@pytest.mark.parametrize("grad", [False, True])
def test_ids_in_place_of_a_plan(options, grad, device):
    experts = Experts(H, I, E, device=device, **options)
    x, weights = randn(T, H, device=device), randn(T, K, device=device, seed=1)
    ids = routing("zipf", T, E, K).to(device)
    outputs = []
    for plan in (ops.plan(ids, E), ids):
        torch.manual_seed(0)
        with torch.set_grad_enabled(grad):
            outputs.append(experts(x, weights, plan))
    assert torch.equal(*outputs)


def test_parameters_lie_on_large_pages_where_the_system_has_them():
    """What is asked for is seen in the flags of the mapping; a hint that went to other memory would not be."""
    maps = pathlib.Path("/proc/self/smaps")
    if not maps.exists():
        pytest.skip("/proc/self/smaps is absent")
    experts = Experts(1024, 1024, 4)
    address = experts.gate_up_proj.data_ptr() + (1 << 20)
    inside = False
    for line in maps.read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            assert "hg" in line.split()
            return
    pytest.fail("no mapping holds the parameters")
