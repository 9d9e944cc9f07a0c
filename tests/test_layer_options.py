"""Options of few families: sparse mixing, sampled and prioritised second choices, sinks, states, latent width, ends."""

import math

import pytest
import torch
from helpers import randn

from torch_moe import ExpertsConfig, MoE, MoEConfig, RouterConfig, SharedExpertsConfig, TopKRouter, param_report, trace
from torch_moe.balancing import BiasBalancer
from torch_moe.metrics import RoutingStats
from torch_moe.nn import ExtendedRouterOutput
from torch_moe.nn.selection import ids_within_capacity, sampled_second_ids, zipf_ids
from torch_moe.nn.sparsemixer import sparsemixer
from torch_moe.testing import assert_close

H, E, T = 16, 8, 40
ROUTER = {"hidden_size": H, "num_experts": E, "top_k": 2}
EXPERTS = {"hidden_size": H, "intermediate_size": 12, "num_experts": E}
SINKS = ROUTER | {"score_function": "sigmoid", "num_shared_sinks": 3, "global_scale": True}


def layer_of(router=ROUTER, experts=EXPERTS, **options):
    torch.manual_seed(0)
    return MoE.from_config(MoEConfig(router=RouterConfig(**router), experts=ExpertsConfig(**experts), **options))


def shared_of(**options):
    return SharedExpertsConfig(hidden_size=H, intermediate_size=24, **options)


# Every option together: what one of them forgets, the others' tests would not see.
EVERYTHING = {
    "router": SINKS | {"projection": "mlp", "projection_size": 10, "projection_state": True, "expert_bias": True},
    "experts": EXPERTS | {"hidden_size": 12, "limit": 0.3, "limit_position": "after"},
    "shared_experts": shared_of(gate="router", limit=0.2, limit_position="after"),
    "latent_size": 12,
    "combine": "average",
    "output_bias": True,
    "output_norm": True,
}


def test_sparsemixer_draws_by_its_probabilities():
    """First by the softmax over the near ones, then by that over the rest; a third of a weight that is not the best."""
    torch.manual_seed(0)
    z = torch.tensor([1.0, 0.9, 0.6, 0.2, -3.0])
    logits = z.expand(20000, 5)
    weights, ids = sparsemixer(logits, 2, 0.25, training=True)
    near = [0, 1, 2]  # (1 - z) / 1 <= .5
    p = z[near].softmax(dim=0)
    share = torch.bincount(ids[:, 0], minlength=5) / len(ids)
    torch.testing.assert_close(share[:3], p, atol=4 * 0.5 / math.sqrt(len(ids)), rtol=0)
    assert share[3:].sum() == 0
    assert (ids[:, 0] != ids[:, 1]).all()
    first = ids[:, 0] == 1
    third, whole = p[1] * 0.3333, p[1]
    assert sorted(weights[first, 0].unique().tolist()) == pytest.approx([third.item(), whole.item()], rel=1e-3)
    kept = (weights[first, 0] > 0.9 * whole).float().mean().item()
    assert kept == pytest.approx(0.25, abs=4 * 0.5 / math.sqrt(first.sum()))
    torch.testing.assert_close(weights[ids[:, 0] == 0, 0].unique(), p[:1])


def test_sparsemixer_router_obeys_its_bias_and_replays():
    router = TopKRouter(
        H, E, 2, selection="sparsemixer", renormalize=False, expert_bias=True, sparsemixer_tolerance=0.2
    )
    x = randn(T, H, seed=1)
    evaluated = router.eval()(x)
    torch.testing.assert_close(evaluated.topk_ids[:, 0].long(), evaluated.router_logits.argmax(dim=1))
    router.expert_bias[3] = 50.0
    assert (router(x).topk_ids[:, 0] == 3).all()
    router.expert_bias.zero_()
    ids = evaluated.topk_ids.clone()
    ids[0, 1] = -1
    weights = router(x, route_override=ids).topk_weights
    assert torch.equal(weights[1:], evaluated.topk_weights[1:])
    assert weights[0, 1] == 0
    torch.manual_seed(1)
    drawn = router.train()(x)
    drawn.topk_weights.sum().backward()
    assert router.weight.grad.isfinite().all()
    assert router.weight.grad.any()


def test_a_second_expert_is_drawn_by_its_probability():
    torch.manual_seed(0)
    z = torch.tensor([0.3, 2.0, 1.0, -1.0])
    ids = sampled_second_ids(z.expand(20000, 4))
    assert (ids[:, 0] == 1).all()
    expected = z.softmax(dim=0)
    expected[1] = 0
    share = torch.bincount(ids[:, 1], minlength=4) / len(ids)
    torch.testing.assert_close(share, expected / expected.sum(), atol=4 * 0.5 / math.sqrt(len(ids)), rtol=0)
    router = TopKRouter(H, E, 2, selection="top2_gshard", second_expert_policy="sampling")
    x = randn(T, H, seed=1)
    assert not torch.equal(router(x).topk_ids, router(x).topk_ids)
    assert torch.equal(router.eval()(x).topk_ids, router(x).topk_ids)
    assert not torch.equal(router.train()(x).topk_ids, router.eval()(x).topk_ids)


def test_the_surest_tokens_keep_their_place():
    """Second choices go before first ones, then those of the tokens whose best score is lowest."""
    router = TopKRouter(4, 4, 2, selection="top2_gshard", capacity=2, drop_policy="probability").eval()
    with torch.no_grad():
        router.weight.copy_(torch.eye(4))
    x = torch.tensor([[1.0, 0.9, -9, -9], [3.0, -9, 0.1, -9], [2.0, -9, -9, 1.9], [-9, 2.0, 1.0, -9]])
    routed = router(x)
    plan = router.plan(routed, 4)
    kept = routed.topk_ids.where(plan.slot_to_row >= 0, -1)
    assert kept.tolist() == [[-1, 1], [0, 2], [0, 3], [1, 2]]
    first = torch.tensor([[0, 1], [1, 0]])
    weights = torch.tensor([[0.1, 0.1], [0.9, 0.9]])
    by_weight = ids_within_capacity(first, weights, 2, 1, by_weight=True, first_choices_first=True)
    assert by_weight.tolist() == [[0, -1], [1, -1]]


def test_weights_have_their_sum_after_drops():
    router = ROUTER | {"capacity": 6, "renormalize_before_drop": False, "routed_scaling_factor": 1.5}
    late, early = layer_of(router), layer_of(router | {"renormalize_before_drop": True})
    x = randn(T, H, seed=1)
    routed = late.router(x)
    plan = late.router.plan(routed, T)
    weights = late.router.weights_of_kept(routed, plan)
    kept = plan.slot_to_row >= 0
    assert 0 < kept.sum() < kept.numel()
    assert not weights[~kept].any()
    some = kept.any(dim=1)
    torch.testing.assert_close(weights.sum(dim=1)[some], torch.full_like(some, 1.5, dtype=torch.float32)[some])
    both = kept.all(dim=1)
    torch.testing.assert_close(late(x)[both], early(x)[both])
    one = kept.sum(dim=1) == 1
    assert one.any()
    assert not torch.allclose(late(x)[one], early(x)[one])


def test_biased_experts_are_chosen_by_zipf_s_law():
    ids = zipf_ids(4000, 1, E, 1.0, torch.device("cpu"))
    share = ids.flatten().bincount(minlength=E) / len(ids)
    expected = 1 / torch.arange(1, E + 1)
    torch.testing.assert_close(share, expected / expected.sum(), atol=0.02, rtol=0)
    router = TopKRouter(H, E, 3, force_biased=1.5)
    x = randn(T, H, seed=1)
    routed = router(x)
    assert torch.equal(routed.topk_ids, router(-x).topk_ids)
    assert all(len(set(row)) == 3 for row in routed.topk_ids.tolist())
    routed.topk_weights.sum().backward()


def test_sinks_share_the_sum():
    router = TopKRouter(**SINKS | {"routed_scaling_factor": 2.0, "renormalize_eps": 0.0}).double()
    with torch.no_grad():
        router.global_scale.fill_(3.0)
    x = randn(T, H, seed=1).double()
    routed = router(x)
    assert isinstance(routed, ExtendedRouterOutput)
    assert routed.router_logits.shape == (T, E)
    assert routed.shared_weights.shape == (T, 3)
    total = routed.topk_weights.sum(dim=1) + routed.shared_weights.sum(dim=1)
    torch.testing.assert_close(total, torch.full_like(total, 6.0))
    z = x @ router.weight.T
    assert torch.equal(routed.topk_ids.long(), z[:, :E].topk(2).indices)
    ratio = routed.shared_weights[:, 1] / routed.topk_weights[:, 0]
    torch.testing.assert_close(ratio, z[:, E + 1].sigmoid() / z[:, :E].amax(dim=1).sigmoid())
    clamped = TopKRouter(**SINKS | {"renormalize_eps": 100.0, "renormalize_eps_mode": "clamp"}).double()
    clamped.load_state_dict(router.state_dict())
    torch.testing.assert_close(clamped(x).topk_weights, 3 * z[:, :E].topk(2).values.sigmoid() / 100)
    with pytest.raises(ValueError, match='SharedExperts: gate="router" needs shared_weights'):
        layer_of(SINKS, shared_experts=shared_of(gate="router")).shared_experts(randn(3, H))


def test_a_state_goes_from_layer_to_layer():
    options = ROUTER | {"projection": "mlp", "projection_size": 10, "projection_state": True}
    router, x = TopKRouter(**options), randn(T, H, seed=1)
    first = router(x)
    second = router(x, router_state=first.router_state)
    torch.testing.assert_close(second.router_state, 2 * first.router_state)
    assert not torch.equal(second.router_logits, first.router_logits)
    second.router_logits.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in router.parameters())
    assert router(x.bfloat16()).router_logits.dtype == torch.float32
    before = {name: value.clone() for name, value in router.state_dict().items()}
    with torch.no_grad():
        router.mlp.state_scale.fill_(7.0)
    router.reset_parameters()
    assert torch.equal(router.mlp.state_scale, before["mlp.state_scale"])
    assert not torch.equal(router.mlp.fc1.weight, before["mlp.fc1.weight"])


def by_hand(layer, x, state):
    """Return the layer of EVERYTHING for tokens, expert by expert, in fp64."""
    routed = layer.router(x, router_state=state)
    latent = layer.latent_down(x)

    def ffn(rows, gate_up, down, limit, scale=None):
        gate, up = (rows @ gate_up.T).chunk(2, dim=-1)
        inner = (gate * gate.sigmoid()).clamp(max=limit) * up.clamp(-limit, limit)
        return (inner if scale is None else inner * scale) @ down.T

    experts, output = layer.experts, torch.zeros_like(latent)
    for choice in range(2):
        for expert in range(E):
            chosen = (routed.topk_ids[:, choice] == expert).unsqueeze(1)
            result = ffn(latent, experts.gate_up_proj[expert], experts.down_proj[expert], 0.3)
            output = output + chosen * routed.topk_weights[:, choice, None] * result
    shared = layer.shared_experts
    scale = routed.shared_weights.repeat_interleave(8, dim=1)
    output = layer.latent_up(output) + ffn(x, shared.gate_up_proj.weight, shared.down_proj.weight, 0.2, scale)
    output = output / 2 + layer.output_bias
    return output * (output.square().mean(dim=1, keepdim=True) + 1e-6).rsqrt() * layer.output_norm.weight


def everything():
    torch.manual_seed(0)
    parts = EVERYTHING | {
        "router": RouterConfig(**EVERYTHING["router"]),
        "experts": ExpertsConfig(**EVERYTHING["experts"]),
    }
    layer = MoE.from_config(MoEConfig(**parts))
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.dim() == 1:
                parameter.normal_(1.0, 0.2)
    return layer


def test_all_of_them_by_hand():
    layer = everything().double()
    x, state = randn(T, H, seed=1).double().requires_grad_(), randn(T, 10, seed=2).double()
    results = []
    for forward in (lambda: layer(x, router_state=state), lambda: by_hand(layer, x, state)):
        layer.zero_grad()
        output = forward()
        (output * randn(T, H, seed=3)).sum().backward()
        results.append(
            {n: p.grad.clone() for n, p in layer.named_parameters()} | {"output": output.detach(), "x": x.grad}
        )
        x.grad = None
    for name, expected in results[1].items():
        torch.testing.assert_close(results[0][name], expected, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


def test_they_compile_and_train_in_bf16():
    layer = everything()
    x = randn(T, H, seed=1)
    output, routing = layer(x, True)
    state = routing.router_state.detach()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(x, True, router_state=state)
    expected = layer(x, router_state=state)
    assert_close(compiled[0], expected.double(), 16, 12, 2)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = layer(x)
    torch.testing.assert_close(mixed.float(), output, atol=0.1, rtol=0.1)
    narrow = layer.to(torch.bfloat16)
    narrow(x.bfloat16()).float().sum().backward()
    assert all(p.grad is not None for n, p in narrow.named_parameters() if "state_scale" not in n)


def test_they_are_traced_watched_counted_and_reset():
    layer = everything().eval()
    x = randn(T, H, seed=1)
    result = trace(layer, x[0])
    torch.testing.assert_close(result.output, layer(x[:1])[0])
    scaled = (result.contributions.sum(dim=0) + result.shared) / 2 + layer.output_bias
    torch.testing.assert_close(layer.output_norm(scaled), result.output)
    stats, balancer = RoutingStats.attach(layer), BiasBalancer.attach(layer)
    layer.train()(x)
    assert stats.tokens_per_expert(0).sum() == 2 * T
    balancer.step()
    assert layer.router.expert_bias.any()
    count = sum(parameter.numel() for parameter in layer.parameters())
    report = param_report(layer.config)
    assert report.total == count
    linear = 16 * 10 + 10 * 10 * 2 + 10 * (E + 3) + 2 * 16 * 12 + 3 * 24 * 16 + 2 * 3 * 12 * 12
    assert report.flops_per_token == 2 * linear
    before = {name: value.clone() for name, value in layer.named_parameters()}
    layer.reset_parameters()
    assert all(not torch.equal(before[name], value) for name, value in layer.named_parameters())


def test_the_router_may_see_something_else():
    layer, x, y = layer_of(), randn(2, 5, H, seed=1), randn(2, 5, H, seed=2)
    output, routing = layer(x, True, router_input=y)
    assert torch.equal(routing.router_logits, layer(y, True)[1].router_logits)
    assert torch.equal(output, layer(x, route_override=routing.topk_ids, router_input=y))
    assert not torch.equal(output, layer(x))


def test_dropout_and_a_late_limit():
    experts = EXPERTS | {"limit": 0.2, "limit_position": "after", "dropout": 0.5}
    layer, x = layer_of(experts=experts), randn(T, H, seed=1)
    plain = layer_of(experts=experts | {"dropout": 0.0})
    assert torch.equal(layer.eval()(x), plain(x))
    assert not torch.equal(layer.train()(x), plain(x))
    torch.manual_seed(0)
    interleaved = layer_of(experts=experts | {"dropout": 0.0, "gate_layout": "interleaved"})
    with torch.no_grad():
        order = torch.arange(24).view(2, 12).T.flatten()
        interleaved.experts.gate_up_proj.copy_(plain.experts.gate_up_proj[:, order])
        interleaved.experts.down_proj.copy_(plain.experts.down_proj)
        interleaved.router.weight.copy_(plain.router.weight)
    torch.testing.assert_close(interleaved(x), plain(x))
