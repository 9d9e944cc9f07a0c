"""Routers beyond top-k: their selection, their weights, what they drop, and that their gradient reaches the router."""

import collections
import math

import pytest
import torch
from helpers import randn
from torch.nn import functional

from torch_moe import MoE, TopKRouter, ops
from torch_moe.nn import selection

T, H, I, E, K = 48, 16, 12, 8, 2  # noqa: E741


def router(device, top_k=K, **options):
    torch.manual_seed(0)
    return TopKRouter(H, E, top_k, device=device, **options)


def layer(device, top_k=K, **options):
    torch.manual_seed(0)
    return MoE(H, I, E, top_k, device=device, **options)


@pytest.mark.parametrize(
    ("top_k", "options"),
    [
        (1, {"renormalize": False}),
        (1, {"score_function": "sigmoid", "score_order": "topk_then_score", "renormalize": False,
             "weight_position": "input"}),
        (2, {"score_function": "sqrtsoftplus", "weight_position": "input"}),
        (2, {"selection": "sinkhorn"}),
        (2, {"selection": "top2_gshard", "second_expert_policy": "random", "capacity_factor": 1.0}),
        (2, {"selection": "expert_choice", "causal": False, "renormalize": False}),
        (2, {"selection": "hash", "vocab_size": 11}),
        (3, {"num_zero_experts": 4}),
        (2, {"noisy": True, "input_jitter": 0.1, "projection_bias": True, "logit_softcap": 5.0}),
        (2, {"input_norm": True, "per_expert_scale": True}),
        (2, {"drop_policy": "probability", "capacity_factor": 0.7}),
        (2, {"force_balanced": True}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else str(value),
)  # fmt: skip
def test_every_router_parameter_gets_a_gradient(top_k, options, device):
    """Also twice the same from one seed, which recomputation relies on."""
    moe = layer(device, top_k, **options)
    x = randn(2, T // 2, H, device=device)
    token_ids = torch.arange(T, device=device).view(2, -1) % 11 if "vocab_size" in options else None
    outputs = []
    for _ in range(2):
        torch.manual_seed(1)
        outputs.append(moe(x, token_ids=token_ids))
    assert torch.equal(*outputs)
    outputs[0].square().sum().backward()
    for name, parameter in moe.router.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_replay_gives_the_same_layer_output(device):
    """The ids of one call, given to the next: bit for bit the same, through noise that would choose otherwise."""
    moe, x = layer(device, expert_bias=True, score_function="sigmoid"), randn(2, T, H, device=device)
    output, routing = moe(x, return_routing=True)
    moe.router.expert_bias += 3 * randn(E, device=device)
    assert not torch.equal(moe(x), output)
    again, replayed = moe(x, return_routing=True, route_override=routing.topk_ids.view(2, T, K))
    assert torch.equal(again, output)
    assert torch.equal(replayed.topk_ids, routing.topk_ids)


def test_forced_weights_are_the_mixture(device):
    """With weights .7 and .3 forced upon experts 5 and 1 the output is .7 E_5(x) + .3 E_1(x)."""
    moe, x = layer(device).double(), randn(3, H, device=device, dtype=torch.float64)
    ids = torch.tensor([[5, 1]] * 3, dtype=torch.int32, device=device)
    weights = torch.tensor([[0.7, 0.3]] * 3, dtype=torch.float64, device=device)
    output = moe.experts(x, weights, ops.plan(ids, E))
    one = torch.ones(3, 1, dtype=torch.float64, device=device)
    a, b = (moe.experts(x, one, ops.plan(ids[:, j : j + 1], E)) for j in (0, 1))
    torch.testing.assert_close(output, 0.7 * a + 0.3 * b)


def test_force_balanced_is_even(device):
    moe = layer(device, force_balanced=True)
    _, routing = moe(randn(T, H, device=device), return_routing=True)
    assert routing.tokens_per_expert.tolist() == [T * K // E] * E
    assert all(len(set(row)) == K for row in routing.topk_ids.tolist())


def test_sinkhorn_balances_in_training_only(device):
    r = router(device, selection="sinkhorn", sinkhorn_iterations=20)
    x = randn(512, H, device=device) + 2 * randn(1, H, device=device, seed=1)  # one direction that all tokens share
    trained, evaluated = r(x), r.eval()(x)
    counts = [out.topk_ids.flatten().bincount(minlength=E) for out in (trained, evaluated)]
    mean = 512 * K / E
    assert counts[0].max() < 1.5 * mean < 2 * mean < counts[1].max()
    assert torch.equal(evaluated.topk_ids, ops.route(evaluated.router_logits, K)[1])
    # The weights are of the true scores, not of the balanced ones.
    chosen = trained.router_logits.gather(1, trained.topk_ids.long()).softmax(dim=-1)
    torch.testing.assert_close(trained.topk_weights, chosen)


def test_sinkhorn_normalises_rows_and_columns(device):
    logits = 50 * randn(24, E, device=device)
    ids = selection.sinkhorn_ids(logits.double() / 50, 1, 200)
    mass = (logits.double() / 50).exp()
    for _ in range(200):
        mass = mass / mass.sum(0, keepdim=True)
        mass = mass / mass.sum(1, keepdim=True)
    assert torch.equal(ids[:, 0].long(), mass.argmax(dim=1))
    assert selection.sinkhorn_ids(logits, 2, 8).max() < E  # logits whose exponentials overflow


@pytest.mark.parametrize("factor", [None, 0.5, 2.0])
def test_expert_choice_fills_every_expert_equally(factor, device):
    moe = layer(
        device, selection="expert_choice", causal=False, renormalize=False,
        **({} if factor is None else {"capacity_factor": factor}),
    )  # fmt: skip
    x = randn(T, H, device=device)
    output, routing = moe(x, return_routing=True)
    taken = math.ceil((factor or 1) * T * K / E)
    assert routing.tokens_per_expert.tolist() == [taken] * E
    scores = routing.router_logits.softmax(dim=-1)
    best = {(int(t), e) for e in range(E) for t in scores[:, e].topk(taken).indices}
    ids = routing.topk_ids.tolist()
    assert best == {(t, e) for t in range(T) for e in ids[t] if e >= 0}
    for t, row in enumerate(ids):
        for j, e in enumerate(row):
            assert abs(routing.topk_weights[t, j] - (scores[t, e] if e >= 0 else 0)) < 1e-6
    nobody = torch.tensor([all(e < 0 for e in row) for row in ids], device=device)
    assert (output[nobody] == 0).all()


def test_expert_choice_sees_the_future(device):
    """Why causal models refuse it: a later token changes what an earlier one gets."""
    moe = layer(device, selection="expert_choice", causal=False, renormalize=False)
    x = randn(T, H, device=device)
    changed = x.clone()
    changed[T // 2 :] = 9 * randn(T // 2, H, device=device, seed=3)
    assert not torch.equal(moe(changed)[: T // 2], moe(x)[: T // 2])
    plain = layer(device)
    torch.testing.assert_close(plain(changed)[: T // 2], plain(x)[: T // 2])


def test_hash_table_is_balanced_and_fixed(device):
    table = selection.hash_table(64, E, K, seed=5)
    assert table.flatten().bincount(minlength=E).tolist() == [16] * E
    assert all(len(set(row)) == K for row in table.tolist())
    counts = 1000.0 / torch.arange(1, 301)  # Zipf's law
    load = collections.Counter()
    for row, count in zip(selection.hash_table(300, E, K, token_counts=counts).tolist(), counts.tolist(), strict=True):
        assert len(set(row)) == K
        for expert in row:
            load[expert] += count
    assert max(load.values()) <= 1.02 * max(1000.0, 2 * counts.sum().item() / E)


def test_hash_follows_the_token(device):
    r = router(device, selection="hash", vocab_size=20)
    assert r.state_dict()["hash_table"].shape == (20, K)
    token_ids = torch.arange(T, device=device) % 20
    first, second = (r(randn(T, H, device=device, seed=seed), token_ids=token_ids) for seed in (0, 1))
    assert torch.equal(first.topk_ids, r.hash_table[token_ids])
    assert torch.equal(first.topk_ids, second.topk_ids)
    assert not torch.equal(first.topk_weights, second.topk_weights)
    with pytest.raises(ValueError, match="needs token_ids, got None"):
        r(randn(T, H, device=device))


@pytest.mark.parametrize("kind", ["identity", "zero"])
def test_zero_experts_cost_no_row(kind, device):
    moe = layer(device, num_zero_experts=3, zero_expert=kind)
    x = randn(T, H, device=device)
    output, routing = moe(x, return_routing=True)
    assert routing.router_logits.shape == (T, E + 3)
    free = routing.topk_ids >= E
    assert free.any()
    assert int(routing.tokens_per_expert.sum()) == T * K - int(free.sum())
    weight = routing.topk_weights.where(free, 0).sum(dim=1, keepdim=True)
    real = moe.experts(x, routing.topk_weights, ops.plan(routing.topk_ids, E))
    torch.testing.assert_close(output, real + (weight * x if kind == "identity" else 0))


@pytest.mark.parametrize("top_k", [1, 3])
def test_weight_on_the_input(top_k, device):
    options = {"renormalize": False, "score_function": "sigmoid", "activation": "relu2"}
    moe, plain = layer(device, top_k, weight_position="input", **options).double(), layer(device, top_k, **options)
    x = randn(T, H, device=device, dtype=torch.float64)
    output, routing = moe(x, return_routing=True)
    # relu2 is homogeneous of degree two: E(w x) = w^2 E(x).
    squared = plain.double().experts(x, routing.topk_weights.square(), ops.plan(routing.topk_ids, E))
    torch.testing.assert_close(output, squared)
    assert "weight_position=input" in repr(moe)


def test_gemma_norm_and_scale(device):
    r = router(device, input_norm=True, per_expert_scale=True)
    with torch.no_grad():
        r.input_scale.copy_(randn(H, device=device, seed=1))
        r.per_expert_scale.copy_(randn(E, device=device, seed=2))
    x = 7 * randn(T, H, device=device)
    out = r(x)
    normed = x / x.square().mean(dim=-1, keepdim=True).add(1e-6).sqrt() * r.input_scale * H**-0.5
    torch.testing.assert_close(out.router_logits, normed @ r.weight.T)
    weights, ids = ops.route(out.router_logits, K)
    torch.testing.assert_close(out.topk_weights, weights * r.per_expert_scale[ids.long()])


def test_softcap_bias_and_dtype(device):
    r = router(device, projection_bias=True, logit_softcap=2.0)
    with torch.no_grad():
        r.bias.copy_(randn(E, device=device, seed=1))
    x = 20 * randn(T, H, device=device)
    torch.testing.assert_close(r(x).router_logits, 2 * torch.tanh((x @ r.weight.T + r.bias) / 2))
    narrow = router(device, projection_dtype="input").to(torch.bfloat16)
    y = x.bfloat16()
    assert torch.equal(narrow(y).router_logits, functional.linear(y, narrow.weight).float())
    exact = router(device).to(torch.bfloat16)
    assert not torch.equal(exact(y).router_logits, narrow(y).router_logits)


def test_jitter_multiplies_the_input_in_training(device):
    """A peer adds it to the logits, where a factor near 1 is a bias of 1."""
    r = router(device, input_jitter=0.25)
    x = torch.zeros(T, H, device=device)
    assert torch.equal(r(x).router_logits, torch.zeros(T, E, device=device))
    x = randn(T, H, device=device)
    clean = r.eval()(x).router_logits
    torch.testing.assert_close(clean, x @ r.weight.T)
    noisy = r.train()(x).router_logits
    bound = 0.25 * x.abs() @ r.weight.abs().T + 1e-5
    assert ((noisy - clean).abs() <= bound).all()
    assert (noisy - clean).abs().max() > 0.05 * bound.max()


def test_noise_is_learned_and_off_in_evaluation(device):
    r = router(device, noisy=True)
    x = randn(4000, H, device=device)
    clean = r.eval()(x).router_logits
    with torch.no_grad():
        r.noise_weight.copy_(randn(E, H, device=device, seed=1) / 4)
    assert torch.equal(r(x).router_logits, clean)
    z = (r.train()(x).router_logits - clean) / functional.softplus(x @ r.noise_weight.T)
    assert abs(z.mean()) < 0.03
    assert abs(z.std() - 1) < 0.03


CHOICES = torch.tensor([[0, 1], [0, 1], [2, 0], [0, 2], [3, 0], [0, 3]], dtype=torch.int32)
WEIGHTS = torch.tensor([[0.6, 0.4], [0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.75, 0.25], [0.55, 0.45]])


def dropped(**options):
    ids = selection.ids_within_capacity(CHOICES, WEIGHTS, 4, 2, **options)
    assert ((ids == CHOICES) | (ids == -1)).all()
    return {(t, j) for t in range(6) for j in range(2) if ids[t, j] == -1}


def test_capacity_by_position_weight_choice_and_sequence():
    """Expert 0 is wanted by (token, choice) 00 10 21 30 41 50, the others by at most two."""
    assert dropped() == {(2, 1), (3, 0), (4, 1), (5, 0)}
    assert dropped(by_weight=True) == {(0, 0), (2, 1), (4, 1), (5, 0)}
    assert dropped(first_choices_first=True) == {(2, 1), (3, 0), (4, 1), (5, 0)}
    assert dropped(tokens_per_sequence=3) == {(2, 1), (5, 0)}


def test_first_choices_come_before_second_ones():
    ids = torch.tensor([[1, 0], [1, 0], [0, 1]], dtype=torch.int32)
    weights = torch.full((3, 2), 0.5)
    early = selection.ids_within_capacity(ids, weights, 2, 1)
    assert early.tolist() == [[1, 0], [-1, -1], [-1, -1]]
    first = selection.ids_within_capacity(ids, weights, 2, 1, first_choices_first=True)
    assert first.tolist() == [[1, -1], [-1, -1], [0, -1]]


@pytest.mark.parametrize("policy", ["position", "probability"])
@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_capacity_of_the_layer(policy, scope, device):
    """Switch: top-1 with capacity. Load is bounded, the loads that fit are kept, and who is dropped follows policy."""
    moe = layer(device, 1, renormalize=False, capacity_factor=0.5, capacity_scope=scope, drop_policy=policy)
    x = randn(3, T, H, device=device) + randn(1, H, device=device, seed=1)
    output, routing = moe(x, return_routing=True)
    parts = 3 if scope == "sequence" else 1
    capacity = math.ceil(0.5 * 3 * T / parts / E)
    ids, weights = routing.topk_ids.view(parts, -1), routing.topk_weights.view(parts, -1)
    kept = (output.view(parts, -1, H) != 0).any(dim=-1)
    wanted = torch.stack([part.bincount(minlength=E) for part in ids])
    assert (wanted > capacity).any()
    assert torch.equal(routing.tokens_per_expert, wanted.clamp(max=capacity).sum(dim=0).int())
    for part in range(parts):
        for e in range(E):
            slots = (ids[part] == e).nonzero().flatten()
            if policy == "probability":
                slots = slots[weights[part, slots].argsort(descending=True, stable=True)]
            assert set(slots[:capacity].tolist()) == set(slots[kept[part, slots]].tolist())


def test_capacity_larger_than_the_batch_and_of_evaluation(device):
    moe = layer(device, capacity_factor=100.0, eval_capacity_factor=0.25, drop_policy="probability")
    x = randn(T, H, device=device)
    assert torch.equal(moe(x), layer(device)(x))
    assert moe.capacity(T) == math.ceil(100 * T * K / E)
    assert moe.eval().capacity(T) == math.ceil(0.25 * T * K / E)
    assert layer(device, capacity=5).capacity(T) == 5
    assert layer(device, capacity=5)(x, return_routing=True)[1].tokens_per_expert.max() == 5


def test_gshard_keeps_the_second_expert_at_random(device):
    n = 20000
    weights = torch.tensor([[0.8, 0.2]], device=device).expand(n, 2)
    ids = torch.tensor([[3, 1]], dtype=torch.int32, device=device).expand(n, 2)
    torch.manual_seed(0)
    kept = selection.random_second_ids(ids, weights)
    assert (kept[:, 0] == 3).all()
    share = (kept[:, 1] == 1).float().mean().item()
    assert abs(share - 0.4) < 3 * math.sqrt(0.4 * 0.6 / n)
    moe = layer(device, selection="top2_gshard", second_expert_policy="random")
    x = randn(T, H, device=device)
    _, routing = moe(x, return_routing=True)
    assert T <= int(routing.tokens_per_expert.sum()) < 2 * T
    assert (routing.topk_ids >= 0).all()  # what was chosen, not what was kept
    assert int(moe.eval()(x, return_routing=True)[1].tokens_per_expert.sum()) == 2 * T


def test_gshard_serves_first_choices_first(device):
    """Where an expert turns a first choice away, it has taken no second choice."""
    r = router(device, selection="top2_gshard", capacity_factor=0.5)
    routed = r(randn(T, H, device=device) + randn(1, H, device=device, seed=1))
    kept = r.plan(routed, T).slot_to_row >= 0
    turned_away = set(routed.topk_ids[:, 0][~kept[:, 0]].tolist())
    assert turned_away
    assert not turned_away & set(routed.topk_ids[:, 1][kept[:, 1]].tolist())
    assert kept[:, 1].any()


def test_idle_expert_of_nan_is_harmless(device):
    """Computed rows are T * K: an expert that no token chose may hold anything, and its gradient is exactly zero."""
    moe = layer(device)
    with torch.no_grad():
        moe.experts.gate_up_proj[3] = torch.nan
        moe.experts.down_proj[3] = torch.nan
    ids = torch.tensor([[0, 1], [2, 4]] * (T // 2), dtype=torch.int32, device=device)
    output, routing = moe(randn(T, H, device=device), return_routing=True, route_override=ids)
    assert int(routing.tokens_per_expert.sum()) == T * K
    output.sum().backward()
    assert output.isfinite().all()
    assert moe.router.weight.grad.isfinite().all()
    for parameter in moe.experts.parameters():
        assert (parameter.grad[[3, 5, 6, 7]] == 0).all()
        assert parameter.grad[[0, 1, 2, 4]].isfinite().all()


def test_bias_is_touched_by_no_optimiser_and_no_forward(device):
    moe = layer(device, expert_bias=True, score_function="sigmoid")
    moe.router.expert_bias.copy_(randn(E, device=device))
    before = moe.router.expert_bias.clone()
    optimizer = torch.optim.AdamW(moe.parameters(), weight_decay=0.5)
    moe(randn(T, H, device=device)).sum().backward()
    optimizer.step()
    moe.eval()(randn(T, H, device=device))
    assert torch.equal(moe.router.expert_bias, before)


def test_recomputation_replays_the_noise(device):
    """Activation checkpointing runs the forward twice: jitter, noise and random drops must be the same both times."""
    moe = layer(
        device,
        selection="top2_gshard",
        second_expert_policy="random",
        noisy=True,
        input_jitter=0.2,
        capacity_factor=1.0,
    )
    x = randn(T, H, device=device)
    grads = []
    for checkpointed in (False, True):
        moe.zero_grad()
        torch.manual_seed(3)
        out = torch.utils.checkpoint.checkpoint(moe, x, use_reentrant=False) if checkpointed else moe(x)
        out.square().sum().backward()
        grads.append([parameter.grad.clone() for parameter in moe.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))


def test_bf16_input_is_routed_as_its_fp32_value(device):
    """The projection is fp32 under an fp32 softmax: a bf16 product would move the choice of close experts."""
    r = router(device)
    x = randn(2000, H, dtype=torch.bfloat16, device=device)
    assert torch.equal(r(x).topk_ids, r(x.float()).topk_ids)
    narrow = functional.linear(x, r.weight.bfloat16()).float()
    assert not torch.equal(ops.route(narrow, K)[1], r(x).topk_ids)


def test_scores_of_the_record(device):
    for function in ("softmax", "sigmoid", "sqrtsoftplus"):
        r = router(device, score_function=function, renormalize=False)
        out = r(randn(T, H, device=device))
        torch.testing.assert_close(r.scores(out.router_logits).gather(1, out.topk_ids.long()), out.topk_weights)
