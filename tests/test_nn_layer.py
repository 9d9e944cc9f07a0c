"""MoE: the pipeline against the reference, capacity, shared experts, and what it refuses."""

import math

import pytest
import torch
from helpers import ALL_DTYPES, randn, run
from torch.profiler import ProfilerActivity, profile

from torch_moe import MoE, reference
from torch_moe.nn import DenseFFN, Routing
from torch_moe.testing import SHAPES, assert_close

SHAPE = SHAPES["unaligned"]
T, H, I, E, K = SHAPE  # noqa: E741


def make(device, **options):
    torch.manual_seed(0)
    return MoE(H, I, E, K, device=device, **options)


def reference_layer(layer, x, parameters):
    """The layer in fp64, from the words of the reference."""
    logits = x @ parameters["router.weight"].T
    weights, ids = reference.route(logits, K)
    plan = reference.plan(ids, E, layer.capacity(x.shape[0]))
    return reference.experts(x, parameters["experts.gate_up_proj"], parameters["experts.down_proj"], weights, plan)


@pytest.mark.parametrize("capacity_factor", [None, 0.7])
@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_equals_the_reference(dtype, capacity_factor, device):
    layer = make(device, capacity_factor=capacity_factor).to(dtype)
    parameters = dict(layer.named_parameters())
    inputs = {"x": randn(T, H, dtype=dtype, device=device), **{name: p.detach() for name, p in parameters.items()}}

    def forward(x, **values):
        return torch.func.functional_call(layer, values, x)

    actual = run(forward, inputs)
    expected = run(lambda x, **values: reference_layer(layer, x, values), {n: t.double() for n, t in inputs.items()})
    forward_steps = (H, E, H, 1, I, K)
    for name, value in actual.items():
        # A gradient goes forward to the last product and back through all of them.
        steps = forward_steps if name == "output" else (*forward_steps, H, 2 * I, I, E, T)
        assert_close(value, expected[name], *steps)


def test_inference_makes_no_plan_of_its_own(device):
    """Only where nobody asks for the load, and nothing is dropped."""
    x = randn(T, H, device=device)

    def calls(layer, *args):
        layer.requires_grad_(False).eval()
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            layer(x, *args)
        return {event.key for event in profiled.key_averages() if event.key in {"moe::plan", "moe::routed_experts"}}

    assert calls(make(device)) == {"moe::routed_experts"}
    assert calls(make(device), True) == calls(make(device, capacity_factor=1.0)) == {"moe::plan"}
    layer = make(device).requires_grad_(False)
    assert torch.equal(layer(x), layer(x, return_routing=True)[0])


def test_second_experts_are_dropped_at_random_whoever_asks(device):
    torch.manual_seed(0)
    layer = MoE(H, I, E, 2, selection="top2_gshard", second_expert_policy="random", device=device)
    x, outputs = randn(T, H, device=device), []
    for return_routing in (True, False):
        torch.manual_seed(0)
        output = layer(x, return_routing=return_routing)
        outputs.append(output[0] if return_routing else output)
    assert torch.equal(*outputs)
    assert not torch.equal(outputs[0], layer.eval()(x))


def test_leading_dimensions_are_kept(device):
    layer, x = make(device), randn(2, 3, 4, H, device=device)
    assert torch.equal(layer(x), layer(x.view(-1, H)).view(x.shape))
    assert torch.equal(layer(x[0, 0, 0]), layer(x.view(-1, H)[:1])[0])
    assert layer(x[:0]).shape == (0, 3, 4, H)


def test_non_contiguous_input(device):
    layer, x = make(device), randn(H, 3, 5, device=device).permute(2, 1, 0)
    assert torch.equal(layer(x), layer(x.contiguous()))


def test_no_tokens_give_zero_gradients(device):
    layer = make(device, bias=True, num_shared_experts=1)
    layer(randn(0, H, device=device)).sum().backward()
    assert all((parameter.grad == 0).all() for parameter in layer.parameters())


def test_routing_record(device):
    layer, x = make(device), randn(2, T, H, device=device)
    output, routing = layer(x, return_routing=True)
    assert torch.equal(output, layer(x))
    assert isinstance(routing, Routing)
    assert routing._fields == ("router_logits", "topk_ids", "topk_weights", "tokens_per_expert")
    logits, weights, ids = layer.router(x.view(-1, H))
    assert torch.equal(routing.router_logits, logits)
    assert torch.equal(routing.topk_weights, weights)
    assert torch.equal(routing.topk_ids, ids)
    assert torch.equal(routing.tokens_per_expert, ids.flatten().bincount(minlength=E).int())
    assert routing.router_logits.requires_grad


@pytest.mark.parametrize("factor", [0.3, 1.0, 1.25, 10.0])
def test_capacity(factor, device):
    layer, x = make(device, capacity_factor=factor), randn(T, H, device=device)
    capacity = math.ceil(factor * T * K / E)
    assert layer.capacity(T) == capacity
    load = layer(x, return_routing=True)[1].tokens_per_expert
    unlimited = make(device)(x, return_routing=True)[1].tokens_per_expert
    assert torch.equal(load, unlimited.clamp(max=capacity))


def test_a_token_without_any_expert_is_zero(device):
    """All tokens are equal: capacity keeps the first, the last ones get nothing."""
    x = randn(1, H, device=device).expand(T, H)
    output = make(device, capacity_factor=0.3)(x)
    kept = math.ceil(0.3 * T * K / E)
    assert (output[kept:] == 0).all()
    # Within the tolerance: an expert with fewer rows may take another kernel.
    assert_close(output[:kept], make(device)(x)[:kept].double(), H, E, H, 1, I, K)


@pytest.mark.parametrize(
    ("options", "width"),
    [({"num_shared_experts": 2}, 2 * I), ({"shared_intermediate_size": 11}, 11)],
    ids=["number", "size"],
)
def test_shared_experts_are_added(options, width, device):
    layer, x = make(device, **options), randn(2, T, H, device=device)
    plain = make(device)
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if not k.startswith("shared_experts")})
    assert isinstance(layer.shared_experts, DenseFFN)
    assert layer.shared_experts.down_proj.in_features == width
    assert torch.equal(layer(x), plain(x) + layer.shared_experts(x))
    assert plain.shared_experts is None


@pytest.mark.parametrize(("activation", "halves"), [("swiglu", 2), ("relu2", 1)])
def test_dense_ffn(activation, halves, device):
    torch.manual_seed(0)
    ffn = DenseFFN(H, I, activation=activation, bias=True, device=device, dtype=torch.float64)
    assert ffn.gate_up_proj.weight.shape == (halves * I, H)
    x = randn(3, 4, H, dtype=torch.float64, device=device)
    expected = ffn.down_proj(reference.activation(ffn.gate_up_proj(x), activation))
    assert_close(ffn(x), expected, H, 1, I)
    assert activation in repr(ffn)
    before = ffn.down_proj.weight.detach().clone()
    ffn.reset_parameters()
    assert not torch.equal(ffn.down_proj.weight, before)


def test_parameters_of_gpt_oss_reach_all_experts(device):
    """alpha, limit, up_offset and the interleaved layout hold for the shared experts as well."""
    options = {"gate_layout": "interleaved", "alpha": 1.702, "limit": 7.0, "up_offset": 1.0}
    layer = make(device, num_shared_experts=1, bias=True, **options)
    for part in (layer.experts, layer.shared_experts):
        assert {name: getattr(part, name) for name in options} == options


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_shared_experts": -1}, "MoE: num_shared_experts must not be negative, got -1"),
        ({"num_shared_experts": 1, "shared_intermediate_size": 8}, "MoE: give either .*, got 1 and 8"),
        ({"shared_intermediate_size": 0}, "MoE: give either .*, got 0 and 0"),
        (
            {"capacity_factor": 0.0},
            "RouterConfig: capacity_factor must be positive and finite, or None for no limit, got 0.0",
        ),
        ({"capacity_factor": math.inf}, "RouterConfig: capacity_factor must be positive and finite, .* got inf"),
        ({"top_k": 6}, "RouterConfig: top_k must be in"),
        ({"activation": "tanh"}, "ExpertsConfig: activation must be in"),
    ],
)
def test_refused(change, message):
    with pytest.raises(ValueError, match=message):
        MoE(**{"hidden_size": H, "intermediate_size": I, "num_experts": E, "top_k": K, **change})


def test_wrong_width_names_both_sizes(device):
    with pytest.raises(RuntimeError, match=r"(?s)36.*37"):
        make(device)(randn(T, H - 1, device=device))
