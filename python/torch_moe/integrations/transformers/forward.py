"""The function that transformers calls in place of an experts module's forward."""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from torch_moe import ops
from torch_moe.integrations.transformers.gate import Gate, Host, apply_gate, gate_of

ApplyGate: TypeAlias = Callable[[Tensor], Tensor]


class Projections(NamedTuple):
    """The weights of all experts, as the host stores them. P is 2I when gated, else I."""

    gate_up: Tensor  # [E, P, H] out_in, [E, H, P] in_out
    down: Tensor  # [E, H, I] out_in, [E, I, H] in_out
    gate_up_bias: Tensor | None = None  # [E, P]
    down_bias: Tensor | None = None  # [E, H]
    weight_layout: str = "out_in"


def experts_forward(self: Host, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Compute the experts of a decorated transformers module: its forward when the implementation is ``"torch_moe"``.

    Sizes are those of the weights, whatever the module's attributes say: tensor parallelism shards one and not the
    other. Differentiable in the hidden states, the routing weights and all parameters.

    Parameters
    ----------
    self : Module
        A module whose class carries ``use_experts_implementation``, with all of its flags honoured.
    hidden_states : Tensor of shape (num_tokens, hidden_size)
        Cast to the dtype of the weights, as transformers does.
    top_k_index : Tensor of shape (num_tokens, top_k), dtype=int64
        An id outside ``[0, num_experts)`` belongs to no local expert (expert parallelism): its slot adds nothing, costs
        nothing and has a routing weight with zero gradient.
    top_k_weights : Tensor of shape (num_tokens, top_k)
        In any floating dtype; used in fp32 (fp64 for float64 weights).

    Returns
    -------
    Tensor of shape (num_tokens, hidden_size), dtype of ``hidden_states``
        Summed over the experts of each token in fp32 and rounded once.

    Raises
    ------
    TypeError
        If the weights are quantised.
    """
    return run_experts(
        hidden_states,
        top_k_index,
        top_k_weights,
        projections_of(self),
        gate_of(self),
        lambda pre_activation: apply_gate(self, pre_activation),
    )


def projections_of(module: Host) -> Projections:
    """Return the weights of an experts module by the flags of the contract."""
    first, biased = "gate_up_proj" if module.has_gate else "up_proj", module.has_bias
    return Projections(
        getattr(module, first),
        module.down_proj,
        getattr(module, f"{first}_bias") if biased else None,
        module.down_proj_bias if biased else None,
        "in_out" if module.is_transposed else "out_in",
    )


def run_experts(
    hidden_states: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    projections: Projections,
    gate: Gate | None,
    apply: ApplyGate,
) -> Tensor:
    """Compute experts: fused with a known activation, else with ``apply`` between two grouped GEMMs.

    Parameters
    ----------
    hidden_states : Tensor of shape (num_tokens, hidden_size)
        The tokens.
    topk_ids : Tensor of shape (num_tokens, top_k), dtype=int64 or int32
        The experts of each token; other ids than theirs are dropped.
    topk_weights : Tensor of shape (num_tokens, top_k)
        The weight of each slot.
    projections : Projections
        The weights.
    gate : Gate or None
        The activation, if it is known.
    apply : callable
        The activation, rows [R, P] to rows [R, I]; used where ``gate`` is None.

    Returns
    -------
    Tensor of shape (num_tokens, hidden_size), dtype of ``hidden_states``
        The weighted sums.

    Raises
    ------
    TypeError
        If the weights are quantised.
    """
    gate_up, down, gate_up_bias, down_bias, layout = projections
    dtype = down.dtype
    if dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise TypeError(
            f"torch_moe experts: weights must be float32, bfloat16, float16 or float64, got {dtype} "
            "(load the model dequantised, or choose another experts_implementation)"
        )
    plan = make_plan(topk_ids, down.shape[0])
    tokens, weights = hidden_states.to(dtype), topk_weights.to(torch.promote_types(dtype, torch.float32))
    gate_up_bias = None if gate_up_bias is None else gate_up_bias.to(dtype)
    down_bias = None if down_bias is None else down_bias.to(dtype)
    if gate is not None:
        biases, options = (gate_up_bias, down_bias), gate._asdict()
        output = ops.experts(tokens, gate_up, down, weights, plan, *biases, weight_layout=layout, **options)
    else:
        rows = ops.permute(tokens, plan)
        rows = ops.grouped_gemm(rows, gate_up, plan.expert_offsets, gate_up_bias, layout)
        rows = ops.grouped_gemm(apply(rows).to(rows.dtype), down, plan.expert_offsets, down_bias, layout)
        output = ops.combine(rows, weights, plan)
    return output.to(hidden_states.dtype)


def make_plan(topk_ids: Tensor, num_experts: int) -> ops.Plan:
    """Sort the slots by expert; ids of any integer dtype, those outside ``[0, num_experts)`` dropped.

    They are clamped before they are narrowed: 2**32 must not become expert 0.
    """
    return ops.plan(topk_ids.clamp(-1, num_experts).to(torch.int32), num_experts)
