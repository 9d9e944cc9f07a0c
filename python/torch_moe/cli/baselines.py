"""What one would run without this library, in plain torch, on the same weights: dense FFNs, a loop, `grouped_mm`.

Each baseline is written as a careful user of torch would write it; none of them is handicapped on purpose.
Legend: T tokens, H hidden_size, I intermediate_size, P pre-activation size (2I gated, else I), E experts, K top_k.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

from torch_moe.cli.shapes import LayerShape


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The parameters of one MoE layer."""

    router: torch.Tensor  # [E, H]
    expert_bias: torch.Tensor | None  # [E], steers the selection only
    gate_up_proj: torch.Tensor  # [E, P, H]
    down_proj: torch.Tensor  # [E, H, I]
    gate_up_bias: torch.Tensor | None  # [E, P]
    down_bias: torch.Tensor | None  # [E, H]

    def trainable(self) -> tuple[torch.Tensor, ...]:
        """Return the tensors that get a gradient."""
        tensors = (self.router, self.gate_up_proj, self.down_proj, self.gate_up_bias, self.down_bias)
        return tuple(tensor for tensor in tensors if tensor is not None)


@dataclass(frozen=True, kw_only=True)
class DenseWeights:
    """The parameters of one dense FFN."""

    gate_up: torch.Tensor  # [P, H]
    down: torch.Tensor  # [H, I]
    gate_up_bias: torch.Tensor | None = None  # [P]
    down_bias: torch.Tensor | None = None  # [H]

    def trainable(self) -> tuple[torch.Tensor, ...]:
        """Return the tensors that get a gradient."""
        tensors = (self.gate_up, self.down, self.gate_up_bias, self.down_bias)
        return tuple(tensor for tensor in tensors if tensor is not None)


def route(
    hidden_states: torch.Tensor, weights: Weights, shape: LayerShape, forced_ids: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Route in plain torch, in fp32; `forced_ids` replaces the ids after the work of choosing them.

    Returns
    -------
    topk_weights : Tensor of shape (num_tokens, top_k), dtype=float32
        Differentiable.
    topk_ids : Tensor of shape (num_tokens, top_k), dtype=int64
        Chosen experts.
    """
    logits = functional.linear(hidden_states.float(), weights.router.float())
    late = shape.score_order == "topk_then_score"
    scores = logits if late else _score(logits, shape)
    choice = scores.detach()
    if weights.expert_bias is not None:
        choice = choice + weights.expert_bias
    if shape.num_groups > 1:
        choice = _keep_best_groups(choice, shape)
    ids = choice.topk(shape.top_k, dim=-1).indices
    chosen = scores.gather(1, ids)
    if late:
        chosen = _score(chosen, shape)
    if shape.renormalize:
        chosen = chosen / chosen.sum(dim=-1, keepdim=True)
    return chosen * shape.routed_scaling_factor, ids if forced_ids is None else forced_ids.long()


def _score(logits: torch.Tensor, shape: LayerShape) -> torch.Tensor:
    return logits.softmax(dim=-1) if shape.score_function == "softmax" else logits.sigmoid()


def _keep_best_groups(choice: torch.Tensor, shape: LayerShape) -> torch.Tensor:
    grouped = choice.view(choice.shape[0], shape.num_groups, -1)
    best = grouped.topk(2, dim=-1).values.sum(dim=-1).topk(shape.topk_groups, dim=-1).indices
    keep = torch.zeros(grouped.shape[:2], dtype=torch.bool).scatter_(1, best, True)
    return grouped.masked_fill(~keep[..., None], float("-inf")).flatten(1)


def activate(pre_activation: torch.Tensor, shape: LayerShape) -> torch.Tensor:
    """Apply the activations that published shapes use: [.., P] to [.., I]."""
    if not shape.is_gated:
        return functional.relu(pre_activation)
    if shape.gate_layout == "interleaved":
        gate, up = pre_activation[..., ::2], pre_activation[..., 1::2]
    else:
        gate, up = pre_activation.chunk(2, dim=-1)
    if shape.alpha == 1.0 and shape.limit is None and shape.up_offset == 0.0:
        return functional.silu(gate) * up
    if shape.limit is not None:
        gate, up = gate.clamp(max=shape.limit), up.clamp(-shape.limit, shape.limit)
    return gate * torch.sigmoid(shape.alpha * gate) * (up + shape.up_offset)


def dense(hidden_states: torch.Tensor, weights: DenseWeights, shape: LayerShape) -> torch.Tensor:
    """Run one dense FFN over all tokens."""
    hidden = activate(functional.linear(hidden_states, weights.gate_up, weights.gate_up_bias), shape)
    return functional.linear(hidden, weights.down, weights.down_bias)


def split_experts(weights: Weights, num_experts: int) -> list[DenseWeights]:
    """View the first experts as one dense FFN each (no copy)."""
    return [
        DenseWeights(
            gate_up=weights.gate_up_proj[expert].detach().requires_grad_(),
            down=weights.down_proj[expert].detach().requires_grad_(),
            gate_up_bias=_row(weights.gate_up_bias, expert),
            down_bias=_row(weights.down_bias, expert),
        )
        for expert in range(num_experts)
    ]


def merge_experts(weights: Weights, num_experts: int, shape: LayerShape) -> DenseWeights:
    """Copy the first experts into one dense FFN that gives the sum of their outputs."""
    return DenseWeights(
        gate_up=_merge_gate_up(weights.gate_up_proj, num_experts, shape),
        down=weights.down_proj[:num_experts].detach().transpose(0, 1).flatten(1).requires_grad_(),
        gate_up_bias=None if weights.gate_up_bias is None else _merge_gate_up(weights.gate_up_bias, num_experts, shape),
        down_bias=None
        if weights.down_bias is None
        else weights.down_bias[:num_experts].detach().sum(dim=0).requires_grad_(),
    )


def _row(tensor: torch.Tensor | None, index: int) -> torch.Tensor | None:
    return None if tensor is None else tensor[index].detach().requires_grad_()


def _merge_gate_up(tensor: torch.Tensor, num_experts: int, shape: LayerShape) -> torch.Tensor:
    chosen = tensor[:num_experts].detach()
    if shape.is_gated and shape.gate_layout == "concat":  # all gates first, then all up values
        chosen = torch.stack(chosen.chunk(2, dim=1)).flatten(0, 1)
    return chosen.flatten(0, 1).clone().requires_grad_()


def loop_over_experts(
    hidden_states: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    weights: Weights,
    shape: LayerShape,
) -> torch.Tensor:
    """Run the experts one after the other on the tokens that chose them.

    The weights are unbound once: indexing them inside the loop would make the backward write a whole zero tensor
    per expert.
    """
    nothing = (None,) * shape.num_experts
    gate_up_bias = nothing if weights.gate_up_bias is None else weights.gate_up_bias.unbind()
    down_bias = nothing if weights.down_bias is None else weights.down_bias.unbind()
    experts = zip(weights.gate_up_proj.unbind(), weights.down_proj.unbind(), gate_up_bias, down_bias, strict=True)
    output = torch.zeros_like(hidden_states)
    for expert, (gate_up, down, up_bias, out_bias) in enumerate(experts):
        tokens, choices = torch.where(topk_ids == expert)
        if tokens.numel() == 0:
            continue
        hidden = activate(functional.linear(hidden_states.index_select(0, tokens), gate_up, up_bias), shape)
        rows = functional.linear(hidden, down, out_bias) * topk_weights[tokens, choices, None].to(output.dtype)
        output = output.index_add(0, tokens, rows)
    return output


def grouped_mm(
    hidden_states: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    weights: Weights,
    shape: LayerShape,
) -> torch.Tensor:
    """Sort the rows by expert and call `torch.nn.functional.grouped_mm` twice."""
    sorted_ids, order = topk_ids.flatten().sort(stable=True)
    offsets = torch.bincount(sorted_ids, minlength=shape.num_experts).cumsum(0, dtype=torch.int32)
    rows = hidden_states.index_select(0, order // shape.top_k)
    rows = functional.grouped_mm(rows, weights.gate_up_proj.transpose(1, 2), offs=offsets)
    if weights.gate_up_bias is not None:
        rows = rows + weights.gate_up_bias.index_select(0, sorted_ids)
    rows = functional.grouped_mm(activate(rows, shape), weights.down_proj.transpose(1, 2), offs=offsets)
    if weights.down_bias is not None:
        rows = rows + weights.down_bias.index_select(0, sorted_ids)
    slots = torch.empty_like(rows).index_copy(0, order, rows).view(shape.num_tokens, shape.top_k, -1)
    return (slots * topk_weights[..., None].to(rows.dtype)).sum(dim=1)


def why_not_grouped_mm(dtype: torch.dtype) -> str | None:
    """Return why `grouped_mm` cannot run here in this dtype, or None when it can, forward and backward."""
    function: Callable[..., torch.Tensor] | None = getattr(functional, "grouped_mm", None)
    if function is None:
        return f"torch {torch.__version__} has no torch.nn.functional.grouped_mm"
    rows = torch.ones(16, 16, dtype=dtype, requires_grad=True)
    weight = torch.ones(1, 16, 16, dtype=dtype, requires_grad=True)
    try:
        result = function(rows, weight.transpose(1, 2), offs=torch.tensor([16], dtype=torch.int32))
        torch.autograd.grad(result, (rows, weight), torch.ones_like(result))
    except (RuntimeError, NotImplementedError) as error:
        return f"torch {torch.__version__} refuses: {str(error).splitlines()[0]}"
    return None
