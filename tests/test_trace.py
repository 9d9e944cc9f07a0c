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
    ],
    ids=["plain", "deepseek", "capacity"],
)
def test_contributions_sum_to_the_output(options):
    torch.manual_seed(0)
    layer, token = MoE(H, I, E, K, **options), randn(H)
    if layer.router.expert_bias is not None:
        layer.router.expert_bias[2] = 5.0
    result = trace(layer, token)
    weights, ids = layer.router(token.view(1, -1))[1:]
    assert torch.equal(result.topk_weights, weights[0])
    assert torch.equal(result.topk_ids, ids[0])
    for choice, expert in enumerate(ids[0].tolist()):
        alone = MoE(H, I, E, 1, renormalize=False, **{k: v for k, v in options.items() if k != "num_shared_experts"})
        alone.experts = layer.experts
        alone.router.forward = lambda x, expert=expert, **_: (
            x,
            torch.ones(len(x), 1),
            torch.full((len(x), 1), expert, dtype=torch.int32),
        )
        assert_close(result.contributions[choice], (weights[0, choice] * alone(token)).detach().double(), 1, I)
    total = result.contributions.double().sum(0) + (0 if result.shared is None else result.shared)
    assert_close(result.output, total, H, 1, I, K)
    assert torch.equal(result.output, layer(token))
    assert (result.shared is None) == (layer.shared_experts is None)


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
