"""Sample calls of every operator that the library registers, for the tests that hold for all of them."""

import torch
from helpers import expert_inputs, make_plan, randn

import torch_moe.distributed  # noqa: F401  # registers operators
from torch_moe import ops
from torch_moe.testing import SHAPES

SHAPE = SHAPES["unaligned"]
T, H, I, E, K = SHAPE  # noqa: E741
R = T * K

OPS = sorted(name.removeprefix("moe::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("moe::"))
# Those with a kernel per device; the others are made of them.
KERNEL_OPS = [op for op in OPS if torch._C._dispatch_has_kernel_for_dispatch_key(f"moe::{op}", "CPU")]

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


def leaf(*size, dtype=torch.float32):
    return randn(*size, dtype=dtype).requires_grad_()


def samples():
    """By operator with kernels: a list of (args, kwargs). Backward operators get no leaves: they have no derivative."""
    plan = make_plan(SHAPE)
    short = plan._replace(row_to_slot=plan.row_to_slot[: R - 7])  # fewer rows than slots
    ids = torch.randint(0, E, (T, K), dtype=torch.int32)
    experts = [tensor.requires_grad_() for tensor in expert_inputs(SHAPE, torch.float32, "cpu", bias=True).values()]
    bf16 = [tensor.requires_grad_() for tensor in expert_inputs(SHAPE, torch.bfloat16, "cpu").values()]
    *weights, gate_up_bias, down_bias = experts
    saved = [tensor.detach() for tensor in weights], [tensor.detach() for tensor in (gate_up_bias, down_bias)]
    needs = ("needs_hidden_states", "needs_projections", "needs_topk_weights", "needs_biases")
    layouts = {"activation": "swiglu", **ACTIVATION, "weight_layout": "out_in", "row_invariant": True}

    def experts_backward(pre_activation, plan=plan, **flags):
        (hidden, gate_up, down, topk_weights), biases = saved
        args = (randn(T, H), hidden, pre_activation, gate_up, down, topk_weights, *plan, *biases)
        return args, {**layouts, **dict.fromkeys(needs, True), **flags}

    exchange = ops.ep_plan(ids, E, 2, num_chunks=2)
    maps = (exchange.physical_ids, exchange.row_to_slot, 2, exchange.num_local_experts)
    rows = torch.ops.moe.ep_pack(randn(T, H), randn(T, K), *maps)
    returned = torch.ops.moe.ep_pack(randn(T, H), randn(T, K), None, None, 1, 1)
    replicas = torch.randint(-1, E, (E, 2), dtype=torch.int32)

    return {
        "route": [
            ((leaf(T, E), K), {}),
            ((leaf(T, E), 1, randn(E)), {"score_function": "sigmoid", "check_finite": True}),
            ((leaf(T, E), K, None, ids), {"score_function": "sqrtsoftplus"}),
        ],
        "route_backward": [((randn(T, K), randn(T, E), ids), ROUTE)],
        "plan": [((ids, E), {}), ((ids, E, 4), {})],
        "permute": [((leaf(T, H), *plan), {}), ((leaf(T, H, dtype=torch.bfloat16), *short), {})],
        "grouped_gemm": [
            ((leaf(R, H), leaf(E, I, H), plan.expert_offsets), {}),
            ((leaf(R, H), leaf(E, H, I), plan.expert_offsets, leaf(E, I)), {"weight_layout": "in_out"}),
        ],
        "grouped_gemm_wgrad": [((randn(R, I), randn(R, H), plan.expert_offsets), {})],
        "grouped_gemm_wgrad_": [((randn(E, I, H), randn(R, I), randn(R, H), plan.expert_offsets), {})],
        "grouped_gemm_bgrad": [((randn(R, I), plan.expert_offsets), {})],
        "activation": [((leaf(R, 2 * I),), {}), ((leaf(R, I), "gelu"), {}), ((leaf(R, 2 * I), "swiglu"), ACTIVATION)],
        "activation_backward": [((randn(R, I), randn(R, 2 * I), "swiglu"), ACTIVATION)],
        "combine": [((leaf(R, H), leaf(T, K), *plan), {}), ((leaf(R - 7, H), None, *short), {})],
        "combine_backward": [
            ((randn(T, H), randn(R, H), randn(T, K), *plan), {}),
            ((randn(T, H), randn(R - 7, H), randn(T, K), *short), {}),
        ],
        "experts": [
            ((*weights, *plan, gate_up_bias, down_bias), ACTIVATION),
            ((*weights, *plan), {"save_pre_activation": False}),
            ((*bf16, *short), {}),
        ],
        "routed_experts": [
            ((*saved[0], ids, *saved[1]), ACTIVATION),
            ((*(tensor.detach() for tensor in bf16), ids), {"weight_layout": "out_in"}),
        ],
        "experts_backward": [
            experts_backward(randn(R, 2 * I)),
            experts_backward(torch.empty(0, 2 * I)),
            experts_backward(randn(R - 7, 2 * I), short, needs_hidden_states=False, needs_biases=False),
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
        "ep_reduce": [
            ((returned, randn(1), exchange.slot_to_row, exchange.physical_ids, H, exchange.num_local_experts), {}),
            ((returned[:, :160].contiguous(), randn(1), exchange.slot_to_row, None, H, 1), {}),
        ],
    }


def exchange_samples():
    """The same for the operators that exchange, in the group "0" of one rank."""
    ids = torch.randint(0, E, (T, K), dtype=torch.int32)
    *weights, gate_up_bias, down_bias = (
        tensor.requires_grad_() for tensor in expert_inputs(SHAPE, torch.float32, "cpu", bias=True).values()
    )
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
        "ep_dispatch": [
            ((randn(T, H), randn(T, K), *alone, "0"), {"check": True}),
            ((randn(T, H), randn(T, K), *alone, "0"), {"capacity": 3}),
        ],
        "ep_experts": [ep_experts(), ep_experts(recompute=True, capacity=2 * T), ep_experts(save=False)],
        "ep_experts_backward": [ep_experts_backward(), ep_experts_backward(capacity=2 * T)],
    }
