"""activation: every nonlinearity and gate layout with its gradient, and its errors."""

import pytest
import torch
from helpers import ALL_DTYPES, check_against_reference, randn

from torch_moe import ops, reference
from torch_moe.ops.activation import GATED_ACTIVATIONS, UNGATED_ACTIVATIONS

GPT_OSS = {"alpha": 1.702, "limit": 7.0, "up_offset": 1.0}
VARIANTS = {
    **{f"{name}-{layout}": (name, {"gate_layout": layout})
       for name in GATED_ACTIVATIONS for layout in ("concat", "interleaved")},
    **{name: (name, {}) for name in UNGATED_ACTIVATIONS},
    "gpt_oss": ("swiglu", {"gate_layout": "interleaved", **GPT_OSS}),
    "clamped": ("swiglu", {"limit": 0.5}),
}  # fmt: skip


def check(activation, options, pre_activation):
    check_against_reference(
        lambda pre_activation: ops.activation(pre_activation, activation, **options),
        lambda pre_activation: reference.activation(pre_activation, activation, **options),
        {"pre_activation": pre_activation},
        # Elementwise steps: the exponential's argument and the product; with the slope's, and the output gradient's.
        {"output": (1, 1), "pre_activation": (1, 1, 1)},
        pre_activation.dtype,
    )


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize(("activation", "options"), VARIANTS.values(), ids=VARIANTS)
def test_equals_the_reference(activation, options, dtype, device):
    """75 columns per half: whole vectors and a remainder."""
    check(activation, options, 3 * randn(23, 150, dtype=dtype, device=device))


@pytest.mark.parametrize("activation", [ops.activation, reference.activation])
def test_the_limit_itself_is_not_cut_off(activation, device):
    """In bf16 many values lie on it, and torch's own clamp changed its mind about them."""
    pre_activation = torch.tensor([[0.5, 0.25, 0.25, 0.5, 0.25, -0.5]], device=device).requires_grad_()
    activation(pre_activation, "swiglu", limit=0.5).sum().backward()
    assert (pre_activation.grad != 0).all()


@pytest.mark.parametrize("num_rows", [0, 1])
@pytest.mark.parametrize(("activation", "options"), VARIANTS.values(), ids=VARIANTS)
def test_no_and_one_row(activation, options, num_rows, device):
    check(activation, options, randn(num_rows, 6, device=device))


@pytest.mark.parametrize(("activation", "options"), VARIANTS.values(), ids=VARIANTS)
def test_large_values_stay_finite(activation, options, device):
    """exp of these overflows fp32; gates of both signs in either layout."""
    values = torch.tensor([-1e4, -90.0, -88.0, 0.0, 88.0, 90.0, 1e4, 1.0], device=device)
    check(activation, options, torch.stack([values, -values, values.roll(1)]))


def test_clamp_has_no_gradient_outside(device):
    """limit = 1: the gate is bounded above only, the up value on both sides."""
    gate, up = [2.0, -2.0, 0.5, 0.5], [0.5, 0.5, 2.0, -2.0]
    pre_activation = torch.tensor([gate + up], device=device, requires_grad=True)
    ops.activation(pre_activation, "swiglu", limit=1.0).sum().backward()
    grad_gate, grad_up = pre_activation.grad.chunk(2, dim=-1)
    assert (grad_gate == 0).tolist() == [[True, False, False, False]]
    assert (grad_up == 0).tolist() == [[False, False, True, True]]


def test_non_contiguous(device):
    x = randn(10, 6, device=device).T
    assert torch.equal(ops.activation(x), ops.activation(x.contiguous()))


X = torch.zeros(4, 7)


@pytest.mark.parametrize(
    ("pre_activation", "activation", "options", "message"),
    [
        (X.int(), "silu", {}, "activation: pre_activation must be float32, bfloat16, float16 or float64, got int32"),
        (X[0], "silu", {}, r"activation: pre_activation must have 2 dimensions .*got shape \[7\]"),
        (X, "swiglu", {}, "activation: pre_activation must .*even.*got .*7"),
        (X, "tanh", {}, "activation: activation must be one of .*'swiglu'.*got 'tanh'"),
        (X[:, :6], "swiglu", {"gate_layout": "mixed"}, "activation: gate_layout must be one of .*got 'mixed'"),
        (X[:, :6], "swiglu", {"limit": -1.0}, "activation: limit must .*got -1"),
    ],
)
def test_errors(pre_activation, activation, options, message):
    with pytest.raises(RuntimeError, match=message):
        ops.activation(pre_activation, activation, **options)
