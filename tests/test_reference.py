"""reference: the specification against worked examples and published formulas, done by hand or by torch."""

import torch
from helpers import randn
from torch.nn import functional

from torch_moe import reference
from torch_moe.ops import Plan


def test_route_by_hand():
    """Odds 1, 2, 4, 1: the best two are experts 2 and 1, with 4/8 and 2/8 before renormalisation."""
    logits = torch.tensor([[1.0, 2.0, 4.0, 1.0]], dtype=torch.float64).log()
    weights, ids = reference.route(logits, 2)
    assert ids.tolist() == [[2, 1]]
    torch.testing.assert_close(weights, torch.tensor([[4 / 6, 2 / 6]], dtype=torch.float64))
    weights = reference.route(logits, 2, renormalize=False, routed_scaling_factor=2.0)[0]
    torch.testing.assert_close(weights, torch.tensor([[1.0, 0.5]], dtype=torch.float64))


def test_softmax_over_the_selection_is_renormalised_softmax():
    """Mixtral's order of the two steps and Switch's agree, once renormalised."""
    logits = randn(20, 9, dtype=torch.float64)
    first, second = (reference.route(logits, 3, score_order=order) for order in ("score_then_topk", "topk_then_score"))
    torch.testing.assert_close(first, second)


def test_groups_by_hand():
    """Groups (5, 0), (4, 3), (1, 1): sums 5, 7, 2; the best is the second, though expert 0 is the best alone."""
    logits = torch.tensor([[5.0, 0.0, 4.0, 3.0, 1.0, 1.0]])
    options = {"num_groups": 3, "score_order": "topk_then_score"}
    assert reference.route(logits, 2, topk_groups=1, **options)[1].tolist() == [[2, 3]]
    assert reference.route(logits, 2, topk_groups=2, **options)[1].tolist() == [[0, 2]]


def test_bias_moves_the_choice_but_not_the_weight():
    logits, bias = torch.zeros(1, 4), torch.tensor([0.0, 0.0, 0.0, 1.0])
    weights, ids = reference.route(logits, 1, bias, score_function="sigmoid", renormalize=False)
    assert ids.tolist() == [[3]]
    assert weights.tolist() == [[0.5]]


def test_nan_is_chosen_last():
    logits = torch.tensor([[float("nan"), -float("inf"), -5.0, 1.0]])
    assert reference.route(logits, 4)[1].tolist() == [[3, 2, 0, 1]]  # NaN counts as -inf: a tie, the lower id first


def test_plan_by_hand():
    """Slots 0..5 go to experts 2, 0, 0, 2, -1 (dropped), 0."""
    ids = torch.tensor([[2, 0], [0, 2], [-1, 0]], dtype=torch.int32)
    expected = ([0, 3, 3, 5], [1, 2, 5, 0, 3, -1], [[3, 0], [1, 4], [-1, 2]])
    assert tuple(part.tolist() for part in reference.plan(ids, 3)) == expected
    expected = ([0, 1, 1, 2], [1, 0, -1, -1, -1, -1], [[1, 0], [-1, -1], [-1, -1]])
    assert tuple(part.tolist() for part in reference.plan(ids, 3, capacity=1)) == expected


def test_permute_and_combine_by_hand():
    ids = torch.tensor([[2, 0], [0, 2], [-1, 0]], dtype=torch.int32)
    plan = reference.plan(ids, 3)
    rows = reference.permute(torch.tensor([[10.0], [20.0], [30.0]]), plan)
    assert rows.flatten().tolist() == [10, 20, 30, 10, 20, 0]
    weights = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    assert reference.combine(rows, weights, plan).flatten().tolist() == [30, 140, 180]
    assert reference.combine(rows, None, plan).flatten().tolist() == [20, 40, 30]


def test_activations_by_their_formulas():
    g, u = randn(4, 3, dtype=torch.float64), randn(4, 3, dtype=torch.float64, seed=1)
    concat, interleaved = torch.cat([g, u], dim=1), torch.stack([g, u], dim=2).flatten(1)
    phi = (1 + torch.erf(g / 2**0.5)) / 2
    expected = {"swiglu": g / (1 + (-g).exp()) * u, "geglu": g * phi * u, "reglu": torch.relu(g) * u}
    expected["geglu_tanh"] = functional.gelu(g, approximate="tanh") * u
    for name, value in expected.items():
        torch.testing.assert_close(reference.activation(concat, name), value)
        torch.testing.assert_close(reference.activation(interleaved, name, gate_layout="interleaved"), value)
    ungated = {"silu": g / (1 + (-g).exp()), "gelu": g * phi, "relu": g.clamp(min=0), "relu2": g.clamp(min=0) ** 2}
    for name, value in ungated.items():
        torch.testing.assert_close(reference.activation(g, name), value)


def test_gpt_oss_activation():
    """As published: gate clamped from above, up on both sides, (up + 1) * gate * sigmoid(1.702 * gate)."""
    g, u = torch.tensor([[9.0, -9.0, 1.0]]).double(), torch.tensor([[-9.0, 2.0, 9.0]]).double()
    gate, up = torch.tensor([[7.0, -9.0, 1.0]]).double(), torch.tensor([[-7.0, 2.0, 7.0]]).double()
    actual = reference.activation(torch.cat([g, u], dim=1), alpha=1.702, limit=7.0, up_offset=1.0)
    torch.testing.assert_close(actual, (up + 1) * gate * torch.sigmoid(1.702 * gate))


def test_experts_equal_a_loop_over_tokens():
    tokens, hidden, intermediate, experts, top_k = 6, 4, 5, 3, 2
    x = randn(tokens, hidden, dtype=torch.float64)
    w1 = randn(experts, 2 * intermediate, hidden, dtype=torch.float64, seed=1)
    w2 = randn(experts, hidden, intermediate, dtype=torch.float64, seed=2)
    weights, ids = reference.route(randn(tokens, experts, dtype=torch.float64, seed=3), top_k)
    expected = torch.zeros_like(x)
    for t in range(tokens):
        for weight, e in zip(weights[t], ids[t].tolist(), strict=True):
            gate, up = (w1[e] @ x[t]).chunk(2)
            expected[t] += weight * (w2[e] @ (functional.silu(gate) * up))
    plan = reference.plan(ids, experts)
    assert isinstance(plan, Plan)
    torch.testing.assert_close(reference.experts(x, w1, w2, weights, plan), expected)
    swapped = (w1.transpose(1, 2), w2.transpose(1, 2))
    torch.testing.assert_close(reference.experts(x, *swapped, weights, plan, weight_layout="in_out"), expected)
