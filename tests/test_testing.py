"""torch_moe.testing: the named shapes and routings are what their names say, the tolerance can fail."""

import math

import pytest
import torch
from helpers import randn

from torch_moe.testing import ROUTINGS, SHAPES, assert_close, routing, tolerance


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", ROUTINGS)
def test_routings_choose_distinct_experts_by_their_seed(name, shape):
    sizes = (shape.num_tokens, shape.num_experts, shape.top_k)
    ids = routing(name, *sizes)
    assert ids.dtype == torch.int32
    assert ids.shape == (shape.num_tokens, shape.top_k)
    assert all(len(set(row)) == shape.top_k and set(row) <= set(range(shape.num_experts)) for row in ids.tolist())
    assert torch.equal(ids, routing(name, *sizes))
    if name != "one_expert" and ids.numel() > 100 and shape.top_k < shape.num_experts:
        assert not torch.equal(ids, routing(name, *sizes, seed=1))


def test_loads_of_the_routings():
    """4000 tokens, one choice each: uniform within five standard deviations, zipf falling like 1 / (e + 1)."""
    load = {name: routing(name, 4000, 8, 1).flatten().bincount(minlength=8).double() for name in ROUTINGS}
    assert (load["uniform"] - 500).abs().max() < 5 * math.sqrt(4000 * 1 / 8 * 7 / 8)
    odds = 1 / torch.arange(1, 9, dtype=torch.float64)
    expected = 4000 * odds / odds.sum()
    assert ((load["zipf"] - expected).abs() < 5 * expected.sqrt()).all()
    assert load["one_expert"].tolist() == [0] * 7 + [4000]


def test_unknown_routing_is_refused():
    with pytest.raises(ValueError, match=r"routing: name must be in .*got 'skewed'"):
        routing("skewed", 4, 4, 2)


def test_shapes_are_what_their_names_say():
    empty, takes_all, unaligned = (SHAPES[name] for name in ("empty_expert", "one_expert_takes_all", "unaligned"))
    assert empty.num_tokens * empty.top_k < empty.num_experts
    assert takes_all.top_k == 1
    assert all(size % 2 for size in unaligned)
    assert SHAPES["top_k_equals_num_experts"].top_k == SHAPES["top_k_equals_num_experts"].num_experts
    assert (SHAPES["single_token"].num_tokens, SHAPES["no_tokens"].num_tokens) == (1, 0)
    assert SHAPES["many_experts_2048"].num_experts == 2048


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_tolerance_grows_with_eps_length_and_steps(dtype):
    eps = torch.finfo(dtype).eps
    assert eps < tolerance(dtype, 1) < tolerance(dtype, 100) < tolerance(dtype, 100, 100)
    assert tolerance(dtype) == 0
    accumulator = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    assert tolerance(dtype, 10_000) == pytest.approx(eps + 100 * accumulator)


def test_assert_close_tells_right_from_wrong():
    expected = randn(8, 8, dtype=torch.float64)
    assert_close(expected.float(), expected, 1)
    wrong = expected.float()
    wrong[3, 4] += 3 * tolerance(torch.float32, 1) * expected.abs().max().item()
    with pytest.raises(AssertionError, match="times the tolerance"):
        assert_close(wrong, expected, 1)
    wrong[3, 4] = torch.nan
    with pytest.raises(AssertionError, match="error nan"):
        assert_close(wrong, expected, 1)
    with pytest.raises(AssertionError, match=r"shape \[7, 8\] instead of \[8, 8\]"):
        assert_close(wrong[1:], expected, 1)
    with pytest.raises(AssertionError, match="inf times"):
        assert_close(torch.ones(2), torch.zeros(2, dtype=torch.float64), 1)
    assert_close(torch.ones(0), torch.ones(0, dtype=torch.float64), 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_itself_is_within_the_tolerance(dtype):
    """Rounding errors of a long product by an implementation that is not ours, and not by much less than allowed."""
    a, b = randn(64, 4096, dtype=dtype), randn(4096, 64, dtype=dtype, seed=1)
    expected = a.double() @ b.double()
    assert_close(a @ b, expected, 4096)
    error = ((a @ b).double() - expected).abs().max() / expected.abs().max()
    assert error > tolerance(dtype, 4096) / 1000
