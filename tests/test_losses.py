"""Losses: exactly 1 at balance, the golden values, masks, levels, and nothing kept or counted twice."""

import gc
import math
import weakref

import pytest
import torch
from helpers import randn
from torch.utils.checkpoint import checkpoint

from torch_moe import MoE, losses, ops
from torch_moe.losses import (
    GlobalLoad,
    hf_load_balancing_loss,
    importance_loss,
    load_balancing_loss,
    load_loss,
    z_loss,
)
from torch_moe.testing import assert_close

SCORES = ("softmax", "sigmoid", "sqrtsoftplus")
T, H, I, E, K = 24, 16, 8, 6, 2  # noqa: E741


def round_robin(num_tokens, num_experts, top_k):
    """Ids that load every expert alike: num_tokens * top_k is a multiple of num_experts."""
    return (torch.arange(num_tokens * top_k) % num_experts).view(num_tokens, top_k)


def near(actual, expected, *lengths):
    assert_close(actual, torch.as_tensor(expected, dtype=torch.float64), *lengths)


@pytest.mark.parametrize("score_function", SCORES)
@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (4, 1), (8, 2), (8, 8), (6, 3), (2048, 16)])
def test_reads_one_at_balance(num_experts, top_k, score_function):
    """For every k, E and score function, and whichever of load and probability is the even one."""
    num_tokens = num_experts
    even_ids, even_logits = round_robin(num_tokens, num_experts, top_k), torch.zeros(num_tokens, num_experts)
    some_ids, some_logits = torch.arange(top_k).expand(num_tokens, top_k), randn(num_tokens, num_experts)
    for logits, ids in ((even_logits, even_ids), (even_logits, some_ids), (some_logits, even_ids)):
        loss = load_balancing_loss(logits, ids, score_function=score_function)
        near(loss, 1.0, num_experts, num_tokens, num_experts)
    assert loss.dtype == torch.float32
    weights = torch.full((num_tokens, top_k), 1 / top_k)
    near(importance_loss(weights, even_ids, num_experts), 1.0, top_k, num_tokens, num_experts)


def test_golden_values():
    skewed = torch.tensor([0.51, 0.49]).log().expand(60, 2)
    certain = torch.tensor([-torch.inf, 0.0]).expand(40, 2)
    ids = torch.tensor([[0]] * 60 + [[1]] * 40)
    near(load_balancing_loss(torch.cat([skewed, certain]), ids), 0.9224, 2, 100, 2)  # below 1, and not balanced
    collapsed = torch.tensor([0.13] + [0.87 / 7] * 7).log().expand(32, 8)
    near(load_balancing_loss(collapsed, torch.zeros(32, 1, dtype=torch.int32)), 1.04, 8, 32, 8)  # MaxVio is 7
    near(z_loss(torch.zeros(5, 8)), math.log(8) ** 2, 8, 5)
    example = torch.tensor([[2.1, 0.3, -1.5, 0.8, -0.2, 2.9, 0.1, -0.7]])
    torch.testing.assert_close(z_loss(example), torch.tensor(12.131735), rtol=0, atol=1e-6)


def test_importance_is_the_squared_variation():
    """f = (.5, .25, .125, .125) has CV^2 = .375; one expert with all reads E."""
    ids = torch.tensor([[0], [0], [0], [0], [1], [1], [2], [3]])
    near(importance_loss(torch.ones(8, 1), ids, 4), 1.375, 8, 4)
    near(importance_loss(torch.ones(8, 1), torch.zeros_like(ids), 64), 64.0, 8, 64)
    weights = randn(T, K).exp().requires_grad_()
    importance_loss(weights, round_robin(T, E, K), E).backward()
    assert weights.grad.abs().max() > 0


def noisy_logits(num_tokens=T, dtype=torch.float32):
    """Noisy logits, clean logits and the size of the noise, as leaves."""
    clean, noise = randn(num_tokens, E, dtype=dtype, seed=1), randn(num_tokens, E, dtype=dtype, seed=2)
    std = torch.nn.functional.softplus(randn(num_tokens, E, dtype=dtype, seed=3))
    return tuple(t.detach().requires_grad_() for t in (clean + std * noise, clean, std))


def smooth_loads(noisy, clean, std, top_k):
    """Each expert's load by the words of the paper: the k-th largest of the others, token by token."""
    loads = [0.0] * noisy.shape[1]
    for h, z, s in zip(noisy.tolist(), clean.tolist(), std.tolist(), strict=True):
        for i in range(len(h)):
            threshold = sorted(h[:i] + h[i + 1 :], reverse=True)[top_k - 1]
            loads[i] += 0.5 * (1 + math.erf((z[i] - threshold) / (s[i] * math.sqrt(2))))
    return loads


@pytest.mark.parametrize("top_k", [1, 2, E - 1])
def test_load_loss_is_the_squared_variation_of_the_smooth_load(top_k):
    noisy, clean, std = noisy_logits(dtype=torch.float64)
    loads = smooth_loads(noisy, clean, std, top_k)
    expected = E * sum(load**2 for load in loads) / sum(loads) ** 2
    near(load_loss(noisy, clean, std, top_k), expected, E, T, E)
    assert torch.autograd.gradcheck(lambda *tensors: load_loss(*tensors, top_k), (noisy, clean, std))


def test_the_smooth_load_is_how_often_fresh_noise_would_choose_the_expert():
    noisy, clean, std = (tensor.detach() for tensor in noisy_logits(num_tokens=1))
    draws = 20000
    fresh = noisy.repeat(draws, 1)
    loads = smooth_loads(noisy, clean, std, K)
    for expert in range(E):
        again = fresh.clone()
        again[:, expert] = clean[0, expert] + std[0, expert] * randn(draws, seed=expert)
        chosen = (again.topk(K, dim=1).indices == expert).any(dim=1).double().mean().item()
        assert abs(chosen - loads[expert]) < 4 * math.sqrt(0.25 / draws)


def test_load_loss_at_balance_and_collapsed():
    logits = torch.stack([torch.arange(8.0).roll(shift) for shift in range(8)])  # each expert in each place once
    near(load_loss(logits, logits, torch.ones_like(logits), 2), 1.0, 8, 8)
    certain = torch.tensor([50.0, 40.0] + [0.0] * 6).expand(16, 8)
    near(load_loss(certain, certain, torch.ones_like(certain), 2), 8 / 2, 16, 8)
    without_noise = torch.zeros_like(certain).requires_grad_()
    loss = load_loss(certain, certain, without_noise, 2)
    near(loss, 8 / 2, 16, 8)
    loss.backward()
    assert without_noise.grad.isfinite().all()


def test_load_loss_gives_an_unused_expert_a_gradient():
    """Descending it raises the logits of what is chosen too little: a count would not tell where to go."""
    clean = (randn(64, E) + torch.tensor([2.0] + [0.0] * (E - 2) + [-2.0])).requires_grad_()
    std = torch.ones(64, E)
    load_loss(clean.detach() + randn(64, E, seed=1), clean, std, K).backward()
    per_expert = clean.grad.sum(dim=0)
    assert per_expert[0] > 0 > per_expert[-1]


def test_load_loss_of_the_layer_trains_its_noise():
    layer = MoE(hidden_size=H, intermediate_size=I, num_experts=E, top_k=K, noisy=True)
    with torch.no_grad():
        layer.router.noise_weight.copy_(randn(E, H, seed=1))
    x = randn(2, T // 2, H)
    torch.manual_seed(5)
    _, routing = layer(x, return_routing=True)
    clean, std = layer.router.noise(x.flatten(0, 1))
    torch.manual_seed(5)
    torch.testing.assert_close(routing.router_logits, clean + torch.randn(T, E) * std)
    assert clean.requires_grad
    load_loss(routing.router_logits, clean, std, K).backward()
    assert layer.router.noise_weight.grad.any()
    assert layer.router.weight.grad.any()


@pytest.mark.parametrize("options", [{}, {"noisy": True, "input_jitter": 0.1}, {"noisy": True, "logit_softcap": 5.0}])
def test_a_router_whose_logits_are_not_clean_ones_plus_noise_says_so(options):
    layer = MoE(hidden_size=H, intermediate_size=I, num_experts=E, top_k=K, **options)
    with pytest.raises(ValueError, match=r"noise\(\) needs noisy=True, input_jitter=0 and logit_softcap=None"):
        layer.router.noise(randn(T, H))


def test_hugging_face_reads_k_and_pools_its_layers():
    near(hf_load_balancing_loss(torch.zeros(8, 8), 2), 2.0, 8, 8, 8)
    logits = randn(T, E)
    ids = logits.topk(K, dim=-1).indices
    near(hf_load_balancing_loss(logits, K), K * load_balancing_loss(logits, ids).double(), E, T, E)
    # Two layers that collapse on different experts: each reads 1.98, pooled they look balanced.
    layers = [torch.tensor(p).log().expand(10, 2) for p in ([0.99, 0.01], [0.01, 0.99])]
    ours = [load_balancing_loss(layer, layer.topk(1, dim=-1).indices) for layer in layers]
    near(torch.stack(ours), [1.98, 1.98], 2, 10, 2)
    near(hf_load_balancing_loss(layers, 1), 1.0, 2, 20, 2)


def test_hugging_face_mask_leaves_out_padding_of_every_layer():
    layers, mask = [randn(2 * 5, E, seed=seed) for seed in (1, 2)], torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    kept = [layer[mask.flatten().bool()] for layer in layers]
    masked = hf_load_balancing_loss(layers, K, attention_mask=mask)
    near(masked, hf_load_balancing_loss(kept, K).double(), E, 2 * T, E)


@pytest.mark.parametrize("masked", [False, True])
def test_equals_the_function_of_transformers(masked):
    """Value and gradient, three layers, from that package itself."""
    module = pytest.importorskip("transformers.models.mixtral.modeling_mixtral", reason="transformers is not installed")
    layers = tuple(randn(2 * 7, E, seed=seed).requires_grad_() for seed in range(3))
    mask = torch.tensor([[1] * 5 + [0] * 2, [1] * 7]) if masked else None
    ours = hf_load_balancing_loss(layers, K, attention_mask=mask)
    theirs = module.load_balancing_loss_func(tuple(z.double() for z in layers), E, K, mask)
    near(ours, theirs.detach(), E, 3 * 14, E)
    for mine, other in zip(torch.autograd.grad(ours, layers), torch.autograd.grad(theirs, layers), strict=True):
        assert_close(mine, other.double(), E, 3 * 14, E, E)


def test_gradient_goes_through_the_probabilities_only():
    logits, ids = randn(T, E).requires_grad_(), round_robin(T, E, K).clone()
    ids[:5] = torch.tensor([0, 1])
    load_balancing_loss(logits, ids).backward()
    load = ids.flatten().bincount(minlength=E).double() / ids.numel()
    double = logits.detach().double().requires_grad_()
    (E * (load * double.softmax(-1).mean(0)).sum()).backward()
    assert_close(logits.grad, double.grad, E, T, E, E)


def test_mask_leaves_padding_out_of_everything():
    """The value of the tokens alone, and a gradient of exactly zero where padding is, even if it is NaN."""
    mask = torch.arange(T) % 3 != 0
    ids, weights = round_robin(T, E, K).roll(1, 0), randn(T, K).exp()
    logits = randn(T, E)
    for value in (logits, weights):
        value[~mask] = torch.nan
        value.requires_grad_()
    ids[~mask] = 0  # all padding on one expert
    pairs = [
        (load_balancing_loss(logits, ids, mask=mask), load_balancing_loss(logits[mask], ids[mask])),
        (z_loss(logits, mask=mask.view(2, -1).int()), z_loss(logits[mask])),
        (importance_loss(weights, ids, E, mask=mask), importance_loss(weights[mask], ids[mask], E)),
    ]
    for masked, alone in pairs:
        near(masked, alone.double(), E, T, E)
        leaf = weights if masked is pairs[2][0] else logits
        (grad,) = torch.autograd.grad(masked, leaf)
        assert (grad[~mask] == 0).all()
        assert grad[mask].abs().max() > 0
    nobody = torch.zeros(T, dtype=torch.bool)
    assert load_balancing_loss(logits, ids, mask=nobody) == 0
    assert z_loss(logits, mask=nobody) == 0
    assert importance_loss(weights, ids, E, mask=nobody) == 0
    assert load_loss(*noisy_logits(), K, mask=nobody) == 0


def test_mask_leaves_padding_out_of_the_smooth_load():
    mask = torch.arange(T) % 3 > 0
    tensors = noisy_logits()
    with torch.no_grad():
        for tensor in tensors:
            tensor[~mask] = float("nan")
    loss = load_loss(*tensors, K, mask=mask)
    torch.testing.assert_close(loss, load_loss(*(tensor[mask] for tensor in tensors), K))
    loss.backward()
    for tensor in tensors:
        assert tensor.grad.isfinite().all()
        assert not tensor.grad[~mask].any()
        assert tensor.grad[mask].any()


def test_sequence_level_is_the_mean_over_sequences():
    logits, ids = randn(3, 8, E), torch.stack([round_robin(8, E, K), *[torch.tensor([[0, 1]]).expand(8, 2)] * 2])
    each = [load_balancing_loss(a, b) for a, b in zip(logits, ids, strict=True)]
    near(load_balancing_loss(logits, ids, level="sequence"), torch.stack(each).double().mean(), E, 8, E, 3)
    mask = torch.ones(3, 8, dtype=torch.bool)
    mask[2], mask[1, 4:] = False, False  # the third sequence is padding only: it does not count as one
    each = [load_balancing_loss(logits[0], ids[0]), load_balancing_loss(logits[1, :4], ids[1, :4])]
    masked = load_balancing_loss(logits, ids, level="sequence", mask=mask)
    near(masked, torch.stack(each).double().mean(), E, 8, E, 3)
    pooled = load_balancing_loss(logits, ids)
    assert abs(pooled - load_balancing_loss(logits, ids, level="sequence")) > 0.01


@pytest.mark.parametrize(
    "options", [{"expert_bias": True}, {"num_groups": 3, "topk_groups": 1}], ids=["bias", "groups"]
)
def test_load_is_that_of_the_true_routing(options):
    """A bias or groups change who is chosen: the loss sees it, a top-k of the scores would not."""
    torch.manual_seed(0)
    layer = MoE(H, I, E, K, score_function="sigmoid", **options)
    if "expert_bias" in options:
        layer.router.expert_bias[3] = 10.0
    routing = layer(randn(T, H), return_routing=True)[1]
    load = routing.topk_ids.flatten().bincount(minlength=E).double() / (T * K)
    probability = routing.router_logits.double().sigmoid()
    probability = (probability / probability.sum(-1, keepdim=True)).mean(0)
    loss = load_balancing_loss(routing.router_logits, routing.topk_ids, score_function="sigmoid")
    near(loss, E * (load * probability).sum(), H, E, T, E)
    plain = routing.router_logits.topk(K, dim=-1).indices
    unaware = load_balancing_loss(routing.router_logits, plain, score_function="sigmoid")
    assert abs(loss - unaware) > 1e-3


def test_load_after_capacity():
    """Given the counts, or the ids without the dropped slots."""
    torch.manual_seed(0)
    layer = MoE(H, I, E, K, capacity_factor=0.5)
    routing = layer(randn(T, H), return_routing=True)[1]
    dropped = ops.plan(routing.topk_ids, E, layer.capacity(T)).slot_to_row < 0
    assert dropped.any()
    by_counts = load_balancing_loss(routing.router_logits, tokens_per_expert=routing.tokens_per_expert)
    by_ids = load_balancing_loss(routing.router_logits, routing.topk_ids.masked_fill(dropped, -1))
    assert torch.equal(by_counts, by_ids)
    assert by_counts != load_balancing_loss(routing.router_logits, routing.topk_ids)


def test_global_level_under_gradient_accumulation():
    """With the counts of all micro-batches, the mean of their losses is the loss of the whole batch."""
    logits, ids = randn(4, T, E).requires_grad_(), randn(4, T, E, seed=3).topk(K, dim=-1).indices
    load = GlobalLoad(E)
    for micro in ids:
        counts = load(micro)
    assert torch.equal(counts, ids.flatten().bincount(minlength=E))
    whole = load_balancing_loss(logits, ids)
    mean = torch.stack([load_balancing_loss(micro, tokens_per_expert=counts) for micro in logits]).mean()
    near(mean, whole.double(), E, T, E, 4)
    grads = [torch.autograd.grad(loss, logits)[0] for loss in (mean, whole)]
    assert_close(grads[0], grads[1].double(), E, T, E, 4)
    assert load(ids[0], mask=torch.zeros(T)).equal(counts)
    load.reset()
    assert load(ids[0], mask=torch.arange(T) < 5).sum() == 5 * K


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputation_counts_nothing_twice(use_reentrant):
    torch.manual_seed(0)
    layer, load, calls = MoE(H, I, E, K), GlobalLoad(E), []

    def block(x):
        calls.append("block")
        output, routing = layer(x, return_routing=True)
        loss = load_balancing_loss(routing.router_logits, tokens_per_expert=load(routing.topk_ids))
        return output, loss

    results = []
    for call in (block, lambda x: checkpoint(block, x, use_reentrant=use_reentrant)):
        layer.zero_grad()
        load.reset()
        x = randn(T, H).requires_grad_()
        output, loss = call(x)
        (output.square().mean() + loss).backward()
        results.append([loss, load.tokens_per_expert.clone(), x.grad, *(p.grad for p in layer.parameters())])
    assert len(calls) == 3  # the recomputation did run
    assert all(torch.equal(plain, recomputed) for plain, recomputed in zip(*results, strict=True))
    assert load.tokens_per_expert.sum() == T * K


def test_nothing_is_collected():
    """No list of losses grows: what a loss was computed from is gone with the loss."""
    logits = randn(T, E).requires_grad_()
    ids, weights = round_robin(T, E, K), randn(T, K).requires_grad_()
    values = [load_balancing_loss(logits, ids), z_loss(logits), importance_loss(weights, ids, E)]
    gone = [weakref.ref(tensor) for tensor in (logits, weights, *values)]
    del logits, weights, values
    gc.collect()
    assert [reference() for reference in gone] == [None] * len(gone)
    assert not [name for name, value in vars(losses).items() if isinstance(value, list | dict) and name[:2] != "__"]


@pytest.mark.usefixtures("restore_threads")
def test_same_bits_from_run_to_run_and_for_any_threads():
    num_tokens = 5000
    ids = randn(num_tokens, 64, seed=5).topk(4, dim=-1).indices
    results = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        logits, weights = randn(num_tokens, 64).requires_grad_(), randn(num_tokens, 4).exp().requires_grad_()
        loss = load_balancing_loss(logits, ids) + z_loss(logits) + importance_loss(weights, ids, 64)
        loss.backward()
        results.append((loss.detach(), logits.grad, weights.grad))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_low_precision_logits_are_scored_in_fp32():
    logits, ids = randn(T, E, dtype=torch.bfloat16), round_robin(T, E, K).roll(1, 0)
    ids[:9] = 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = load_balancing_loss(logits, ids), z_loss(logits)
    for value, expected in zip(
        values, (load_balancing_loss(logits.double(), ids), z_loss(logits.double())), strict=True
    ):
        assert value.dtype == torch.float32
        near(value, expected, E, T, E)


@pytest.mark.parametrize("level", ["micro", "sequence"])
def test_compiles_whole(level):
    torch.compiler.reset()

    def all_losses(logits, ids, weights, mask):
        balance = load_balancing_loss(logits, ids, mask=mask, level=level, score_function="sigmoid")
        balance = balance + load_loss(logits, logits / 2, logits.exp(), K, mask=mask)
        return balance + z_loss(logits, mask=mask) + importance_loss(weights, ids, E, mask=mask)

    mask = torch.arange(2 * T).view(2, T) % 5 > 0
    inputs = randn(2, T, E), round_robin(2 * T, E, K).view(2, T, K), randn(2, T, K).exp()
    results = []
    for function in (all_losses, torch.compile(all_losses, fullgraph=True, backend="aot_eager")):
        logits, weights = inputs[0].clone().requires_grad_(), inputs[2].clone().requires_grad_()
        loss = function(logits, inputs[1], weights, mask)
        loss.backward()
        results.append((loss, logits.grad, weights.grad))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: load_balancing_loss(torch.zeros(4, 3)), "load_balancing_loss: give exactly one of topk_ids and"),
        (
            lambda: load_balancing_loss(torch.zeros(4, 3), torch.zeros(5, 2)),
            r"load_balancing_loss: topk_ids must have the tokens of router_logits, \[4\], got \[5, 2\]",
        ),
        (
            lambda: load_balancing_loss(torch.zeros(4, 3), tokens_per_expert=torch.zeros(4)),
            r"load_balancing_loss: tokens_per_expert must have shape \[3\], got \[4\]",
        ),
        (
            lambda: load_balancing_loss(torch.zeros(4, 3), torch.zeros(4, 1), mask=torch.ones(3)),
            r"load_balancing_loss: mask must have one element per token, 4, got shape \[3\] \(True for a token",
        ),
        (
            lambda: load_balancing_loss(torch.zeros(2, 4, 3), torch.zeros(2, 4, 1), mask=torch.ones(4, 2)),
            r"load_balancing_loss: mask must have the shape of the tokens, \[2, 4\], got \[4, 2\] \(transpose it",
        ),
        (lambda: z_loss(torch.zeros(2, 4, 3), mask=torch.ones(4, 2)), "z_loss: mask must have the shape of the tokens"),
        (
            lambda: load_loss(*torch.ones(3, 2, 4, 3), 2, mask=torch.ones(4, 2)),
            "load_loss: mask must have the shape of the tokens",
        ),
        (
            lambda: importance_loss(torch.ones(2, 4, 2), torch.ones(2, 4, 2), 3, mask=torch.ones(4, 2)),
            "importance_loss: mask must have the shape of the tokens",
        ),
        (
            lambda: GlobalLoad(3)(torch.zeros(2, 4, 1), mask=torch.ones(4, 2)),
            "GlobalLoad: mask must have the shape of the tokens",
        ),
        (
            lambda: load_balancing_loss(torch.zeros(4, 3), torch.zeros(4, 1), level="global"),
            "load_balancing_loss: level must be in .*, got 'global' .*GlobalLoad",
        ),
        (
            lambda: load_balancing_loss(torch.zeros(4, 3), torch.zeros(4, 1), level="sequence"),
            r"load_balancing_loss: level='sequence' needs .*, got \[4, 3\] \(call .view\)",
        ),
        (
            lambda: load_balancing_loss(torch.zeros(4, 3), torch.zeros(4, 1), score_function="tanh"),
            "score_function must be in .*, got 'tanh'",
        ),
        (
            lambda: importance_loss(torch.ones(4, 2), torch.zeros(4, 1), 3),
            r"importance_loss: topk_weights and topk_ids must have one shape, got \[4, 2\] and \[4, 1\]",
        ),
        (
            lambda: load_loss(torch.ones(4, 3), torch.ones(4, 3), torch.ones(3), 2),
            r"load_loss: noisy_logits, clean_logits and noise_std must have one shape, got \[4, 3\], \[4, 3\] and",
        ),
        (
            lambda: load_loss(torch.ones(4, 3), torch.ones(4, 3), torch.ones(4, 3), 3),
            r"load_loss: top_k must be in \[1, num_experts - 1 = 2\], got 3",
        ),
    ],
)
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
