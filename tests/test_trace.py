"""trace: the worked example's numbers, and a sum that is the layer's output."""

import pytest
import torch
from helpers import randn

from torch_moe import MoE, RoutingStats, trace
from torch_moe.testing import assert_close

H, I, E, K = 16, 8, 6, 3  # noqa: E741
EXAMPLE = torch.tensor([2.1, 0.3, -1.5, 0.8, -0.2, 2.9, 0.1, -0.7])


def example(**options):
    """A layer whose logits are its input."""
    layer = MoE(8, 8, 8, **{"top_k": 2, **options})
    layer.router.weight.data.copy_(torch.eye(8))
    return trace(layer, EXAMPLE)


def near(actual, expected):
    torch.testing.assert_close(actual, torch.tensor(expected), rtol=0, atol=1.01e-6)  # printed to six places


@pytest.mark.parametrize(
    ("options", "ids", "weights"),
    [
        ({}, [5, 0], [0.689974, 0.310026]),
        ({"renormalize": False}, [5, 0], [0.558185, 0.250809]),
        ({"score_order": "topk_then_score"}, [5, 0], [0.689974, 0.310026]),
        ({"score_function": "sigmoid"}, [5, 0], [0.515484, 0.484516]),
        ({"score_function": "sigmoid", "top_k": 3}, [5, 0, 3], [0.374832, 0.352313, 0.272855]),
        (
            {"score_function": "sigmoid", "top_k": 3, "num_groups": 4, "topk_groups": 2, "routed_scaling_factor": 2.5},
            [5, 0, 1],
            [0.981943, 0.922951, 0.595106],
        ),
    ],
)
def test_worked_example(options, ids, weights):
    result = example(**options)
    assert result.topk_ids.tolist() == ids
    near(result.topk_weights, weights)
    # The softmax of the chosen probabilities is no mode of any router.
    assert not torch.isclose(result.topk_weights.max(), torch.tensor(0.576245), atol=1e-3)


def test_scores_and_probabilities_of_the_worked_example():
    softmax, sigmoid = example(), example(score_function="sigmoid")
    near(softmax.scores, [0.250809, 0.041458, 0.006853, 0.068353, 0.025146, 0.558185, 0.033943, 0.015252])
    near(sigmoid.scores, [0.890903, 0.574443, 0.182426, 0.689974, 0.450166, 0.947846, 0.524979, 0.331812])
    assert torch.equal(softmax.probabilities, softmax.scores)
    torch.testing.assert_close(sigmoid.probabilities, sigmoid.scores / sigmoid.scores.sum())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"score_function": "sigmoid", "expert_bias": True, "num_shared_experts": 1, "bias": True},
        {"weight_layout": "in_out", "activation": "relu", "capacity_factor": 0.1},
        {"num_zero_experts": 4, "score_function": "sigmoid", "num_shared_experts": 1},
        {"weight_position": "input", "per_expert_scale": True, "logit_softcap": 5.0},
        {"selection": "hash", "vocab_size": 10},
        {"input_jitter": 0.5, "noisy": True, "dropout": 0.5, "expert_dropout": 0.5},
    ],
    ids=["plain", "deepseek", "capacity", "zero_experts", "scaled_input", "hash", "noise"],
)
def test_contributions_sum_to_the_output(options):
    torch.manual_seed(0)
    layer, token = MoE(H, I, E, K, **options), randn(H)
    if layer.router.expert_bias is not None:
        layer.router.expert_bias[2] = 5.0
    token_ids = torch.tensor([7])
    result = trace(layer, token, token_ids=token_ids)
    layer.eval()
    output, routing = layer(token, return_routing=True, token_ids=token_ids)
    assert torch.equal(result.topk_weights, routing.topk_weights[0])
    assert torch.equal(result.topk_ids, routing.topk_ids[0])
    assert torch.equal(result.output, output)
    assert (result.shared is None) == (layer.shared_experts is None)
    shared = torch.zeros(H) if layer.shared_experts is None else layer.shared_experts(token.view(1, H))[0]
    for choice in range(K):
        # The layer with the other weights zero, less what every token gets.
        alone = torch.where(torch.arange(K) == choice, routing.topk_weights, 0)
        layer.router.forward = lambda x, alone=alone, **_: (x, alone, routing.topk_ids)
        assert_close(result.contributions[choice], (layer(token) - shared).double().detach(), H, 1, I, K)
        assert (result.contributions[choice] != 0).any()
    assert_close(result.output, (result.contributions.double().sum(0) + shared).detach(), H, 1, I, K)


def test_leaves_the_layer_alone():
    layer = MoE(H, I, E, K)
    layer.router.eval()  # modes differ between parts
    stats = RoutingStats.attach(layer)
    result = trace(layer, randn(1, 1, H))
    assert layer.training
    assert layer.experts.training
    assert not layer.router.training
    assert stats.tokens_per_expert(0).sum() == 0
    assert not result.output.requires_grad


def test_keeps_what_it_saw():
    """The bias is moved in place by a balancer, after the trace as before."""
    layer = MoE(H, I, E, K, expert_bias=True)
    result = trace(layer, randn(H))
    layer.router.expert_bias.fill_(1.0)
    assert not result.expert_bias.any()


def test_prints_chosen_experts_first():
    torch.manual_seed(0)
    layer = MoE(H, I, E, K, score_function="sigmoid", expert_bias=True, num_shared_experts=1)
    result = trace(layer, randn(H))
    lines = str(result).splitlines()
    assert lines[0] == "3 of 6 experts"
    assert lines[1].split() == ["expert", "logit", "score", "probability", "bias", "weight", "|contribution|"]
    assert [int(line.split()[0]) for line in lines[2:5]] == result.topk_ids.tolist()
    assert [len(line.split()) for line in lines[2:]] == [7, 7, 7, 5, 5, 5, 2]
    assert f"{result.contributions[0].norm():.4f}" in lines[2]


@pytest.mark.parametrize("shape", [(2, H), (H - 1,), (H, 1)])
def test_refused(shape):
    with pytest.raises(ValueError, match=r"trace: x must be one token of hidden_size 16, got shape \["):
        trace(MoE(H, I, E, K), torch.zeros(shape))
