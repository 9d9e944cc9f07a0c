"""route: the selection and its ties, the weights and their gradient, and its errors."""

import itertools

import pytest
import torch
from helpers import ALL_DTYPES, check_against_reference, randn, weight_dtype

from torch_moe import ops, reference
from torch_moe.testing import SHAPES

SCORES = ("softmax", "sigmoid", "sqrtsoftplus")
VARIANTS = {
    "-".join(map(str, variant)): dict(zip(("score_function", "score_order", "renormalize"), variant, strict=True))
    for variant in itertools.product(SCORES, ("score_then_topk", "topk_then_score"), (True, False))
}


def check(logits, top_k, expert_bias=None, route_override=None, **options):
    """Compare ids, weights and the gradient of the logits with the reference."""
    bias = None if expert_bias is None else expert_bias.to(weight_dtype(logits.dtype))
    ids = ops.route(logits, top_k, bias, route_override, **options)[1]
    exact_bias = None if bias is None else bias.double()
    expected_ids = reference.route(logits.double(), top_k, exact_bias, route_override, **options)[1]
    assert torch.equal(ids, expected_ids)
    num_experts = logits.shape[1]
    check_against_reference(
        lambda router_logits: ops.route(router_logits, top_k, bias, route_override, **options)[0],
        lambda router_logits: reference.route(router_logits, top_k, exact_bias, route_override, **options)[0],
        {"router_logits": logits},
        # A score is a sum over the experts, its renormalisation one over the chosen; the gradient walks both back.
        {"output": (num_experts, top_k), "router_logits": (num_experts, top_k, top_k, num_experts)},
        weight_dtype(logits.dtype),
    )


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_equals_the_reference(options, dtype, device):
    check(randn(40, 24, dtype=dtype, device=device), 4, **options)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_named_shapes(shape, device):
    check(randn(shape.num_tokens, shape.num_experts, device=device), shape.top_k, renormalize=shape.top_k > 1)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_expert_bias_steers_the_selection_only(options, device):
    logits, bias = randn(40, 24, device=device), 3 * randn(24, device=device, seed=1)
    check(logits, 4, bias, **options)
    assert not torch.equal(ops.route(logits, 4, bias, **options)[1], ops.route(logits, 4, **options)[1])


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize(("num_groups", "topk_groups", "top_k"), [(6, 2, 3), (24, 5, 5), (4, 4, 8), (2, 1, 12)])
def test_groups(options, num_groups, topk_groups, top_k, device):
    logits, bias = randn(40, 24, device=device), randn(24, device=device, seed=1) / 10
    groups = {"num_groups": num_groups, "topk_groups": topk_groups}
    check(logits, top_k, bias, **options, **groups)
    check(logits, top_k, **options, **groups)
    ids = ops.route(logits, top_k, **options, **groups)[1] // (24 // num_groups)
    assert max(len(set(row)) for row in ids.tolist()) <= topk_groups


@pytest.mark.parametrize("group_mask", ["-inf", "zero"])
@pytest.mark.parametrize("group_score", ["top2_sum", "max"])
def test_kinds_of_groups(group_score, group_mask, device):
    logits, bias = randn(40, 24, device=device), randn(24, device=device, seed=1)
    options = {"num_groups": 6, "topk_groups": 2, "group_score": group_score, "group_mask": group_mask}
    check(logits, 4, bias, **options)
    check(logits, 4, bias, score_order="topk_then_score", **options)
    plain = ops.route(logits, 4, bias, num_groups=6, topk_groups=2)[1]
    assert (group_score, group_mask) == ("top2_sum", "-inf") or not torch.equal(
        ops.route(logits, 4, bias, **options)[1], plain
    )


@pytest.mark.parametrize("eps_mode", ["add", "clamp"])
@pytest.mark.parametrize("eps", [0.0, 0.5, 5.0])
@pytest.mark.parametrize("p", [1.0, 2.0])
def test_norms(p, eps, eps_mode, device):
    options = {"renormalize_p": p, "renormalize_eps": eps, "renormalize_eps_mode": eps_mode}
    for score_function in SCORES:
        check(randn(40, 24, device=device), 3, score_function=score_function, **options)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_override_weighs_the_given_ids(options, device):
    logits = randn(40, 24, device=device)
    ids = torch.randint(-1, 25, (40, 5), generator=torch.Generator().manual_seed(0), dtype=torch.int32).to(device)
    check(logits, 5, None, ids, **options)
    weights = ops.route(logits, 5, None, ids, **options)[0]
    assert ((weights == 0) == ((ids < 0) | (ids >= 24))).all()


def test_replay_of_its_own_ids_changes_nothing(device):
    """Whatever chose the ids, groups and bias included: what is replayed has the same weights, bit for bit."""
    logits, bias = randn(40, 24, device=device), randn(24, device=device, seed=1)
    options = {"score_function": "sigmoid", "num_groups": 4, "topk_groups": 2, "routed_scaling_factor": 2.5}
    weights, ids = ops.route(logits, 3, bias, **options)
    replayed = ops.route(logits, 3, bias, ids, **options)
    assert torch.equal(replayed[0], weights)
    assert torch.equal(replayed[1], ids)


def test_more_choices_than_are_kept_sorted(device):
    """A large top_k takes another path through the selection."""
    check(randn(9, 300, device=device), 40)


def test_scaling_factor_multiplies(device):
    logits = randn(5, 8, device=device)
    scaled, plain = ops.route(logits, 2, routed_scaling_factor=2.5)[0], ops.route(logits, 2)[0]
    torch.testing.assert_close(scaled, plain * 2.5)
    check(logits, 2, routed_scaling_factor=2.5)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("top_k", [1, 3, 30])
def test_ties_go_to_the_lower_id(bias, top_k, device):
    logits = torch.zeros(3, 40, device=device)
    expert_bias = torch.ones(40, device=device) if bias else None
    ids = ops.route(logits, top_k, expert_bias, renormalize=False)[1]
    assert ids.tolist() == [list(range(top_k))] * 3


def test_saturated_scores_do_not_tie(device):
    """sigmoid(40) and sigmoid(50) are both 1 in fp32; the logits still tell them apart."""
    logits = torch.tensor([[40.0, 50.0, 45.0, -1.0]], device=device)
    assert ops.route(logits, 2, score_function="sigmoid")[1].tolist() == [[1, 2]]


WORKED = [2.1, 0.3, -1.5, 0.8, -0.2, 2.9, 0.1, -0.7]


@pytest.mark.parametrize(
    ("top_k", "biased", "options", "ids", "weights"),
    [
        (2, False, {"renormalize": False}, [5, 0], [0.558185, 0.250809]),
        (2, False, {}, [5, 0], [0.689974, 0.310026]),
        (2, False, {"score_order": "topk_then_score", "renormalize": False}, [5, 0], [0.689974, 0.310026]),
        (2, False, {"score_function": "sigmoid"}, [5, 0], [0.515484, 0.484516]),
        (2, False, {"score_function": "sqrtsoftplus"}, [5, 0], [0.535879, 0.464121]),
        (2, False, {"score_function": "sqrtsoftplus", "renormalize": False}, [5, 0], [1.718593, 1.488462]),
        (3, False, {"score_function": "sigmoid"}, [5, 0, 3], [0.374832, 0.352313, 0.272855]),
        (
            3,
            False,
            {"score_function": "sigmoid", "num_groups": 4, "topk_groups": 2, "routed_scaling_factor": 2.5},
            [5, 0, 1],
            [0.981943, 0.922951, 0.595106],
        ),
        (2, False, {"score_function": "sigmoid", "num_groups": 2}, [0, 3], [0.563550, 0.436450]),
        (
            2,
            False,
            {"score_function": "sigmoid", "num_groups": 2, "group_score": "max"},
            [5, 6],
            [0.643557, 0.356444],
        ),
        (2, True, {"score_function": "sigmoid"}, [3, 5], [0.421276, 0.578724]),
    ],
)
def test_worked_examples(top_k, biased, options, ids, weights, device):
    """Eight logits by hand, printed with six digits; with the bias, expert 3 wins by 0.5."""
    logits = torch.tensor([WORKED], device=device)
    bias = torch.zeros(8, device=device)
    bias[3] = 0.5
    actual = ops.route(logits, top_k, bias if biased else None, **options)
    assert actual[1].tolist() == [ids]
    torch.testing.assert_close(actual[0].cpu(), torch.tensor([weights]), rtol=0, atol=1e-6)
    # softmax(top_k_probs), which some texts print, is no mode.
    assert abs(actual[0][0, 0].item() - 0.576245) > 1e-3


def test_rows_that_get_gradient(device):
    """All experts' under softmax before the selection, the chosen ones' alone under the other order or renormalised."""
    for options, everywhere in (
        ({"renormalize": False}, True),
        ({"renormalize": True}, False),
        ({"score_order": "topk_then_score", "renormalize": False}, False),
        ({"score_function": "sigmoid"}, False),
    ):
        logits = randn(6, 8, device=device, dtype=torch.float64).requires_grad_()
        weights, ids = ops.route(logits, 2, **options)
        weights[:, 0].sum().backward()
        chosen = torch.zeros(6, 8, dtype=torch.bool, device=device).scatter_(1, ids.long(), True)
        assert (logits.grad[chosen].abs() > 1e-9).all()
        assert ((logits.grad[~chosen].abs() > 1e-9) == everywhere).all(), options


def test_ids_are_not_differentiable(device):
    weights, ids = ops.route(randn(3, 4, device=device).requires_grad_(), 2)
    assert weights.requires_grad
    assert not ids.requires_grad
    assert ids.dtype == torch.int32


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_logits(value, device):
    """Checked they are an error; unchecked the ids are distinct experts, never a silent -1."""
    logits = randn(4, 8, device=device)
    logits[1, 3] = value
    logits[2, :] = value
    with pytest.raises(RuntimeError, match="route: router_logits must be finite, got NaN or infinity"):
        ops.route(logits, 3, check_finite=True)
    for groups in ({}, {"num_groups": 4, "topk_groups": 2}):
        weights, ids = ops.route(logits, 3, **groups)
        assert all(len(set(row)) == 3 and set(row) <= set(range(8)) for row in ids.tolist())
        assert torch.equal(ids, reference.route(logits, 3, **groups)[1])
        assert weights[0].isfinite().all()
        if value != value:
            assert weights[1:3].isnan().all()  # a softmax that NaN enters is NaN
            assert 3 not in ids[1]


def test_checked_finite_logits_pass(device):
    logits = randn(4, 8, device=device)
    assert torch.equal(ops.route(logits, 3, check_finite=True)[1], ops.route(logits, 3)[1])


def test_non_contiguous_logits(device):
    wide = randn(6, 16, device=device)
    for actual, expected in zip(ops.route(wide[:, ::2], 3), ops.route(wide[:, ::2].contiguous(), 3), strict=True):
        assert torch.equal(actual, expected)


LOGITS = torch.zeros(4, 8)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((LOGITS.int(), 2), {}, "route: router_logits must be float32, bfloat16, float16 or float64, got int32"),
        ((LOGITS[0], 2), {}, r"route: router_logits must have 2 dimensions .*got shape \[8\]"),
        ((LOGITS, 0), {}, "route: top_k must .*got 0"),
        ((LOGITS, 9), {}, "route: top_k must .*8.*got 9"),
        ((LOGITS, 2, torch.zeros(7)), {}, r"route: expert_bias must have shape \[8\].*got \[7\]"),
        (
            (LOGITS, 2, torch.zeros(8).half()),
            {},
            r"route: expert_bias must be float32, got float16 \(call \.float\(\)\)",
        ),
        ((LOGITS, 2), {"score_function": "tanh"}, "route: score_function must be one of .*softmax.*got 'tanh'"),
        ((LOGITS, 2), {"score_order": "both"}, "route: score_order must be one of .*got 'both'"),
        ((LOGITS, 2), {"group_score": "mean"}, "route: group_score must be one of .*top2_sum.*got 'mean'"),
        ((LOGITS, 2), {"group_mask": "nan"}, "route: group_mask must be one of .*zero.*got 'nan'"),
        ((LOGITS, 2), {"renormalize_p": 0.5}, "route: renormalize_p must be at least 1, got 0.5"),
        ((LOGITS, 2), {"renormalize_eps": -1.0}, "route: renormalize_eps must not be negative, got -1"),
        ((LOGITS, 2), {"renormalize_eps_mode": "max"}, "route: renormalize_eps_mode must be .*clamp.*got 'max'"),
        ((LOGITS, 2, None, torch.zeros(4, 2)), {}, r"route: route_override must be int32, got float32"),
        ((LOGITS, 2, None, torch.zeros(4, 3).int()), {}, r"route: route_override must have shape \[4, 2\]"),
        ((LOGITS, 2), {"num_groups": 3}, "route: num_groups must .*8.*got 3"),
        ((LOGITS, 2), {"num_groups": 4, "topk_groups": 5}, "route: topk_groups must .*got 5"),
        (
            (LOGITS, 5),
            {"num_groups": 4, "topk_groups": 2},
            "route: topk_groups must keep at least top_k = 5 experts, got 2 groups of 2",
        ),
    ],
)
def test_errors(arguments, options, message):
    with pytest.raises(RuntimeError, match=message):
        ops.route(*arguments, **options)
