"""TopKRouter: precision, bias, initialisation, and what it refuses."""

import copy

import pytest
import torch
from helpers import ALL_DTYPES, randn
from torch.nn import functional

from torch_moe import TopKRouter, ops

H, E, K = 16, 8, 2


@pytest.fixture
def router(device):
    torch.manual_seed(0)
    return TopKRouter(H, E, K, device=device)


@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_logits_are_computed_in_fp32_or_more(router, dtype, device):
    x = randn(5, H, dtype=dtype, device=device)
    logits, weights, ids = router.to(dtype)(x)
    wide = torch.promote_types(dtype, torch.float32)
    assert logits.dtype == weights.dtype == wide
    assert torch.equal(logits, functional.linear(x.to(wide), router.weight.to(wide)))
    expected = ops.route(logits, K)
    assert torch.equal(weights, expected[0])
    assert torch.equal(ids, expected[1])


def test_autocast_leaves_the_router_alone(router, device):
    x = randn(5, H, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        logits, weights, _ = router(x)
    assert torch.equal(logits, router(x)[0])
    assert weights.dtype == torch.float32


def test_gradient_reaches_weight_and_input(router, device):
    x = randn(5, H, device=device).requires_grad_()
    router(x)[1][:, 0].sum().backward()
    assert router.weight.grad.abs().sum() > 0
    assert x.grad.abs().sum() > 0


def test_options_reach_the_operator(device):
    options = {
        "score_function": "sigmoid",
        "score_order": "score_then_topk",
        "renormalize": False,
        "routed_scaling_factor": 2.5,
        "num_groups": 4,
        "topk_groups": 2,
    }
    router = TopKRouter(H, E, K, expert_bias=True, device=device, **options)
    router.expert_bias.copy_(randn(E, device=device))
    logits, weights, ids = router(randn(9, H, device=device))
    expected = ops.route(logits, K, router.expert_bias, **options)
    assert torch.equal(weights, expected[0])
    assert torch.equal(ids, expected[1])


def test_check_finite(device):
    router = TopKRouter(H, E, K, check_finite=True, device=device)
    x = randn(5, H, device=device)
    router(x)
    x[2, 3] = torch.nan
    with pytest.raises(RuntimeError, match="route: router_logits must be finite"):
        router(x)


def test_expert_bias_is_a_saved_buffer_of_zeros(device):
    router = TopKRouter(H, E, K, expert_bias=True, device=device)
    assert set(router.state_dict()) == {"weight", "expert_bias"}
    assert dict(router.named_parameters()).keys() == {"weight"}
    assert torch.equal(router.expert_bias, torch.zeros(E, device=device))
    assert set(TopKRouter(H, E, K).state_dict()) == {"weight"}


def test_expert_bias_stays_fp32(device):
    """A bias of 1 + 2**-20 is 1 in bf16: a cast of the module must not touch it."""
    router = TopKRouter(H, E, K, expert_bias=True, device=device)
    router.expert_bias.fill_(1 + 2**-20)
    expected = router.expert_bias.clone()
    router.to(torch.bfloat16)
    assert router.weight.dtype == torch.bfloat16
    assert router.expert_bias.dtype == torch.float32
    assert torch.equal(router.expert_bias, expected)
    router(randn(5, H, dtype=torch.bfloat16, device=device))
    router.double()(randn(5, H, dtype=torch.float64, device=device))


def test_expert_bias_goes_to_meta_and_back(device):
    router = TopKRouter(H, E, K, expert_bias=True, device="meta").to(torch.bfloat16)
    router.to_empty(device=device)
    router.reset_parameters()
    assert router.expert_bias.dtype == torch.float32
    assert (router.expert_bias == 0).all()


def test_initialisation_rule(device):
    torch.manual_seed(3)
    router = TopKRouter(64, 512, K, device=device)
    assert router.weight.abs().max() <= 64**-0.5
    assert router.weight.abs().max() > 0.99 * 64**-0.5
    before = router.weight.detach().clone()
    torch.manual_seed(3)
    router.reset_parameters()
    assert torch.equal(router.weight, before)


def test_repr_names_every_option_that_is_set():
    text = repr(TopKRouter(H, E, K, expert_bias=True, num_groups=4, topk_groups=2, routed_scaling_factor=2.5))
    for part in ("hidden_size=16", "num_experts=8", "top_k=2", "score_function=softmax", "renormalize=True",
                 "routed_scaling_factor=2.5", "num_groups=4, topk_groups=2", "expert_bias=True"):  # fmt: skip
        assert part in text
    plain = repr(TopKRouter(H, E, K))
    assert not any(part in plain for part in ("routed_scaling_factor", "num_groups", "expert_bias"))


def test_copy_is_independent(router, device):
    twin = copy.deepcopy(router)
    with torch.no_grad():
        twin.weight.zero_()
    assert router.weight.abs().sum() > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 0}, "hidden_size must be at least 1, got 0"),
        ({"num_experts": 0}, "num_experts must be at least 1, got 0"),
        ({"top_k": 0}, r"top_k must be in \[1, num_experts = 8\], got 0"),
        ({"top_k": 9}, r"top_k must be in \[1, num_experts = 8\], got 9"),
        ({"score_function": "tanh"}, r"score_function must be in \('softmax', 'sigmoid', 'sqrtsoftplus'\), got 'tanh'"),
        ({"score_order": "both"}, "score_order must be in .*, got 'both'"),
        ({"num_groups": 3}, "num_groups must divide num_experts = 8, got 3"),
        ({"num_groups": 0}, "num_groups must divide num_experts = 8, got 0"),
        ({"num_groups": 4, "topk_groups": 5}, r"topk_groups must be in \[1, num_groups = 4\], got 5"),
        (
            {"num_groups": 4, "topk_groups": 1, "top_k": 3},
            "top_k must be at most 2, the experts of topk_groups = 1 groups, got 3",
        ),
        ({"top_k": 1}, "top_k=1 needs renormalize=False .*identically 1.*no gradient"),
        ({"top_k": 1, "score_function": "sigmoid"}, "top_k=1 needs renormalize=False"),
        ({"top_k": 1, "renormalize": False, "score_order": "topk_then_score"}, "top_k=1 needs .* not a softmax"),
    ],
)
def test_refused(change, message):
    with pytest.raises(ValueError, match=f"RouterConfig: {message}"):
        TopKRouter(**{"hidden_size": H, "num_experts": E, "top_k": K, **change})


@pytest.mark.parametrize(
    "options",
    [
        {"renormalize": False},
        {"renormalize": False, "score_function": "sigmoid", "score_order": "topk_then_score"},
        {"num_experts": 1},  # nothing to learn
    ],
)
def test_accepted_top_1(options):
    TopKRouter(**{"hidden_size": H, "num_experts": E, "top_k": 1, **options})


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        ({}, {"hidden_states": torch.zeros(1, 5, H)}, r"hidden_states must have 2 dimensions .*got shape \[1, 5, 16\]"),
        ({}, {"hidden_states": torch.zeros(H)}, r"hidden_states must have 2 dimensions .*\(call \.flatten\(0, -2\)\)"),
        ({}, {"router_state": torch.zeros(5, 4)}, "router_state does nothing without projection_state=True"),
        (
            {"projection": "mlp", "projection_size": 4},
            {"router_state": torch.zeros(5, 4)},
            "router_state does nothing without projection_state=True",
        ),
        (
            {"projection": "mlp", "projection_size": 4, "projection_state": True},
            {"router_state": torch.zeros(1, 4)},
            r"router_state must have shape \[5, 4\] = \[num_tokens, projection_size\], got \[1, 4\]",
        ),
        ({"selection": "hash", "vocab_size": 9}, {}, 'selection="hash" needs token_ids, got None'),
        (
            {"selection": "sparsemixer", "renormalize": False},
            {"route_override": torch.zeros(5, 3, dtype=torch.int32)},
            r"route_override must have shape \[5, 2\] = \[num_tokens, top_k\], got \[5, 3\]",
        ),
    ],
)
def test_refused_arguments(options, arguments, message):
    with pytest.raises(ValueError, match=f"^TopKRouter: {message}"):
        TopKRouter(H, E, K, **options)(**{"hidden_states": torch.zeros(5, H), **arguments})


@pytest.mark.parametrize("options", [{}, {"selection": "sparsemixer", "renormalize": False}], ids=["topk", "sparse"])
def test_an_overriding_id_of_no_expert_weighs_nothing_whatever_scales_the_others(options, device):
    router = TopKRouter(H, E, K, per_expert_scale=True, device=device, **options).eval()
    x = randn(5, H, device=device)
    ids = router(x).topk_ids
    ids[0, 1], ids[1, 1] = E, -E - 1
    _, weights, kept = router(x, route_override=ids)
    assert torch.equal(kept, ids)
    assert (weights[:2, 1] == 0).all()
    assert (weights[:, 0] > 0).all()
    weights.sum().backward()
    assert router.per_expert_scale.grad.isfinite().all()
