"""experts: the fused operator against the stages it stands for, output and every gradient."""

import pytest
import torch
from helpers import ALL_DTYPES, DTYPES, check_against_reference, expert_inputs, make_plan, randn, run

from torch_moe import ops, reference
from torch_moe.ops.activation import is_gated
from torch_moe.testing import ROUTINGS, SHAPES, Shape, assert_close, routing

UNALIGNED = SHAPES["unaligned"]


def lengths(shape, bias):
    """The steps of ``torch_moe.testing.tolerance``, from the formulas in cpp/include/moe/experts.h."""
    num_rows = shape.num_tokens * shape.top_k
    hidden, intermediate = shape.hidden_size, shape.intermediate_size
    grad_pre_activation = (hidden, hidden, 1)  # H_r and P_r, then elementwise
    steps = {
        "output": (hidden, 1, intermediate, shape.top_k),
        "hidden_states": (*grad_pre_activation, 2 * intermediate, shape.top_k),
        "gate_up_proj": (*grad_pre_activation, num_rows),
        "down_proj": (hidden, 1, num_rows),
        "topk_weights": (hidden, hidden, 1, intermediate),
    }
    if bias:
        steps |= {"gate_up_bias": (*grad_pre_activation, num_rows), "down_bias": (num_rows,)}
    return steps


def check(shape, dtype, device, plan, *, bias=False, weight_layout="out_in", recompute=False, **options):
    options["weight_layout"] = weight_layout
    gated = is_gated(options.get("activation", "swiglu"))
    check_against_reference(
        lambda **tensors: ops.experts(**tensors, plan=plan, recompute=recompute, **options),
        lambda **tensors: reference.experts(**tensors, plan=plan, **options),
        expert_inputs(shape, dtype, device, gated=gated, bias=bias, weight_layout=weight_layout),
        lengths(shape, bias),
        dtype,
    )


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("weight_layout", ["out_in", "in_out"])
@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_the_reference(shape, dtype, weight_layout, device):
    check(shape, dtype, device, make_plan(shape, "zipf", device), weight_layout=weight_layout)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_named_routings(shape, name, dtype, device):
    check(shape, dtype, device, make_plan(shape, name, device))


ACTIVATIONS = [
    *({"activation": name} for name in ("swiglu", "geglu", "geglu_tanh", "reglu")),
    *({"activation": name, "gate_layout": "interleaved"} for name in ("swiglu", "geglu", "geglu_tanh", "reglu")),
    *({"activation": name} for name in ("silu", "gelu", "gelu_tanh", "relu", "relu2")),
    {"activation": "swiglu", "gate_layout": "interleaved", "alpha": 1.702, "limit": 7.0, "up_offset": 1.0},
]


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("weight_layout", ["out_in", "in_out"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", ACTIVATIONS, ids=lambda options: "-".join(map(str, options.values())))
def test_activations_layouts_and_biases(options, dtype, weight_layout, bias, device):
    check(
        UNALIGNED,
        dtype,
        device,
        make_plan(UNALIGNED, "zipf", device),
        bias=bias,
        weight_layout=weight_layout,
        **options,
    )


def test_clamp(device):
    """fp32 only: where storing H in less moves it across the limit, the gradient rightly jumps.

    test_activation has the clamp in every dtype.
    """
    check(UNALIGNED, torch.float32, device, make_plan(UNALIGNED, "zipf", device), bias=True, limit=0.5)


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("name", ["several_tiles", "unaligned", "empty_expert", "no_tokens"])
def test_recompute(name, dtype, device):
    check(SHAPES[name], dtype, device, make_plan(SHAPES[name], "zipf", device), bias=True, recompute=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_stages(dtype, device):
    """The same result from the five operators that this one fuses, up to the rounding of what they store."""
    shape = SHAPES["several_tiles"]
    plan = make_plan(shape, "zipf", device)

    def stages(hidden_states, gate_up_proj, down_proj, topk_weights):
        rows = ops.permute(hidden_states, plan)
        rows = ops.activation(ops.grouped_gemm(rows, gate_up_proj, plan.expert_offsets))
        return ops.combine(ops.grouped_gemm(rows, down_proj, plan.expert_offsets), topk_weights, plan)

    inputs = expert_inputs(shape, dtype, device)
    fused, staged = run(lambda **tensors: ops.experts(**tensors, plan=plan), inputs), run(stages, inputs)
    for name, steps in lengths(shape, bias=False).items():
        assert_close(fused[name], staged[name].double(), *steps, *steps, dtype=dtype)  # both sides round


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropped_slots(dtype, device):
    """By capacity and by ids of other ranks; the gradient of a dropped slot's weight is zero."""
    ids = routing("zipf", 19, 5, 3)
    ids[4, 1], ids[7, 0] = -1, 5
    plan = ops.plan(ids.to(device), 5, capacity=6)
    check(UNALIGNED, dtype, device, plan, bias=True)
    inputs = expert_inputs(UNALIGNED, dtype, device)
    result = run(lambda **tensors: ops.experts(**tensors, plan=plan), inputs)
    assert (result["topk_weights"][plan.slot_to_row < 0] == 0).all()


def test_all_slots_dropped(device):
    plan = ops.plan(torch.full((19, 3), -1, dtype=torch.int32, device=device), 5)
    inputs = expert_inputs(UNALIGNED, torch.float32, device, bias=True)
    for value in run(lambda **tensors: ops.experts(**tensors, plan=plan), inputs).values():
        assert (value == 0).all()


def test_expert_without_rows_gets_a_zero_gradient(device):
    shape = SHAPES["empty_expert"]
    plan = make_plan(shape, device=device)
    inputs = expert_inputs(shape, torch.float32, device, bias=True)
    result = run(lambda **tensors: ops.experts(**tensors, plan=plan), inputs)
    empty = plan.tokens_per_expert == 0
    for name in ("gate_up_proj", "down_proj", "gate_up_bias", "down_bias"):
        assert (result[name][empty] == 0).all()
        assert (result[name][~empty] != 0).flatten(1).any(dim=1).all()


def test_each_gradient_alone_is_the_same(device):
    plan = make_plan(UNALIGNED, device=device)
    inputs = expert_inputs(UNALIGNED, torch.float32, device, bias=True)
    together = run(lambda **tensors: ops.experts(**tensors, plan=plan), inputs)
    for name, tensor in inputs.items():
        rest = {other: value for other, value in inputs.items() if other != name}
        alone = run(lambda **leaf: ops.experts(**leaf, **rest, plan=plan), {name: tensor})  # noqa: B023
        assert torch.equal(alone[name], together[name])


def test_unneeded_gradients_are_not_computed(device):
    plan = make_plan(UNALIGNED, device=device)
    inputs = expert_inputs(UNALIGNED, torch.float32, device, bias=True)
    options = dict.fromkeys(("activation", "gate_layout", "weight_layout", "alpha", "limit", "up_offset"))
    options |= {
        "activation": "swiglu",
        "gate_layout": "concat",
        "weight_layout": "out_in",
        "alpha": 1.0,
        "up_offset": 0.0,
        "row_invariant": False,
    }
    biases = inputs.pop("gate_up_bias"), inputs.pop("down_bias")
    hidden_states, gate_up_proj, down_proj, topk_weights = inputs.values()
    pre_activation = torch.ops.moe.experts(*inputs.values(), *plan, *biases)[1]
    flags = ("needs_hidden_states", "needs_projections", "needs_topk_weights", "needs_biases")
    outputs_of = {
        "needs_hidden_states": [0],
        "needs_projections": [1, 2],
        "needs_topk_weights": [3],
        "needs_biases": [4, 5],
    }
    for wanted in flags:
        grads = torch.ops.moe.experts_backward(
            hidden_states, hidden_states, pre_activation, gate_up_proj, down_proj, topk_weights, *plan, *biases,
            **options, **{flag: flag == wanted for flag in flags},
        )  # fmt: skip
        assert [i for i, grad in enumerate(grads) if grad.shape != (0,)] == outputs_of[wanted]


@pytest.mark.parametrize("weight_layout", ["out_in", "in_out"])
def test_non_contiguous_inputs(weight_layout, device):
    plan = make_plan(UNALIGNED, device=device)
    inputs = expert_inputs(UNALIGNED, torch.float32, device, weight_layout=weight_layout)
    strided = {name: tensor.transpose(-1, -2).contiguous().transpose(-1, -2) for name, tensor in inputs.items()}
    assert not any(tensor.is_contiguous() for tensor in strided.values())
    options = {"plan": plan, "weight_layout": weight_layout}
    assert torch.equal(ops.experts(**strided, **options), ops.experts(**inputs, **options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_all_but_the_weights_of_the_sum(dtype, device):
    plan = make_plan(UNALIGNED, device=device)
    inputs = expert_inputs(UNALIGNED, torch.float32, device, bias=True)
    with torch.autocast(device.type, dtype=dtype):
        result = run(lambda **tensors: ops.experts(**tensors, plan=plan), inputs)
    cast = {name: tensor if name == "topk_weights" else tensor.to(dtype) for name, tensor in inputs.items()}
    expected = run(lambda **tensors: ops.experts(**tensors, plan=plan), cast)
    for name, value in result.items():
        assert torch.equal(value.to(expected[name].dtype), expected[name])
        assert value.dtype == (dtype if name == "output" else torch.float32)


PLAN = make_plan(UNALIGNED)
GOOD = expert_inputs(UNALIGNED, torch.float32, "cpu", bias=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_states": GOOD["hidden_states"].int()}, "experts: hidden_states must be float32, .*got int32"),
        ({"hidden_states": randn(37)}, r"experts: hidden_states must have 2 dimensions .*got shape \[37\]"),
        ({"hidden_states": randn(18, 37)}, "experts: .* must .*18"),
        ({"gate_up_proj": randn(106, 37)}, r"experts: gate_up_proj must have 3 dimensions .*got shape \[106, 37\]"),
        ({"gate_up_proj": randn(5, 106, 36)}, "experts: gate_up_proj must .*37.*got .*36"),
        ({"gate_up_proj": randn(5, 105, 37)}, "experts: gate_up_proj must .*got .*105"),
        ({"gate_up_proj": randn(5, 106, 37).half()}, r"experts: gate_up_proj must be float32, got float16 \(call"),
        ({"down_proj": randn(5, 37, 52)}, r"experts: gate_up_proj must have shape \[5, 104, 37\].*got \[5, 106, 37\]"),
        ({"topk_weights": randn(19, 2)}, r"experts: topk_weights must have shape \[19, 3\].*got \[19, 2\]"),
        ({"topk_weights": randn(19, 3).half()}, "experts: topk_weights must be float32, got float16"),
        ({"gate_up_bias": randn(5, 53)}, r"experts: gate_up_bias must have shape \[5, 106\].*got \[5, 53\]"),
        ({"down_bias": randn(4, 37)}, r"experts: down_bias must have shape \[5, 37\].*got \[4, 37\]"),
        (
            {"plan": PLAN._replace(expert_offsets=PLAN.expert_offsets[1:])},
            r"experts: down_proj must have shape \[4, 37, 53\].*got \[5,",
        ),
        ({"activation": "tanh"}, "experts: activation must be one of .*got 'tanh'"),
        ({"weight_layout": "nk"}, "experts: weight_layout must be one of .*got 'nk'"),
        ({"gate_layout": "mixed"}, "experts: gate_layout must be one of .*got 'mixed'"),
    ],
)
def test_errors(change, message):
    with pytest.raises(RuntimeError, match=message):
        ops.experts(**{**GOOD, "plan": PLAN, **change})


@pytest.mark.parametrize("weight_layout", ["out_in", "in_out"])
@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_row_invariant_parts_give_the_bits_of_the_whole(dtype, weight_layout, isa, device):
    """However few rows a part leaves an expert, and whichever kernel that would call for."""
    shape = Shape(num_tokens=150, hidden_size=96, intermediate_size=64, num_experts=3, top_k=2)
    inputs = expert_inputs(shape, dtype, device, weight_layout=weight_layout)
    ids = routing("uniform", shape.num_tokens, shape.num_experts, shape.top_k).to(device)
    grad = randn(shape.num_tokens, shape.hidden_size, dtype=dtype, device=device, seed=9)

    def part(begin, end):
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
        tokens, weights = leaves.pop("hidden_states"), leaves.pop("topk_weights")
        output = ops.experts(
            tokens[begin:end], topk_weights=weights[begin:end], plan=ops.plan(ids[begin:end], shape.num_experts),
            weight_layout=weight_layout, row_invariant=True, **leaves,
        )  # fmt: skip
        grads = torch.autograd.grad(output, (tokens, weights), grad[begin:end])
        return output, *(gradient[begin:end] for gradient in grads)

    whole = part(0, 150)
    for begin, end in ((0, 2), (2, 9), (9, 40), (40, 150)):
        for actual, expected in zip(part(begin, end), whole, strict=True):
            assert torch.equal(actual, expected[begin:end])


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("name", ROUTINGS)
def test_ids_in_place_of_a_plan_give_the_same_bits(name, dtype, bias, device):
    shape = UNALIGNED
    ids = routing(name, shape.num_tokens, shape.num_experts, shape.top_k).to(device)
    ids[0, 0] = -1  # a slot of no expert
    inputs = expert_inputs(shape, dtype, device, bias=bias)
    expected = ops.experts(**inputs, plan=ops.plan(ids, shape.num_experts))
    assert torch.equal(ops.experts(**inputs, plan=ids), expected)
    for row_invariant in (False, True):
        by_row = {"row_invariant": row_invariant}
        expected = ops.experts(**inputs, plan=ops.plan(ids, shape.num_experts), **by_row)
        assert torch.equal(ops.experts(**inputs, plan=ids, **by_row), expected)


@pytest.mark.parametrize("weight_layout", ["out_in", "in_out"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_ids_in_place_of_a_plan_equal_the_reference(shape, dtype, weight_layout, device):
    """Where they are few, a GPU has kernels for them that make no plan."""
    ids = routing("zipf", shape.num_tokens, shape.num_experts, shape.top_k).to(device)
    ids[::3, -1] = shape.num_experts  # slots of no expert
    inputs = expert_inputs(shape, dtype, device, bias=True, weight_layout=weight_layout)
    exact = {name: tensor.double() for name, tensor in inputs.items()}
    expected = reference.experts(**exact, plan=ops.plan(ids, shape.num_experts), weight_layout=weight_layout)
    output = ops.experts(**inputs, plan=ids, weight_layout=weight_layout)
    assert_close(output, expected, *lengths(shape, bias=True)["output"], dtype=dtype)


def test_ids_in_place_of_a_plan_are_differentiable(device):
    ids = routing("zipf", UNALIGNED.num_tokens, UNALIGNED.num_experts, UNALIGNED.top_k).to(device)
    inputs = expert_inputs(UNALIGNED, torch.float32, device, bias=True)
    made = ops.plan(ids, UNALIGNED.num_experts)
    by_plan = run(lambda **tensors: ops.experts(**tensors, plan=made), inputs)
    by_ids = run(lambda **tensors: ops.experts(**tensors, plan=ids), inputs)
    assert all(torch.equal(by_ids[name], expected) for name, expected in by_plan.items())


def test_ids_in_place_of_a_plan_are_checked(device):
    inputs = expert_inputs(UNALIGNED, torch.float32, device)
    ids = torch.zeros(UNALIGNED.num_tokens, UNALIGNED.top_k, dtype=torch.int32, device=device)
    with pytest.raises(RuntimeError, match=r"routed_experts: topk_ids must be int32, got int64 \(call .int\(\)\)"):
        ops.experts(**inputs, plan=ids.long())
    with pytest.raises(RuntimeError, match=r"routed_experts: topk_weights must have shape"):
        ops.experts(**inputs, plan=ids[1:])
