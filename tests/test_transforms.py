"""torch.func and forward mode: what works gives the same, and what does not says so, where torch would say zero."""

import pytest
import torch
from helpers import randn
from samples import OPS, exchange_samples, samples
from torch.autograd import forward_ad

from torch_moe import MoE, ops

T, H, I, E, K = 7, 16, 24, 5, 2  # noqa: E741

# torch's forward mode loads its formulas through torch.jit; which kind of warning that gives is its version's.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script")

# Operators that are or have a gradient: the others read ids, write bytes, or are refused to requires_grad.
DIFFERENTIABLE = [op for op in OPS if torch._C._dispatch_has_kernel_for_dispatch_key(f"moe::{op}", "Autograd")]


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return MoE(H, I, E, K, num_shared_experts=1)


def test_every_derivative_is_registered_where_it_is_refused():
    gradients = {"route", "permute", "grouped_gemm", "activation", "combine", "experts", "ep_experts"}
    assert gradients < set(DIFFERENTIABLE)
    assert all(op in gradients or op.endswith(("_backward", "_wgrad", "_bgrad")) for op in DIFFERENTIABLE)


@pytest.mark.parametrize("op", DIFFERENTIABLE)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_forward_mode_is_refused(op, requires_grad, group):
    """Also where nothing requires a gradient: there torch would drop the tangent."""
    args, options = (exchange_samples() if op.startswith("ep_") else samples())[op][0]

    def dual(arg):
        if not torch.is_tensor(arg) or not arg.is_floating_point():
            return arg
        return forward_ad.make_dual(arg.detach().requires_grad_(requires_grad), torch.ones_like(arg))

    with (
        forward_ad.dual_level(),
        pytest.raises(RuntimeError, match=rf"^{op}: forward-mode .* not supported \(use back"),
    ):
        getattr(torch.ops.moe, op)(*map(dual, args), **options)


def test_forward_mode_is_refused_of_experts_that_plan_by_themselves(layer):
    x, ids = randn(T, H), torch.zeros(T, K, dtype=torch.int32)
    weights = [parameter.detach() for parameter in (layer.experts.gate_up_proj, layer.experts.down_proj)]
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=r"^experts: forward-mode"):
        ops.experts(forward_ad.make_dual(x, x), *weights, torch.ones(T, K), ids)


def test_forward_mode_beside_the_operators_is_left_alone(layer):
    x = randn(T, H)
    expected = layer(x)
    with forward_ad.dual_level():
        forward_ad.make_dual(x, x)
        assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("transform", ["grad", "vjp", "jacrev", "jvp", "jacfwd", "hessian", "vmap(grad)"])
def test_derivatives_of_torch_func_are_refused(layer, transform):
    def loss(x):
        return layer(x).sum()

    x = randn(T, H)
    calls = {
        "jvp": lambda: torch.func.jvp(loss, (x,), (x,)),
        "vjp": lambda: torch.func.vjp(loss, x),
        "vmap(grad)": lambda: torch.func.vmap(torch.func.grad(loss))(x.unsqueeze(0)),
    }
    refused = (
        r"^route: (forward-mode|torch\.func\.grad, vjp and jacrev) .*not supported \(use backward or torch.autograd"
    )
    with pytest.raises(RuntimeError, match=refused):
        calls.get(transform, lambda: getattr(torch.func, transform)(loss)(x))()


def test_a_layer_that_is_a_constant_of_the_derivative_works(layer):
    x, y = randn(T, H), randn(T, H)
    assert torch.equal(torch.func.grad(lambda y: (layer(x) * y).sum())(y), layer(x))


def test_functional_call_has_gradients(layer):
    x = randn(T, H)
    parameters = {name: parameter.detach().clone().requires_grad_() for name, parameter in layer.named_parameters()}
    torch.func.functional_call(layer, parameters, (x,)).square().sum().backward()
    layer(x).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert torch.equal(parameters[name].grad, parameter.grad)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # torch calls the operators in a loop
def test_vmap_is_a_loop(layer):
    batch = randn(3, T, H)
    torch.testing.assert_close(torch.func.vmap(layer)(batch), torch.stack([layer(x) for x in batch]))
    ids = torch.randint(0, E, (3, T, K), dtype=torch.int32)
    rows = torch.func.vmap(lambda ids: ops.plan(ids, E).slot_to_row)(ids)
    assert torch.equal(rows, torch.stack([ops.plan(each, E).slot_to_row for each in ids]))
