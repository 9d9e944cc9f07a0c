"""grouped_gemm: product, dgrad, wgrad and bgrad on every instruction set, empty experts, and its errors."""

import itertools

import pytest
import torch
from helpers import ALL_DTYPES, DTYPES, check_against_reference, make_plan, randn

from torch_moe import ops, reference
from torch_moe.testing import ROUTINGS, SHAPES, assert_close


def inputs(shape, dtype, device, weight_layout="out_in", bias=False):
    num_rows, width = shape.num_tokens * shape.top_k, 2 * shape.intermediate_size
    weight = randn(shape.num_experts, width, shape.hidden_size, dtype=dtype, device=device, seed=1)
    case = {
        "rows": randn(num_rows, shape.hidden_size, dtype=dtype, device=device),
        "weight": weight.transpose(1, 2).contiguous() if weight_layout == "in_out" else weight,
    }
    if bias:
        case["bias"] = randn(shape.num_experts, width, dtype=dtype, device=device, seed=2)
    return case


def check(shape, dtype, device, plan, weight_layout="out_in", bias=False):
    options = {"expert_offsets": plan.expert_offsets, "weight_layout": weight_layout}
    num_rows = shape.num_tokens * shape.top_k
    lengths = {"output": (shape.hidden_size,), "rows": (2 * shape.intermediate_size,), "weight": (num_rows,)}
    if bias:
        lengths["bias"] = (num_rows,)
    check_against_reference(
        lambda **tensors: ops.grouped_gemm(**tensors, **options),
        lambda **tensors: reference.grouped_gemm(**tensors, **options),
        inputs(shape, dtype, device, weight_layout, bias),
        lengths,
        dtype,
    )


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("weight_layout", ["out_in", "in_out"])
@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_the_reference(shape, dtype, weight_layout, bias, device):
    check(shape, dtype, device, make_plan(shape, "zipf", device), weight_layout, bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_named_routings(shape, name, dtype, device):
    check(shape, dtype, device, make_plan(shape, name, device))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("weight_layout", ["out_in", "in_out"])
@pytest.mark.parametrize("rows_per_expert", [*range(1, 18), 31, 33, 64, 65])
def test_every_tile_remainder(rows_per_expert, weight_layout, device):
    """Each number of rows an expert may have up to some tiles, with widths that fill no vector."""
    shape = SHAPES["unaligned"]._replace(num_tokens=rows_per_expert, num_experts=1, top_k=1)
    for dtype in DTYPES:
        check(shape, dtype, device, make_plan(shape, device=device), weight_layout, bias=True)


@pytest.mark.parametrize("weight_layout", ["out_in", "in_out"])
def test_expert_without_rows_gets_a_zero_gradient(weight_layout, device):
    shape = SHAPES["empty_expert"]
    plan = make_plan(shape, device=device)
    case = {name: t.requires_grad_() for name, t in inputs(shape, torch.float32, device, weight_layout, True).items()}
    ops.grouped_gemm(**case, expert_offsets=plan.expert_offsets, weight_layout=weight_layout).sum().backward()
    empty = plan.tokens_per_expert == 0
    assert empty.any()
    for name in ("weight", "bias"):
        assert (case[name].grad[empty] == 0).all()
        assert (case[name].grad[~empty] != 0).any(dim=-1).all()


def test_rows_past_the_last_expert_are_neither_read_nor_kept(device):
    shape = SHAPES["unaligned"]
    case = inputs(shape, torch.float32, device, bias=True)
    offsets = torch.tensor([0, 10, 10, 25, 31, 40], dtype=torch.int32, device=device)
    case["rows"][40:] = torch.nan
    leaves = {name: tensor.requires_grad_() for name, tensor in case.items()}
    output = ops.grouped_gemm(**leaves, expert_offsets=offsets)
    assert (output[40:] == 0).all()
    output.sum().backward()
    assert output.isfinite().all()
    assert (case["rows"].grad[40:] == 0).all()
    assert case["weight"].grad.isfinite().all()


def test_offsets_out_of_range_are_clamped(device):
    """Offsets may come from anywhere; none may lead out of bounds."""
    shape = SHAPES["unaligned"]
    case = inputs(shape, torch.float32, device)
    wild = torch.tensor([-5, 10, 4, 2**31 - 1, 60, -1], dtype=torch.int32, device=device)
    tame = torch.tensor([0, 10, 10, 57, 57, 57], dtype=torch.int32, device=device)
    assert torch.equal(ops.grouped_gemm(**case, expert_offsets=wild), ops.grouped_gemm(**case, expert_offsets=tame))


def test_only_the_gradients_asked_for_are_computed(device):
    shape = SHAPES["unaligned"]
    offsets = make_plan(shape, device=device).expert_offsets
    backward_ops = {"rows": "grouped_gemm", "weight": "grouped_gemm_wgrad", "bias": "grouped_gemm_bgrad"}
    for wanted in backward_ops:
        case = inputs(shape, torch.float32, device, bias=True)
        case[wanted].requires_grad_()
        output = ops.grouped_gemm(**case, expert_offsets=offsets)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            output.sum().backward()
        called = {event.key for event in profile.key_averages() if event.key.startswith("moe::")}
        assert called == {f"moe::{backward_ops[wanted]}"}


def test_non_contiguous_inputs(device):
    shape = SHAPES["unaligned"]
    offsets = make_plan(shape, device=device).expert_offsets
    rows, weight = randn(37, 57, device=device).T, randn(5, 37, 106, device=device).transpose(1, 2)
    expected = ops.grouped_gemm(rows.contiguous(), weight.contiguous(), offsets)
    assert torch.equal(ops.grouped_gemm(rows, weight, offsets), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_all_operands(dtype, device):
    shape = SHAPES["unaligned"]
    offsets = make_plan(shape, device=device).expert_offsets
    case = inputs(shape, torch.float32, device, bias=True)
    with torch.autocast(device.type, dtype=dtype):
        output = ops.grouped_gemm(**case, expert_offsets=offsets)
    cast = {name: tensor.to(dtype) for name, tensor in case.items()}
    assert torch.equal(output, ops.grouped_gemm(**cast, expert_offsets=offsets))


ROWS, WEIGHT = randn(57, 37), randn(5, 106, 37)
OFFSETS, BIAS = make_plan(SHAPES["unaligned"]).expert_offsets, randn(5, 106)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((ROWS.int(), WEIGHT, OFFSETS), "grouped_gemm: rows must be float32, bfloat16, float16 or float64, got int32"),
        ((ROWS[0], WEIGHT, OFFSETS), r"grouped_gemm: rows must have 2 dimensions .*got shape \[37\]"),
        ((ROWS, WEIGHT[0], OFFSETS), r"grouped_gemm: weight must have 3 dimensions .*got shape \[106, 37\]"),
        ((ROWS, WEIGHT.half(), OFFSETS), r"grouped_gemm: weight must be float32, got float16 \(call \.float\(\)\)"),
        ((ROWS, WEIGHT[..., 1:], OFFSETS), r"grouped_gemm: weight must .*37.*got .*36"),
        ((ROWS, WEIGHT, OFFSETS[1:]), r"grouped_gemm: weight must have shape \[4, 106, 37\].*got \[5, 106, 37\]"),
        ((ROWS, WEIGHT, OFFSETS.long()), r"grouped_gemm: expert_offsets must be int32, got int64 \(call \.int\(\)\)"),
        ((ROWS, WEIGHT, OFFSETS, BIAS[1:]), r"grouped_gemm: bias must have shape \[5, 106\].*got \[4, 106\]"),
        ((ROWS, WEIGHT, OFFSETS, BIAS.half()), "grouped_gemm: bias must be float32, got float16"),
        ((ROWS, WEIGHT, OFFSETS, None, "nk"), "grouped_gemm: weight_layout must be one of .*out_in.*got 'nk'"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(RuntimeError, match=message):
        ops.grouped_gemm(*arguments)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n"), [(768, 2048), (769, 2050)], ids=["whole_lines", "odd"])
def test_large_weight_gradients_pass_the_caches(m, n, dtype, device):
    rows, offsets = 320, torch.tensor([0, 5, 5, 320], dtype=torch.int32, device=device)  # one row block, none, two
    lhs, rhs = randn(rows, m, dtype=dtype, device=device, seed=1), randn(rows, n, dtype=dtype, device=device, seed=2)
    grad = torch.ops.moe.grouped_gemm_wgrad(lhs, rhs, offsets)
    assert grad.nbytes > 8 << 20
    assert_close(grad[0], lhs[:5].double().T @ rhs[:5].double(), 5)
    assert not grad[1].any()
    assert_close(grad[2], lhs[5:].double().T @ rhs[5:].double(), 315)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("weight_layout", ["out_in", "in_out"])
@pytest.mark.parametrize("k", [1184, 1190], ids=["whole_steps", "odd"])
def test_sums_in_several_blocks(k, weight_layout, dtype, device):
    sizes, n = (1, 3, 7, 24, 130), 40  # rows of one tile, two, many, and of panels
    offsets = torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32, device=device)
    rows = randn(sum(sizes), k, dtype=dtype, device=device, seed=1)
    weight = randn(len(sizes), n, k, dtype=dtype, device=device, seed=2)
    stored = weight.transpose(1, 2).contiguous() if weight_layout == "in_out" else weight
    output = ops.grouped_gemm(rows, stored, offsets, weight_layout=weight_layout)
    for part, each, own in zip(output.split(sizes), rows.split(sizes), weight, strict=True):
        assert_close(part, each.double() @ own.double().T, k)
