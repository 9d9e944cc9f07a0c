"""upcycle: the dense function at step 0, for every form of it, and what drop-upcycling changes."""

import pytest
import torch
from helpers import randn
from torch import nn

from torch_moe import MoE, upcycle
from torch_moe.nn import DenseFFN
from torch_moe.testing import assert_close

T, H, I = 17, 12, 24  # noqa: E741
DENSE = {
    "swiglu": {"activation": "swiglu"},
    "relu": {"activation": "relu"},
    "gpt_oss": {"gate_layout": "interleaved", "alpha": 1.702, "limit": 7.0, "up_offset": 1.0, "bias": True},
    "gelu_bias": {"activation": "gelu", "bias": True},
}
LAYERS = {
    "softmax": {},
    "topk_then_score": {"score_order": "topk_then_score", "renormalize": False},
    "deepseek": {"score_function": "sigmoid", "expert_bias": True, "routed_scaling_factor": 2.5, "num_groups": 2},
    "sqrtsoftplus": {"score_function": "sqrtsoftplus", "routed_scaling_factor": 1.5, "expert_bias": True},
    "in_out": {"weight_layout": "in_out", "recompute": True},
}


class Gated(nn.Module):
    """The form of most models: three linear maps and a function."""

    def __init__(self, act_fn, bias=False):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(H, I, bias=bias), nn.Linear(H, I, bias=bias)
        self.down_proj, self.act_fn = nn.Linear(I, H, bias=bias), act_fn

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def check_equal(layer, dense, x):
    """Equal to the dense network in fp64, and some work for several experts."""
    output, routing = layer(x, return_routing=True)
    assert_close(output, dense.double()(x.double()), H, routing.router_logits.shape[1], H, 1, I, layer.router.top_k)
    assert (routing.tokens_per_expert > 0).sum() > layer.router.top_k


@pytest.mark.parametrize("granularity", [1, 2, 3])
@pytest.mark.parametrize("layer_options", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("dense_options", DENSE.values(), ids=DENSE)
def test_equals_the_dense_network_at_step_0(dense_options, layer_options, granularity):
    torch.manual_seed(0)
    dense = DenseFFN(H, I, **dense_options)
    layer = upcycle(dense, 4 * granularity, 2 * granularity, granularity=granularity, **layer_options)
    assert isinstance(layer, MoE)
    assert layer.experts.intermediate_size == I // granularity
    check_equal(layer, dense, randn(T, H))


def test_a_limit_after_the_activation_is_taken_over():
    torch.manual_seed(0)
    dense = DenseFFN(H, I, limit=0.05, limit_position="after")
    check_equal(upcycle(dense, 4, 2), dense, randn(T, H))


@pytest.mark.parametrize(
    ("make", "activation"),
    [
        (lambda: Gated(nn.SiLU()), "swiglu"),
        (lambda: Gated(nn.GELU(approximate="tanh"), bias=True), "geglu_tanh"),
        (lambda: nn.Sequential(nn.Linear(H, I), nn.ReLU(), nn.Linear(I, H)), "relu"),
        (lambda: nn.Sequential(nn.Linear(H, I, bias=False), nn.GELU(), nn.Linear(I, H, bias=False)), "gelu"),
    ],
    ids=["silu", "gelu_tanh", "sequential_relu", "sequential_gelu"],
)
def test_reads_the_usual_modules(make, activation):
    torch.manual_seed(0)
    dense = make()
    layer = upcycle(dense, 6, 2, granularity=2)
    assert layer.experts.activation == activation
    check_equal(layer, dense, randn(T, H))


def test_activation_given_where_unknown():
    torch.manual_seed(0)

    class Swish(nn.Module):
        def forward(self, x):
            return x * x.sigmoid()

    dense = Gated(Swish())
    with pytest.raises(ValueError, match="upcycle: the activation Swish is not known here: give activation"):
        upcycle(dense, 4, 2)
    check_equal(upcycle(dense, 4, 2, activation="swiglu"), dense, randn(T, H))
    # The rest of such an activation is given, too.
    assert upcycle(dense, 4, 2, activation="swiglu", alpha=1.5, limit=3.0).experts.limit == 3.0


def test_dtype_device_and_independence():
    dense = DenseFFN(H, I, dtype=torch.bfloat16)
    before = dense.gate_up_proj.weight.clone()
    layer = upcycle(dense, 4, 2)
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.bfloat16}
    assert all(parameter.requires_grad for parameter in layer.parameters())
    with torch.no_grad():
        layer.experts.gate_up_proj.zero_()
    assert torch.equal(dense.gate_up_proj.weight, before)


def test_router_noise_is_one_draw_per_copy():
    torch.manual_seed(0)
    layer = upcycle(DenseFFN(64, I), 128, 8, granularity=2, router_noise=0.5)
    rows = layer.router.weight.view(64, 2, 64)
    assert torch.equal(rows[:, 0], rows[:, 1])
    assert rows[:, 0].std().item() == pytest.approx(0.5, rel=4 / (2 * 64 * 64) ** 0.5)  # four standard errors
    assert (upcycle(DenseFFN(H, I), 4, 2, router_noise=0.0).router.weight == 0).all()


def test_training_tells_experts_apart():
    torch.manual_seed(0)
    layer = upcycle(DenseFFN(H, I), 4, 2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(randn(T, H)).square().sum().backward()
    optimizer.step()
    weights = layer.experts.down_proj.detach()
    assert (weights[1:] != weights[0]).flatten(1).any(dim=1).all()


@pytest.mark.parametrize("granularity", [1, 2])
def test_drop_upcycling_draws_a_share_of_channels_anew(granularity):
    torch.manual_seed(0)
    hidden, width = 48, 240
    dense = DenseFFN(hidden, width)
    with torch.no_grad():
        dense.gate_up_proj.weight[:width].mul_(3).add_(0.5)  # the gate has statistics of its own
    generator = torch.Generator().manual_seed(1)
    layer = upcycle(dense, 4, 2, granularity=granularity, drop_ratio=0.25, generator=generator)
    again = upcycle(dense, 4, 2, granularity=granularity, drop_ratio=0.25, generator=generator.manual_seed(1))
    plain = upcycle(dense, 4, 2, granularity=granularity, drop_ratio=0.0)
    assert torch.equal(layer.experts.gate_up_proj, again.experts.gate_up_proj)

    own = width // granularity
    new_up = (layer.experts.gate_up_proj != plain.experts.gate_up_proj).view(4, 2, own, hidden)
    new_down = layer.experts.down_proj != plain.experts.down_proj
    drawn = new_up.all(dim=(1, 3))  # a channel is drawn whole: gate, up and down
    assert torch.equal(drawn, new_up.any(dim=3).any(dim=1))
    assert torch.equal(drawn, new_down.any(dim=1))
    assert (drawn.sum(dim=1) == own // 4).all()
    assert (drawn[1:] != drawn[0]).any()  # other channels in other experts
    for index in (0, 1):
        matrices = [
            experts.gate_up_proj.view(4, 2, own, hidden)[:, index] for experts in (layer.experts, plain.experts)
        ]
        redrawn, replaced = (matrix[drawn] for matrix in matrices)
        error = 4 * replaced.std() / redrawn.numel() ** 0.5
        assert (redrawn.mean() - replaced.mean()).abs() < 2 * error
        assert (redrawn.std() - replaced.std()).abs() < error
    ratio = layer.experts.down_proj.std() / plain.experts.down_proj.std()
    assert ratio.item() == pytest.approx(1, abs=0.05)


def test_refused():
    dense = DenseFFN(H, I)
    calls = {
        "granularity must divide num_experts = 4, got 3": lambda: upcycle(dense, 4, 3, granularity=3),
        "granularity must divide top_k = 3, got 2": lambda: upcycle(dense, 4, 3, granularity=2),
        "granularity must divide intermediate size = 24, got 5": lambda: upcycle(dense, 10, 5, granularity=5),
        r"drop_ratio must be in \[0, 1\], got 1.5": lambda: upcycle(dense, 4, 2, drop_ratio=1.5),
        r"drop_ratio must be in \[0, 1\], got -0.5": lambda: upcycle(dense, 4, 2, drop_ratio=-0.5),
        "router_noise must not be negative, got -1": lambda: upcycle(dense, 4, 2, router_noise=-1),
        "num_shared_experts would change the dense output: leave it, got 1": lambda: upcycle(
            dense, 4, 2, num_shared_experts=1
        ),
        "shared_intermediate_size would change": lambda: upcycle(dense, 4, 2, shared_intermediate_size=8),
        "renormalize_p would change": lambda: upcycle(dense, 4, 2, renormalize_p=2.0),
        "second_expert_policy would change": lambda: upcycle(
            dense, 4, 2, selection="top2_gshard", second_expert_policy="random"
        ),
        "activation would change the dense output: leave it, got geglu": lambda: upcycle(
            dense, 4, 2, activation="geglu"
        ),
        "limit would change": lambda: upcycle(dense, 4, 2, limit=0.1),
        "bias would change": lambda: upcycle(dense, 4, 2, bias=True),
        "activation would change .*, got reglu": lambda: upcycle(Gated(nn.SiLU()), 4, 2, activation="reglu"),
        "alpha would change": lambda: upcycle(Gated(nn.SiLU()), 4, 2, alpha=1.5),
        "weight_position would change": lambda: upcycle(dense, 4, 2, weight_position="input"),
        "num_zero_experts would change": lambda: upcycle(dense, 4, 2, num_zero_experts=2),
        "projection would change": lambda: upcycle(dense, 4, 2, projection="mlp", projection_size=4),
        "num_shared_sinks would change": lambda: upcycle(dense, 4, 2, num_shared_sinks=2, score_function="sigmoid"),
        "granularity above 1 needs selection='topk', which keeps copies whole, got .*biased": lambda: upcycle(
            dense, 4, 2, granularity=2, force_biased=1.0
        ),
        "granularity above 1 needs selection='topk', .*balanced": lambda: upcycle(
            dense, 4, 2, granularity=2, force_balanced=True
        ),
        "granularity above 1 needs noisy=False: noise would part": lambda: upcycle(
            dense, 4, 2, granularity=2, noisy=True
        ),
        "granularity must divide num_experts = 4, got 0": lambda: upcycle(dense, 4, 2, granularity=0),
        "granularity above 1 needs selection='topk'": lambda: upcycle(
            dense, 4, 2, granularity=2, selection="hash", vocab_size=9
        ),
        "weights must sum to a constant: renormalize": lambda: upcycle(dense, 4, 2, renormalize=False),
        "weights must sum to a constant: renormalize must be True, got False": lambda: upcycle(
            dense, 4, 2, renormalize=False, score_order="topk_then_score", score_function="sqrtsoftplus"
        ),
        "num_groups must leave the 2 experts of a copy": lambda: upcycle(dense, 6, 2, granularity=2, num_groups=2),
    }
    for message, call in calls.items():
        with pytest.raises(ValueError, match=f"upcycle: {message}"):
            call()
    with pytest.raises(TypeError, match=r"upcycle: dense_ffn must be a DenseFFN, .*, got Linear \(copy its"):
        upcycle(nn.Linear(H, H), 4, 2)
    narrow = nn.Sequential(nn.Linear(H, I), nn.ReLU(), nn.Linear(I, H - 1))
    with pytest.raises(ValueError, match=r"upcycle: the projections .* got weights of \[\[24, 12\], \[11, 24\]\]"):
        upcycle(narrow, 4, 2)
    half_biased = nn.Sequential(nn.Linear(H, I), nn.ReLU(), nn.Linear(I, H, bias=False))
    with pytest.raises(ValueError, match="upcycle: all projections must have a bias, or none"):
        upcycle(half_biased, 4, 2)
    with pytest.raises(ValueError, match="RouterConfig: top_k=1 needs"):
        upcycle(dense, 4, 1)
    with pytest.raises(ValueError, match="RouterConfig: num_groups must divide"):
        upcycle(dense, 4, 2, granularity=2, num_groups=0)
