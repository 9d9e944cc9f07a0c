"""Both kinds of expert dropout: inside an expert, and of a whole chosen expert."""

import math

import pytest
import torch
from helpers import randn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from torch_moe import Experts, ops, reference
from torch_moe.testing import assert_close

T, H, I, E, K = 29, 16, 24, 5, 2  # noqa: E741
BOTH = [{"dropout": 0.4}, {"expert_dropout": 0.3}]


def make(dtype=torch.float32, **options):
    torch.manual_seed(0)
    return Experts(H, I, E, bias=True, dtype=dtype, **options)


def inputs(num_tokens=T, dtype=torch.float32):
    ids = randn(num_tokens, E, seed=1).topk(K, dim=-1).indices.int()
    weights = randn(num_tokens, K, seed=2).softmax(dim=-1).to(torch.promote_types(dtype, torch.float32))
    return randn(num_tokens, H, dtype=dtype), weights, ops.plan(ids, E)


@pytest.mark.parametrize("options", BOTH, ids=["inside", "whole"])
def test_evaluation_is_without(options):
    assert torch.equal(make(**options).eval()(*inputs()), make()(*inputs()))
    assert not torch.equal(make(**options)(*inputs()), make()(*inputs()))
    name, value = next(iter(options.items()))
    assert f"{name}={value}" in repr(make(**options))


@pytest.mark.parametrize("weight_layout", ["out_in", "in_out"])
@pytest.mark.parametrize("options", BOTH, ids=["inside", "whole"])
def test_equals_the_reference_with_the_same_draw(options, weight_layout):
    """Output and all gradients, in fp64: the reference's stages with the values that the seed drops."""
    experts = make(torch.float64, weight_layout=weight_layout, activation="geglu", **options)
    hidden_states, weights, plan = inputs(dtype=torch.float64)
    weights.requires_grad_()
    parameters = (weights, *experts.parameters())

    torch.manual_seed(7)
    output = experts(hidden_states, weights, plan)
    torch.manual_seed(7)
    kept = functional.dropout(weights, experts.expert_dropout)
    rows = reference.permute(hidden_states, plan)
    up_bias, down_bias = experts.gate_up_proj_bias, experts.down_proj_bias
    rows = reference.grouped_gemm(rows, experts.gate_up_proj, plan.expert_offsets, up_bias, weight_layout)
    rows = functional.dropout(reference.activation(rows, "geglu"), experts.dropout)
    rows = reference.grouped_gemm(rows, experts.down_proj, plan.expert_offsets, down_bias, weight_layout)
    expected = reference.combine(rows, kept, plan)

    assert_close(output, expected.detach(), H, 1, I, K)
    grad = randn(T, H, dtype=torch.float64, seed=9)
    actual = torch.autograd.grad(output, parameters, grad)
    for ours, theirs in zip(actual, torch.autograd.grad(expected, parameters, grad), strict=True):
        assert_close(ours, theirs, H, 1, I, K, H, I, T)


def test_a_skipped_expert_adds_nothing_and_learns_nothing():
    """How often, within three standard deviations, and the sum over what is left, scaled to the same expectation."""
    probability, num_tokens = 0.3, 2000
    experts = make(expert_dropout=probability)
    with torch.no_grad():
        experts.gate_up_proj_bias.zero_()
        experts.gate_up_proj.zero_()  # every expert gives its bias, and that is its number as a power of 3
        experts.down_proj_bias.copy_((3.0 ** torch.arange(E)).view(E, 1))
    ids = randn(num_tokens, E, seed=1).topk(K, dim=-1).indices.int()
    plan, weights = ops.plan(ids, E), torch.ones(num_tokens, K).requires_grad_()
    output = experts(randn(num_tokens, H), weights, plan)
    sums = output[:, 0] * (1 - probability)
    values = 3.0**ids
    seen = torch.stack(
        [values @ torch.tensor(kept, dtype=values.dtype) for kept in ((0, 0), (1, 0), (0, 1), (1, 1))], 1
    )
    which = (sums.unsqueeze(1) - seen).abs().min(dim=1)
    assert (which.values < 1e-3).all()  # always a sum of whole experts
    dropped = 2 * num_tokens - (which.indices == 1).sum() - (which.indices == 2).sum() - 2 * (which.indices == 3).sum()
    slots = num_tokens * K
    assert abs(dropped - probability * slots) < 3 * math.sqrt(slots * probability * (1 - probability))
    output.sum().backward()
    assert ((weights.grad == 0).sum() == dropped).item()


@pytest.mark.parametrize("options", BOTH, ids=["inside", "whole"])
def test_expectation_is_that_of_evaluation(options):
    """Over many draws the mean comes to the output of evaluation, within five standard errors."""
    experts, repeats = make(**options), 4000
    ids = torch.tensor([[1, 3]], dtype=torch.int32).expand(repeats, K).contiguous()
    hidden_states, weights = randn(1, H).expand(repeats, H), torch.tensor([[0.7, 0.3]]).expand(repeats, K).contiguous()
    plan = ops.plan(ids, E)
    draws = experts(hidden_states, weights, plan).detach()
    expected = experts.eval()(hidden_states, weights, plan)[0]
    assert ((draws.mean(0) - expected).abs() < 5 * draws.std(0) / math.sqrt(repeats)).all()


@pytest.mark.parametrize("options", BOTH, ids=["inside", "whole"])
def test_recomputation_and_compilation_drop_the_same(options):
    torch.compiler.reset()
    experts, (hidden_states, weights, plan) = make(**options), inputs()
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    results = []
    for call in (experts, compiled, lambda *args: checkpoint(experts, *args, use_reentrant=False)):
        torch.manual_seed(3)
        x = hidden_states.clone().requires_grad_()
        output = call(x, weights, plan)
        output.square().sum().backward()
        results.append((output.detach(), x.grad))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_mixed_precision():
    experts, (hidden_states, weights, plan) = make(dropout=0.4), inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert experts(hidden_states, weights, plan).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout": 1.0}, r"ExpertsConfig: dropout must be in \[0, 1\), got 1.0"),
        ({"expert_dropout": -0.1}, r"ExpertsConfig: expert_dropout must be in \[0, 1\), got -0.1"),
        (
            {"dropout": 0.1, "recompute": True},
            "ExpertsConfig: dropout=0.1 keeps what recompute=True would not: use torch",
        ),
    ],
)
def test_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
