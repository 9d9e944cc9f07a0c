"""MoE as a module like any other: state_dict, copies, pickling, meta, parametrisations, autocast, training."""

import copy
import io
import pickle

import pytest
import torch
from helpers import randn
from torch.nn.utils import parametrize

from torch_moe import MoE, ops

H, I, E, K = 16, 24, 5, 2  # noqa: E741
OPTIONS = {
    "plain": {},
    "everything": {
        "expert_bias": True, "score_function": "sigmoid", "bias": True, "num_shared_experts": 1, "capacity_factor": 1.5,
        "gate_layout": "interleaved", "weight_layout": "in_out",
    },
}  # fmt: skip


@pytest.fixture(params=OPTIONS.values(), ids=OPTIONS)
def layer(request, device):
    torch.manual_seed(0)
    return MoE(H, I, E, K, device=device, **request.param)


@pytest.fixture
def x(device):
    return randn(3, 4, H, device=device)


def test_state_dict_names():
    names = {"router.weight", "experts.gate_up_proj", "experts.down_proj"}
    assert set(MoE(H, I, E, K).state_dict()) == names
    projections = ("gate_up_proj", "down_proj")
    assert set(MoE(H, I, E, K, **OPTIONS["everything"]).state_dict()) == {
        *names,
        "router.expert_bias",
        *(f"experts.{name}_bias" for name in projections),
        *(f"shared_experts.{name}.{part}" for name in projections for part in ("weight", "bias")),
    }


def test_state_dict_round_trip(layer, x):
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(layer)
    other.reset_parameters()
    assert not torch.equal(other(x), layer(x))
    other.load_state_dict(torch.load(file))
    assert torch.equal(other(x), layer(x))


def test_deepcopy_and_pickle(layer, x):
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
        assert repr(twin) == repr(layer)
        with torch.no_grad():
            twin.experts.down_proj.zero_()
        assert layer.experts.down_proj.abs().sum() > 0


def test_same_seed_same_layer(layer):
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    for value in layer.state_dict().values():
        value.fill_(7)
    torch.manual_seed(0)
    layer.reset_parameters()
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name])


def test_meta_device_then_materialise(layer, x, request, device):
    options = OPTIONS[request.node.callspec.id]
    with torch.device("meta"):
        empty = MoE(H, I, E, K, **options)
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    assert empty(x.to("meta")).shape == x.shape  # shape inference runs without memory
    empty.to_empty(device=device)
    empty.load_state_dict(layer.state_dict())
    assert torch.equal(empty(x), layer(x))


class Doubled(torch.nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_parametrize(layer, x):
    expected = copy.deepcopy(layer)
    with torch.no_grad():
        expected.experts.gate_up_proj.mul_(2)
        expected.router.weight.mul_(2)
    parametrize.register_parametrization(layer.experts, "gate_up_proj", Doubled())
    parametrize.register_parametrization(layer.router, "weight", Doubled())
    assert torch.equal(layer(x), expected(x))
    layer(x).sum().backward()
    expected(x).sum().backward()
    grad = layer.experts.parametrizations.gate_up_proj.original.grad
    assert torch.equal(grad, 2 * expected.experts.gate_up_proj.grad)


def test_autocast(layer, x, device):
    with torch.autocast(device.type, dtype=torch.bfloat16):
        output = layer(x)
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in layer.parameters())
    # The router is fp32 in both, so the tokens go to the same experts and only rounding differs.
    eps = torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(output.float(), layer(x), rtol=0, atol=eps * 6 * layer(x).abs().max().item())


def test_autocast_leaves_fp64_alone(layer, x, device):
    layer.double()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        experts = layer.experts(*arguments(layer, x.double()))
    assert torch.equal(experts, layer.experts(*arguments(layer, x.double())))
    assert experts.dtype == torch.float64


def arguments(layer, x):
    """What the layer hands to its experts."""
    tokens = x.view(-1, H)
    _, weights, ids = layer.router(tokens)
    return tokens, weights, ops.plan(ids, E)


def test_checkpoint(layer, x):
    x.requires_grad_()
    layer(x).sum().backward()
    expected = {name: parameter.grad.clone() for name, parameter in layer.named_parameters()}
    layer.zero_grad()
    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).sum().backward()
    for name, parameter in layer.named_parameters():
        assert torch.equal(parameter.grad, expected[name])


def test_training_lowers_the_loss(layer, x):
    target = randn(3, 4, H, device=x.device, seed=5)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=3e-3)
    losses = []
    for _ in range(80):
        loss = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_repr_shows_parts_and_capacity():
    text = repr(MoE(H, I, E, K, **OPTIONS["everything"]))
    for part in (
        "capacity_factor=1.5",
        "(router): TopKRouter(",
        "(experts): Experts(",
        "(shared_experts): SharedExperts(",
    ):
        assert part in text
    assert "capacity_factor" not in repr(MoE(H, I, E, K))
