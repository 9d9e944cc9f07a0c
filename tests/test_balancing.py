"""BiasBalancer: the rules by hand, what is counted and when, and load that gets even while training."""

import copy

import pytest
import torch
from helpers import randn
from torch import nn
from torch.utils.checkpoint import checkpoint

from torch_moe import BiasBalancer, MoE, Observation, RoutingStats, TopKRouter
from torch_moe.balancing import METHODS
from torch_moe.metrics import max_vio
from torch_moe.testing import assert_close

T, H, I, E, K = 24, 16, 8, 6, 2  # noqa: E741


def make(**options):
    torch.manual_seed(0)
    return MoE(H, I, E, K, score_function="sigmoid", expert_bias=True, **options)


def counts_of(balancer):
    return balancer.state_dict()["tokens_per_expert"]


def stepped(counts, bias, **options):
    balancer = BiasBalancer(len(counts), **options)
    balancer.add(torch.tensor(counts))
    bias = torch.tensor(bias)
    balancer.step([bias])
    return bias


def test_sign_by_hand():
    bias = stepped([9, 4, 3, 0], [0.0, 0.0, 1.0, 0.0], rate=0.1, center=False)
    torch.testing.assert_close(bias, torch.tensor([-0.1, 0.0, 1.1, 0.1]))


def test_proportional_by_hand():
    bias = stepped([9, 4, 3, 0], [0.0] * 4, rate=0.1, method="proportional", center=False)
    torch.testing.assert_close(bias, torch.tensor([-0.125, 0.0, 0.025, 0.1]))


def test_pid_by_hand():
    """e = (-1, 1), then (-.5, .5): the second step adds e + 2 (e - e') + 3 (e - 2 e' + e'')."""
    balancer, bias = BiasBalancer(2, method="pid", rate=1.0, pid_gains=(2.0, 3.0), center=False), torch.zeros(2)
    balancer.add(torch.tensor([8, 0]))
    balancer.step([bias])
    torch.testing.assert_close(bias, torch.tensor([-6.0, 6.0]))
    balancer.add(torch.tensor([6, 2]))
    balancer.step([bias])
    second = 0.5 + 2 * (0.5 - 1) + 3 * (0.5 - 2)
    torch.testing.assert_close(bias, torch.tensor([-6.0 - second, 6.0 + second]))


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_quantile_balances_what_it_saw(top_k):
    """Repeated on one batch, the choice becomes even, whether or not T*K/E is whole."""
    for num_tokens in (60, 67):
        logits = randn(num_tokens, E) + torch.linspace(0, 3, E)
        balancer, bias = BiasBalancer(E, method="quantile"), torch.zeros(E)
        assert max_vio(logits.topk(top_k, dim=-1).indices.flatten().bincount(minlength=E)) > 0.15
        for _ in range(40):
            ids = (logits + bias).topk(top_k, dim=-1).indices
            options = {"score_order": "topk_then_score"}
            balancer.observe(Observation(ids, router_logits=logits, expert_bias=bias, route_options=options))
            balancer.step([bias])
        load = (logits + bias).topk(top_k, dim=-1).indices.flatten().bincount(minlength=E)
        fair = num_tokens * top_k / E
        assert (load - fair).abs().max() <= 1.5


def test_quantile_rate_is_an_average():
    """One step of rate .25 goes a quarter of the way of a whole one; masked tokens have no say."""
    logits, ids, bias = randn(T, E), randn(T, E).topk(K, dim=-1).indices, torch.linspace(-1, 1, E)
    mask = torch.arange(T) < 15
    spoilt = logits.masked_fill(~mask.unsqueeze(-1), 7.0)
    results = []
    for rate, observed in ((1.0, logits[mask]), (0.25, spoilt)):
        balancer, own = BiasBalancer(E, method="quantile", rate=rate, center=False), bias.clone()
        observation = Observation(ids[: len(observed)], router_logits=observed, expert_bias=bias)
        balancer.observe(observation, mask=None if len(observed) == 15 else mask)
        balancer.step([own])
        results.append(own)
    torch.testing.assert_close(results[1], 0.75 * bias + 0.25 * results[0])


@pytest.mark.parametrize("method", METHODS)
def test_centred_and_at_rest(method):
    layer = make()
    layer.router.expert_bias.copy_(torch.linspace(0, 3, E))
    balancer = BiasBalancer.attach(layer, method=method)
    before = layer.router.expert_bias.clone()
    balancer.step()  # nothing was chosen: nothing moves, not even to the centre
    assert torch.equal(layer.router.expert_bias, before)
    layer(randn(T, H))
    balancer.step()
    assert layer.router.expert_bias.mean().abs() < 1e-6
    assert not torch.equal(layer.router.expert_bias, before - before.mean())


def test_counts_add_up_over_micro_batches_and_steps_forget():
    layer = make()
    balancer = BiasBalancer.attach(layer)
    expected = torch.zeros(E, dtype=torch.int64)
    for seed in range(3):
        routing = layer(randn(2, T, H, seed=seed), return_routing=True)[1]
        expected += routing.tokens_per_expert
    assert torch.equal(counts_of(balancer)[0], expected)
    balancer.step()
    assert (counts_of(balancer) == 0).all()


def test_demand_is_counted_before_capacity():
    layer = make(capacity_factor=0.5)
    balancer = BiasBalancer.attach(layer)
    layer(randn(T, H))
    assert counts_of(balancer).sum() == T * K


def test_padding_is_not_counted():
    layer, x = make(), randn(2, T, H)
    mask = torch.arange(2 * T).view(2, T) % 3 != 0
    balancer = BiasBalancer.attach(layer)
    balancer.mask = mask
    ids = layer(x, return_routing=True)[1].topk_ids
    assert torch.equal(counts_of(balancer)[0], ids[mask.flatten()].flatten().bincount(minlength=E))
    balancer.mask = torch.ones(3)
    with pytest.raises(ValueError, match=r"BiasBalancer: mask must have one element per token, 48, got shape \[3\]"):
        layer(x)


def test_frozen_in_eval():
    layer = make()
    balancer = BiasBalancer.attach(layer, method="pid")
    layer(randn(T, H))
    balancer.step()
    layer.eval()
    before = layer.router.expert_bias.clone(), balancer.state_dict()["errors"]
    layer(randn(T, H))
    balancer.step()
    assert torch.equal(layer.router.expert_bias, before[0])
    assert torch.equal(balancer.state_dict()["errors"], before[1])
    layer.train()
    layer(randn(T, H))
    assert counts_of(balancer).sum() == T * K


def test_only_the_balancer_moves_the_bias():
    """No optimiser has it, no gradient reaches it, and a forward leaves it."""
    layer = make()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.5)
    layer.router.expert_bias.fill_(1.0)
    layer(randn(T, H)).square().sum().backward()
    optimizer.step()
    assert (layer.router.expert_bias == 1).all()
    assert not layer.router.expert_bias.requires_grad


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputation_counts_nothing_twice(use_reentrant):
    layer = make()
    balancer, stats, calls = BiasBalancer.attach(layer), RoutingStats.attach(layer), []
    layer.router.register_forward_hook(lambda *_: calls.append("forward"))
    x = randn(T, H).requires_grad_()
    checkpoint(layer, x, use_reentrant=use_reentrant).sum().backward()
    assert len(calls) == 2  # the recomputation did run
    assert counts_of(balancer).sum() == T * K
    assert stats.tokens_per_expert(0).sum() == T * K


@pytest.mark.parametrize("recompute", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("method", ["sign", "quantile"])
def test_compiled_layer_counts_the_same(method, recompute):
    torch.compiler.reset()
    layer = make()
    balancer = BiasBalancer.attach(layer, method=method)
    results = []

    def whole(x):
        return checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)

    for function in (whole, torch.compile(whole, fullgraph=True, backend="aot_eager")):
        layer.router.expert_bias.zero_()
        for seed in range(3):
            function(randn(T, H, seed=seed)).square().sum().backward()
            balancer.mask = None
        state = balancer.state_dict()
        balancer.step()
        results.append((layer.router.expert_bias.clone(), *state.values()))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled)


@pytest.mark.parametrize("method", METHODS)
def test_state_dict_continues_a_run(method):
    """Saved between two micro-batches and loaded into a fresh pair: the same biases ever after."""

    def advance(layer, balancer, seeds):
        for seed in seeds:
            layer(randn(T, H, seed=seed))
            layer(randn(T, H, seed=seed + 50))
            balancer.step()

    layers = [make(), make()]
    first, second = (BiasBalancer.attach(layer, method=method, rate=0.1) for layer in layers)
    advance(layers[0], first, range(3))
    layers[0](randn(T, H, seed=7))
    layers[1].load_state_dict(layers[0].state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert "router.expert_bias" in layers[0].state_dict()
    for layer, balancer in zip(layers, (first, second), strict=True):
        advance(layer, balancer, range(3, 6))
    assert torch.equal(layers[0].router.expert_bias, layers[1].router.expert_bias)
    with pytest.raises(ValueError, match="BiasBalancer: state_dict must have the shapes"):
        BiasBalancer(E + 1).load_state_dict(first.state_dict())


def test_attaches_to_every_layer_and_survives_casts():
    model = nn.Sequential(make(), nn.Linear(H, H), make(), MoE(H, I, E, K)).to(torch.bfloat16)
    balancer = BiasBalancer.attach(model, rate=0.01)
    assert balancer.num_layers == 2
    model[0].router.weight.data.zero_()  # ties: all on experts 0 and 1
    model(randn(T, H, dtype=torch.bfloat16))
    model.double()
    model(randn(T, H, dtype=torch.float64))
    balancer.step()
    expected = torch.tensor([-0.01, -0.01, 0.01, 0.01, 0.01, 0.01])
    torch.testing.assert_close(model[0].router.expert_bias, expected - expected.mean())
    assert (model[2].router.expert_bias != 0).any()
    balancer.detach()
    model(randn(T, H, dtype=torch.float64))
    assert (counts_of(balancer) == 0).all()


def test_attaches_to_any_router_by_a_reader():
    """Another library's router: its own names, 64-bit ids, extra outputs."""

    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("e_score_correction_bias", torch.zeros(E))

        def forward(self, x):
            return {"chosen": (x[:, :E].sigmoid() + self.e_score_correction_bias).topk(K, dim=-1).indices}

    gates = [Gate(), Gate()]
    balancer = BiasBalancer.attach(
        gates, bias_name="e_score_correction_bias", read=lambda gate, inputs, output: Observation(output["chosen"])
    )
    ids = gates[1](randn(T, H))["chosen"]
    balancer.step()
    assert (gates[0].e_score_correction_bias == 0).all()
    load = ids.flatten().bincount(minlength=E)
    expected = 1e-3 * (load.double().mean() - load).sign()
    assert_close(gates[1].e_score_correction_bias, expected - expected.mean(), E, 1)


def test_refused():
    def bf16_bias():
        router = TopKRouter(H, E, K, expert_bias=True)
        router.expert_bias = router.expert_bias.bfloat16()
        return router

    def column_bias():
        router = TopKRouter(H, E, K, expert_bias=True)
        router.expert_bias = router.expert_bias[None]
        return router

    calls = {
        "method must be in .*, got 'adam'": lambda: BiasBalancer(E, method="adam"),
        "num_experts must be at least 1, got 0": lambda: BiasBalancer(0),
        "num_layers must be at least 1, got 0": lambda: BiasBalancer(E, 0),
        "router 0, a TopKRouter, must have a tensor expert_bias, got None": lambda: BiasBalancer.attach(
            [TopKRouter(H, E, K)]
        ),
        "rate must not be negative, got -1": lambda: BiasBalancer(E, rate=-1),
        r"no router with expert_bias .*expert_bias=True": lambda: BiasBalancer.attach(MoE(H, I, E, K)),
        r"expert_bias of router 0 must be float32, got torch.bfloat16 \(call .float\(\)": lambda: BiasBalancer.attach(
            [bf16_bias()]
        ),
        r"all layers must have as many experts, got \[6, 8\]": lambda: BiasBalancer.attach(
            [TopKRouter(H, n, K, expert_bias=True) for n in (E, 8)]
        ),
        "method 'quantile' needs routers without groups": lambda: BiasBalancer.attach(
            make(num_groups=3, topk_groups=2), method="quantile"
        ),
        "method 'quantile' needs scores, not counts": lambda: BiasBalancer(E, method="quantile").add(torch.ones(E)),
        "method 'quantile' needs router_logits": lambda: BiasBalancer(E, method="quantile").observe(
            Observation(torch.zeros(T, K))
        ),
        r"tokens_per_expert must have shape \[6\], got \[5\]": lambda: BiasBalancer(E).add(torch.ones(5)),
        "step needs biases, because no routers are attached": lambda: BiasBalancer(E).step(),
        "step needs 2 biases, got 1": lambda: BiasBalancer(E, 2).step([torch.zeros(E)]),
        r"biases must have shape \[6\], got \[\[6\], \[1\]\]": lambda: BiasBalancer(E, 2).step(
            [torch.zeros(E), torch.zeros(1)]
        ),
        r"pid_gains must be two numbers, p and d, got \(1.0,\)": lambda: BiasBalancer(
            E, method="pid", pid_gains=(1.0,)
        ),
        r"expert_bias of router 0 must have shape \(num_experts,\), got \[1, 6\]": lambda: BiasBalancer.attach(
            [column_bias()]
        ),
    }
    for message, call in calls.items():
        with pytest.raises(ValueError, match=f"BiasBalancer: {message}"):
            call()
