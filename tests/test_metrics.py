"""RoutingStats: every metric by hand or against the definition, and a record that adds up."""

import math

import pytest
import torch
from helpers import randn
from torch import nn
from torch.utils.checkpoint import checkpoint

from torch_moe import MoE, Observation, RoutingStats, TopKRouter, reference
from torch_moe.metrics import flip_rate, max_vio
from torch_moe.testing import assert_close

T, H, I, E, K = 24, 16, 8, 6, 2  # noqa: E741
OPTIONS = {"score_function": "sigmoid", "expert_bias": True}


def make(**options):
    torch.manual_seed(0)
    layer = MoE(H, I, E, K, **options)
    if layer.router.expert_bias is not None:
        layer.router.expert_bias.copy_(torch.linspace(-0.2, 0.2, E))
    return layer


def value(stats, name, layer=0):
    return stats.metrics()[name][layer].item()


def test_load_by_hand():
    """f = (.5, .25, .125, .125): MaxVio 1, 3.3636 effective experts."""
    stats = RoutingStats(4)
    stats.observe(Observation(torch.tensor([[0], [0], [0], [0], [1], [1], [2], [3]])))
    assert value(stats, "max_vio") == 1
    assert value(stats, "effective_experts") == pytest.approx(3.3636, abs=1e-4)
    assert max_vio(torch.tensor([[5, 5], [0, 10]])).tolist() == [0, 1]


def test_micro_max_vio_is_the_mean_over_calls():
    """Two calls, each on one expert: together even, each as uneven as can be."""
    stats = RoutingStats(2)
    for expert in (0, 1):
        stats.observe(Observation(torch.full((8, 1), expert)))
    stats.observe(Observation(torch.full((8, 1), -1)))  # nothing chosen is no call
    assert value(stats, "max_vio") == 0
    assert value(stats, "micro_max_vio") == 1


def test_dead_and_cold_experts():
    stats = RoutingStats(10)
    ids = torch.cat([torch.arange(8).repeat(1000), torch.full((9,), 8)])  # 8 even ones, one with .011 of fair, one dead
    stats.observe(Observation(ids.view(-1, 1)))
    assert value(stats, "dead") == pytest.approx(0.1)
    assert value(stats, "cold") == pytest.approx(0.2)


@pytest.mark.parametrize(
    "options", [{}, OPTIONS, {"score_order": "topk_then_score"}], ids=["plain", "biased", "logits"]
)
def test_scores_against_their_definitions(options):
    layer, x = make(**options), randn(T, H)
    stats = RoutingStats.attach(layer)
    logits, ids, weights, load = layer(x, return_routing=True)[1]
    assert torch.equal(stats.tokens_per_expert(0), load.long())
    mass = [weights[ids == expert].double().sum() for expert in range(E)]
    assert_close(stats.gate_mass(0), torch.stack(mass), T, dtype=torch.float32)

    function = torch.sigmoid if options == OPTIONS else lambda z: z.softmax(dim=-1)
    share = function(logits.double())
    share = share / share.sum(-1, keepdim=True)
    for name, probability in (("entropy", share), ("mean_entropy", share.mean(0))):
        entropy = -(probability * probability.log()).sum(-1).mean() / math.log(E)
        assert value(stats, name) == pytest.approx(entropy.item(), rel=1e-5)

    candidates = logits.double() if "score_order" in options else function(logits.double())
    candidates = candidates + (0 if layer.router.expert_bias is None else layer.router.expert_bias)
    best = candidates.sort(dim=-1, descending=True).values
    assert value(stats, "margin") == pytest.approx((best[:, K - 1] - best[:, K]).mean().item(), rel=1e-4)


def test_gate_mass_is_of_valid_choices_of_tokens():
    stats, ids = RoutingStats(3), torch.tensor([[0, 1], [0, -1], [2, 0]])
    weights = torch.tensor([[0.75, 0.25], [0.5, 8.0], [0.5, 16.0]])
    stats.observe(Observation(ids, weights), mask=torch.tensor([True, True, False]))
    assert stats.gate_mass(0).tolist() == [1.25, 0.25, 0]


def test_flip_rate_is_that_of_rounded_logits():
    """Logits closer than bf16 can tell: rounding ties them, and the lower id wins."""
    router = TopKRouter(E, E, 1, renormalize=False)
    router.weight.data.copy_(torch.eye(E))
    stats = RoutingStats.attach([router])
    near, far = torch.zeros(1, E), torch.zeros(1, E)
    near[0, 1], near[0, 4] = 3.0, 3.001
    far[0, 1], far[0, 4] = 3.0, 4.0
    assert router(torch.cat([near, far]))[2].tolist() == [[4], [4]]
    assert value(stats, "flip_rate") == 0.5
    stats.reset()
    layer, x = make(), randn(2000, H)
    stats = RoutingStats.attach(layer)
    logits, ids = layer(x, return_routing=True)[1][:2]
    other = reference.route(logits.bfloat16().double(), K)[1]
    assert value(stats, "flip_rate") == pytest.approx(flip_rate(ids, other).item())
    assert 0 < value(stats, "flip_rate") < 0.05


def test_flip_rate_of_two_choices():
    ids, other = torch.tensor([[0, 1], [2, 3]]), torch.tensor([[1, 0], [2, 4]])
    assert flip_rate(ids, other) == 0.25
    assert flip_rate(ids, other, mask=torch.tensor([1, 0])) == 0
    assert flip_rate(ids, other, mask=torch.tensor([0, 1])) == 0.5


def test_flip_rate_refuses_other_tokens():
    ids = torch.zeros(3, 2, dtype=torch.int64)
    with pytest.raises(
        ValueError, match=r"flip_rate: other_ids must have the tokens of topk_ids, \[3\], got .*\[1, 2\]"
    ):
        flip_rate(ids, ids[:1])  # which would be spread over all tokens
    with pytest.raises(ValueError, match="flip_rate: mask must have one element per token, 3"):
        flip_rate(ids, ids, mask=torch.ones(1))


@pytest.mark.parametrize("masked", [False, True])
def test_drop_rate(masked):
    layer, x = make(capacity_factor=0.7), randn(T, H)
    stats = RoutingStats.attach(layer)
    keep = torch.arange(T) % 4 != 0 if masked else torch.ones(T, dtype=torch.bool)
    stats.mask = keep if masked else None
    ids = layer(x, return_routing=True)[1].topk_ids
    plan = reference.plan(ids, E, layer.capacity(T))
    expected = (plan.slot_to_row[keep] < 0).double().mean().item()
    assert expected > 0
    assert value(stats, "drop_rate") == pytest.approx(expected)
    by_hand = RoutingStats(E)
    by_hand.observe(Observation(ids, tokens_per_expert=plan.tokens_per_expert))
    assert value(by_hand, "drop_rate") == pytest.approx((plan.slot_to_row < 0).double().mean().item())
    assert math.isnan(value(RoutingStats.attach(layer.router), "drop_rate"))  # a router alone drops nothing it knows of


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_drops_of_a_recomputed_layer_are_counted_once(use_reentrant):
    layer, x = make(capacity_factor=0.7), randn(T, H).requires_grad_()
    stats, plain = RoutingStats.attach(layer), RoutingStats.attach(layer)
    layer(x)
    plain.detach()
    stats.reset()
    checkpoint(layer, x, use_reentrant=use_reentrant).sum().backward()
    assert 0 < value(stats, "drop_rate") == value(plain, "drop_rate")


def test_experts_without_weights_are_chosen_and_never_dropped():
    layer, x = make(num_zero_experts=3, capacity_factor=0.7), randn(T, H)
    stats = RoutingStats.attach(layer)
    ids, _, kept = layer(x, return_routing=True)[1][1:]
    assert torch.equal(stats.tokens_per_expert(0), ids.flatten().bincount(minlength=E + 3))
    limited = (ids < E).sum()
    assert value(stats, "drop_rate") == pytest.approx(((limited - kept.sum()) / limited).item())
    assert kept.sum() < limited < T * K


@pytest.mark.parametrize("options", [{"force_balanced": True}, {"selection": "sinkhorn"}], ids=["forced", "sinkhorn"])
def test_a_choice_that_is_no_top_k_has_no_margin(options):
    layer = make(score_function="sigmoid", **options)
    stats = RoutingStats.attach(layer)
    logits = layer(randn(T, H), return_routing=True)[1].router_logits
    share = logits.double().sigmoid()
    share = share / share.sum(-1, keepdim=True)
    assert value(stats, "entropy") == pytest.approx(
        (-share * share.log()).sum(-1).mean().item() / math.log(E), rel=1e-5
    )
    assert math.isnan(value(stats, "margin"))
    assert math.isnan(value(stats, "flip_rate"))


def test_a_replayed_choice_has_no_margin():
    layer = make(**OPTIONS)
    stats = RoutingStats.attach(layer)
    layer(randn(T, H), route_override=torch.tensor([[0, 1]], dtype=torch.int32).expand(T, K))
    assert stats.tokens_per_expert(0).tolist() == [T, T, 0, 0, 0, 0]
    assert 0 < value(stats, "entropy") < 1
    assert math.isnan(value(stats, "margin"))
    assert math.isnan(value(stats, "flip_rate"))


def test_a_slot_without_an_expert_does_not_flip():
    stats, logits = RoutingStats(3), torch.tensor([[3.0, 2.0, 1.0]])
    stats.observe(Observation(torch.tensor([[0, -1]]), router_logits=logits, route_options={}))
    assert value(stats, "flip_rate") == 0


def test_a_single_expert_is_certain():
    stats = RoutingStats(1)
    stats.observe(Observation(torch.zeros(2, 1, dtype=torch.int64), router_logits=torch.ones(2, 1)))
    assert value(stats, "entropy") == value(stats, "mean_entropy") == 0


def test_sums_follow_the_routing_to_its_device():
    stats = RoutingStats(E)
    ids, logits = torch.zeros(T, K, dtype=torch.int32, device="meta"), torch.zeros(T, E, device="meta")
    stats.observe(Observation(ids, torch.zeros(T, K, device="meta"), logits, route_options={}))
    assert {sums.device.type for sums in stats.state_dict().values()} == {"meta"}


def test_a_layer_with_a_router_of_another_kind_is_no_layer():
    class Other(nn.Module):
        num_experts = E

    model = nn.Sequential(make(), make())
    model[0].router = Other()
    stats = RoutingStats.attach(model)
    assert len(stats.metrics()["max_vio"]) == 1


def test_padding_is_not_counted():
    """Every metric is that of the tokens alone, even where the padding is NaN."""
    layer, x, mask = make(**OPTIONS), randn(T, H), torch.arange(T) % 3 != 0
    stats, alone = RoutingStats.attach(layer), RoutingStats(E)
    x[~mask] = torch.nan
    stats.mask = mask.view(2, -1).int()
    layer(x)
    stats.detach()
    alone = RoutingStats.attach(layer)
    layer(x[mask])
    for name, expected in alone.metrics().items():
        torch.testing.assert_close(stats.metrics()[name], expected, equal_nan=True, msg=name)
    assert stats.tokens_per_expert(0).sum() == mask.sum() * K


def test_records_add_up():
    """Merged, accumulated, saved and loaded are all the same record; reset is none."""
    layer, batches = make(capacity_factor=1.0, **OPTIONS), [randn(T, H, seed=seed) for seed in range(3)]
    whole, parts = RoutingStats.attach(layer), RoutingStats(E)
    single = []
    for x in batches:
        stats = RoutingStats.attach(layer)
        layer(x)
        stats.detach()
        single.append(stats)
    for stats in single:
        parts.merge(stats)
    for name, expected in whole.metrics().items():
        torch.testing.assert_close(parts.metrics()[name], expected, equal_nan=True, msg=name)
    loaded = RoutingStats(E)
    loaded.merge(single[0])
    loaded.load_state_dict(whole.state_dict())
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in whole.state_dict().items())
    whole.reset()
    assert whole.tokens_per_expert(0).sum() == 0
    assert whole.metrics()["max_vio"].isnan().all()
    assert loaded.tokens_per_expert(0).sum() == 3 * T * K
    with pytest.raises(ValueError, match="RoutingStats: the record must have the shapes"):
        RoutingStats(E + 1).merge(loaded)


def test_counts_in_training_and_eval_until_detached():
    layer = make()
    stats = RoutingStats.attach(layer)
    for mode in (True, False):
        layer.train(mode)(randn(T, H))
    assert stats.tokens_per_expert(0).sum() == 2 * T * K
    stats.detach()
    layer(randn(T, H))
    assert stats.tokens_per_expert(0).sum() == 2 * T * K


def test_observing_changes_nothing():
    layer, x = make(**OPTIONS), randn(T, H).requires_grad_()
    results = []
    for attached in (False, True):
        stats = RoutingStats.attach(layer) if attached else None
        output = layer(x)
        results.append((output, *torch.autograd.grad(output.square().sum(), [x, *layer.parameters()])))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert not any(value.requires_grad for value in stats.state_dict().values())


@pytest.mark.parametrize("options", [{"capacity_factor": 1.0}, OPTIONS], ids=["capacity", "biased"])
def test_compiled_layer_counts_the_same(options):
    """Twice, because sums made inside a graph would be lost after its first call."""
    torch.compiler.reset()
    layer = make(**options)
    stats = RoutingStats.attach(layer)
    states = []
    for function in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        stats.reset()
        for seed in range(2):
            function(randn(T, H, seed=seed)).sum().backward()
        states.append(stats.state_dict())
    for name, expected in states[0].items():
        torch.testing.assert_close(states[1][name], expected, msg=name)


def test_no_tokens():
    layer = make()
    stats = RoutingStats.attach(layer)
    layer(randn(0, H))
    assert all(value.isnan().all() for value in stats.metrics().values())
    assert "-" in str(stats.summary())


def test_summary_prints_with_and_without_rich():
    model = nn.Sequential(make(capacity_factor=1.0), make(**OPTIONS))
    stats = RoutingStats.attach(model)
    model(randn(T, H))
    lines = str(stats.summary()).splitlines()
    assert len(lines) == 4
    assert [line.split()[:2] for line in lines[2:]] == [["0", str(T * K)], ["1", str(T * K)]]
    assert "max vio" in lines[1]
    console = pytest.importorskip("rich.console", reason="rich is not installed").Console(width=100)
    with console.capture() as capture:
        console.print(stats.summary())
    assert f"{value(stats, 'max_vio', 1):.4g}" in capture.get()


def test_refused():
    with pytest.raises(ValueError, match="RoutingStats: no router to watch"):
        RoutingStats.attach(nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"RoutingStats: num_experts and num_layers must be at least 1, got \[0\]"):
        RoutingStats(0)
    stats = RoutingStats(E)
    ids = torch.zeros(4, K, dtype=torch.int32)
    with pytest.raises(ValueError, match="RoutingStats: mask must have one element per token, 4"):
        stats.observe(Observation(ids), mask=torch.ones(5))
    with pytest.raises(ValueError, match="RoutingStats: tokens_per_expert counts padding"):
        stats.observe(Observation(ids, tokens_per_expert=torch.zeros(E)), mask=torch.ones(4))


@pytest.mark.parametrize("return_routing", [False, True])
def test_nothing_is_dropped_without_a_capacity(return_routing):
    layer = make(num_zero_experts=3)
    stats = RoutingStats.attach(layer)
    layer(randn(T, H), return_routing=return_routing)
    assert value(stats, "drop_rate") == 0
