"""torch.library.opcheck on every operator that the library registers; one without a sample fails."""

import pytest
import torch
from helpers import expert_inputs, make_plan, randn

import torch_moe.distributed  # noqa: F401  # registers operators
from torch_moe import ops
from torch_moe.testing import SHAPES

SHAPE = SHAPES["unaligned"]
T, H, I, E, K = SHAPE  # noqa: E741
R = T * K


@pytest.fixture(autouse=True, scope="module")
def group():
    """A group of one rank, for the operators that exchange."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


OPS = sorted(name.removeprefix("moe::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("moe::"))

ROUTE = {
    "score_function": "softmax",
    "score_order": "score_then_topk",
    "renormalize": True,
    "renormalize_p": 2.0,
    "renormalize_eps": 1e-6,
    "renormalize_eps_mode": "clamp",
    "routed_scaling_factor": 1.5,
}
ACTIVATION = {"gate_layout": "interleaved", "alpha": 1.702, "limit": 7.0, "up_offset": 1.0}


ALL_CHECKS = (
    "test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic",
)  # fmt: skip
# Its rows are in flight when it returns: the last check would compare them before anybody waits. The compiled layer in
# tests/distributed/expert_parallel.py stands for it.
CHECKS = {"ep_dispatch": ALL_CHECKS[:3]}


def leaf(*size, dtype=torch.float32):
    return randn(*size, dtype=dtype).requires_grad_()


def samples():
    """By operator: a list of (args, kwargs). Backward operators get no leaves: they have no derivative."""
    plan = make_plan(SHAPE)
    ids = torch.randint(0, E, (T, K), dtype=torch.int32)
    experts = [tensor.requires_grad_() for tensor in expert_inputs(SHAPE, torch.float32, "cpu", bias=True).values()]
    bf16 = [tensor.requires_grad_() for tensor in expert_inputs(SHAPE, torch.bfloat16, "cpu").values()]
    *weights, gate_up_bias, down_bias = experts
    saved = [tensor.detach() for tensor in weights], [tensor.detach() for tensor in (gate_up_bias, down_bias)]
    needs = ("needs_hidden_states", "needs_projections", "needs_topk_weights", "needs_biases")
    layouts = {"activation": "swiglu", **ACTIVATION, "weight_layout": "out_in", "row_invariant": True}

    def experts_backward(pre_activation, **flags):
        (hidden, gate_up, down, topk_weights), biases = saved
        args = (randn(T, H), hidden, pre_activation, gate_up, down, topk_weights, *plan, *biases)
        return args, {**layouts, **dict.fromkeys(needs, True), **flags}

    exchange = ops.ep_plan(ids, E, 2, num_chunks=2)
    maps = (exchange.physical_ids, exchange.row_to_slot, 2, exchange.num_local_experts)
    rows = torch.ops.moe.ep_pack(randn(T, H), randn(T, K), *maps)
    returned = torch.ops.moe.ep_pack(randn(T, H), randn(T, K), None, None, 1, 1)
    replicas = torch.randint(-1, E, (E, 2), dtype=torch.int32)

    sharing = {"group_name": "0", "num_local_experts": E}
    alone = ops.ep_plan(ids, E, 1, num_chunks=2)
    maps_alone = (alone.rank_offsets, alone.row_to_slot, alone.slot_to_row, alone.physical_ids)

    def ep_experts(**flags):
        capacity = flags.get("capacity", 0)
        told = torch.ops.moe.ep_dispatch(randn(T, H), randn(T, K), *alone, "0", capacity=capacity)
        received_counts, received = told
        received = [torch.ops._c10d_functional.wait_tensor(rows) for rows in received]
        args = (*weights, *maps_alone, received_counts, received, gate_up_bias, down_bias)
        if not flags.get("save", True):  # nothing is kept, so nothing can be differentiated
            args = tuple(arg.detach() if isinstance(arg, torch.Tensor) else arg for arg in args)
        return args, {"activation": "swiglu", **ACTIVATION, "weight_layout": "out_in", **sharing, **flags}

    def ep_experts_backward(**flags):
        args, options = ep_experts(**flags)
        kept = torch.ops.moe.ep_experts(*args, **options)[1]
        options.pop("capacity", None)
        args = [arg.detach() if isinstance(arg, torch.Tensor) else arg for arg in args]
        return (randn(T, H), *args[1:3], *args[4:9], [tensor.detach() for tensor in kept], *args[10:]), {
            **options, "needs_projections": True, "needs_biases": True,
        }  # fmt: skip

    return {
        "route": [
            ((leaf(T, E), K), {}),
            ((leaf(T, E), 1, randn(E)), {"score_function": "sigmoid", "check_finite": True}),
            ((leaf(T, E), K, None, ids), {"score_function": "sqrtsoftplus"}),
        ],
        "route_backward": [((randn(T, K), randn(T, E), ids), ROUTE)],
        "plan": [((ids, E), {}), ((ids, E, 4), {})],
        "permute": [((leaf(T, H), *plan), {}), ((leaf(T, H, dtype=torch.bfloat16), *plan), {})],
        "grouped_gemm": [
            ((leaf(R, H), leaf(E, I, H), plan.expert_offsets), {}),
            ((leaf(R, H), leaf(E, H, I), plan.expert_offsets, leaf(E, I)), {"weight_layout": "in_out"}),
        ],
        "grouped_gemm_wgrad": [((randn(R, I), randn(R, H), plan.expert_offsets), {})],
        "grouped_gemm_wgrad_": [((randn(E, I, H), randn(R, I), randn(R, H), plan.expert_offsets), {})],
        "grouped_gemm_bgrad": [((randn(R, I), plan.expert_offsets), {})],
        "activation": [((leaf(R, 2 * I),), {}), ((leaf(R, I), "gelu"), {}), ((leaf(R, 2 * I), "swiglu"), ACTIVATION)],
        "activation_backward": [((randn(R, I), randn(R, 2 * I), "swiglu"), ACTIVATION)],
        "combine": [((leaf(R, H), leaf(T, K), *plan), {}), ((leaf(R, H), None, *plan), {})],
        "combine_backward": [((randn(T, H), randn(R, H), randn(T, K), *plan), {})],
        "experts": [
            ((*weights, *plan, gate_up_bias, down_bias), ACTIVATION),
            ((*weights, *plan), {"save_pre_activation": False}),
            ((*bf16, *plan), {}),
        ],
        "routed_experts": [
            ((*saved[0], ids, *saved[1]), ACTIVATION),
            ((*(tensor.detach() for tensor in bf16), ids), {"weight_layout": "out_in"}),
        ],
        "experts_backward": [
            experts_backward(randn(R, 2 * I)),
            experts_backward(torch.empty(0, 2 * I)),
            experts_backward(randn(R, 2 * I), needs_hidden_states=False, needs_biases=False),
        ],
        "experts_backward_": [
            (
                (randn(E, 2 * I, H), randn(E, H, I), *experts_backward(randn(R, 2 * I))[0]),
                {**layouts, **{name: True for name in needs if name != "needs_projections"}},
            )
        ],
        "ep_plan": [((ids, None, E, 3, 2, 1), {}), ((ids, replicas, E, 4, 2, 0, 3), {})],
        "ep_pack": [
            ((randn(T, H), randn(T, K), *maps), {"wire": "fp8"}),
            ((randn(T, H, dtype=torch.bfloat16), None, None, None, 1, 1), {}),
        ],
        "ep_index": [((rows, randn(1), H, K, exchange.num_local_experts, 7), {})],
        "ep_dispatch": [
            ((randn(T, H), randn(T, K), *alone, "0"), {"check": True}),
            ((randn(T, H), randn(T, K), *alone, "0"), {"capacity": 3}),
        ],
        "ep_experts": [ep_experts(), ep_experts(recompute=True, capacity=2 * T), ep_experts(save=False)],
        "ep_experts_backward": [ep_experts_backward(), ep_experts_backward(capacity=2 * T)],
        "ep_reduce": [
            ((returned, randn(1), exchange.slot_to_row, exchange.physical_ids, H, exchange.num_local_experts), {}),
            ((returned[:, :160].contiguous(), randn(1), exchange.slot_to_row, None, H, 1), {}),
        ],
    }


def to(device, args):
    """The same arguments on another device; a leaf stays a leaf."""
    moved = [arg.detach().to(device).requires_grad_(arg.requires_grad) if torch.is_tensor(arg) else arg for arg in args]
    return tuple(moved)


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op, device):
    if device.type == "cuda" and op in ("ep_dispatch", "ep_experts", "ep_experts_backward"):
        pytest.skip("the group of this test exchanges tensors of the CPU")
    for args, kwargs in samples()[op]:
        args = to(device, args)
        torch.library.opcheck(getattr(torch.ops.moe, op).default, args, kwargs, test_utils=CHECKS.get(op, ALL_CHECKS))


CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


@pytest.mark.parametrize(
    "op", [op for op in OPS if torch._C._dispatch_has_kernel_for_dispatch_key(f"moe::{op}", "CPU")]
)
def test_tensors_of_two_devices_are_refused(op):
    """Each tensor in turn is elsewhere (on no device at all: it is refused before its memory would be read)."""
    for args, kwargs in samples()[op]:
        args = [arg.detach() if torch.is_tensor(arg) else arg for arg in args]
        places = [place for place, arg in enumerate(args) if torch.is_tensor(arg)]
        for place in places if len(places) > 1 else ():
            moved = [arg.to("meta") if i == place else arg for i, arg in enumerate(args)]
            with pytest.raises(
                RuntimeError, match=rf"^{op}: \w+ must be on (cpu|another device) like the other tensors"
            ):
                getattr(torch.ops.moe, op).default.redispatch(CPU, *moved, **kwargs)


def test_operators_are_discovered():
    """An empty discovery would make every check above pass."""
    assert set(OPS) == set(samples())


@pytest.mark.parametrize("op", [op for op in OPS if op.endswith(("_backward", "_wgrad", "_bgrad"))])
def test_double_backward_is_refused(op):
    """The second derivative is an error, not a gradient that silently lacks a term."""
    args, kwargs = samples()[op][0]
    args = [arg.requires_grad_() if isinstance(arg, torch.Tensor) and arg.is_floating_point() else arg for arg in args]
    result = getattr(torch.ops.moe, op)(*args, **kwargs)
    result = result[0] if isinstance(result, tuple) else result
    with pytest.raises(RuntimeError, match=rf"{op}: .*double backward is not supported"):
        result.sum().backward()


def test_integer_tensors_refuse_requires_grad():
    with pytest.raises(RuntimeError, match="only Tensors of floating point"):
        make_plan(SHAPE).row_to_slot.requires_grad_()
