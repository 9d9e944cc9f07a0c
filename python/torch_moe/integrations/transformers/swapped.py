"""Forwards for the experts of transformers that do not carry its decorator, one function per class.

Each is the forward of a subclass made by :func:`swap`: parameters, names, hooks and what the parent class checks stay.
``_apply_gate`` and the flags of the contract are added, so that the activation is found as for decorated classes.
"""

import torch
from torch import Tensor, nn

from torch_moe import ops
from torch_moe.integrations.transformers.families import read_jetmoe
from torch_moe.integrations.transformers.forward import Projections, experts_forward, make_plan, run_experts
from torch_moe.integrations.transformers.fp8 import used_experts
from torch_moe.integrations.transformers.gate import Host, apply_gate, gate_of


def concatenated_gate(self: Host, pre_activation: Tensor) -> Tensor:
    """Apply ``act_fn(gate) * up`` to concatenated halves."""
    gate, up = pre_activation.chunk(2, dim=-1)
    gated: Tensor = self.act_fn(gate) * up
    return gated


def llama4_moe(self: Host, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """Weigh the input of the chosen experts, not their output: ``sum_k f_k(s_k x)``, beside the shared expert.

    transformers runs every expert on every token, most of them on zeros. Each (token, choice) is a token here.
    """
    hidden_states = hidden_states.reshape(-1, self.hidden_dim)
    scores, router_logits = self.router(hidden_states)
    weights, ids = scores.topk(self.top_k, dim=1)  # the others are zero
    weighted = hidden_states.unsqueeze(1) * weights.unsqueeze(2)  # [T, K, H]
    slots = weighted.flatten(0, 1)
    ones = torch.ones(slots.shape[0], 1, dtype=torch.float32, device=slots.device)
    routed = experts_forward(self.experts, slots, ids.reshape(-1, 1), ones).view_as(weighted).sum(dim=1)
    return self.shared_expert(hidden_states) + routed, router_logits


def dbrx_experts(self: Host, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Compute gate and up by a GEMM each: the two flat weights are used where they lie."""
    shape, tokens = (self.num_experts, self.ffn_hidden_size, self.hidden_size), hidden_states.flatten(0, -2)
    gate_proj, up_proj, down_proj = (weight.view(shape) for weight in (self.mlp.w1, self.mlp.v1, self.mlp.w2))
    plan = make_plan(top_k_index, self.num_experts)
    rows = ops.permute(tokens.to(down_proj.dtype), plan)
    gate = ops.grouped_gemm(rows, gate_proj, plan.expert_offsets)
    rows = self.mlp.activation_fn(gate) * ops.grouped_gemm(rows, up_proj, plan.expert_offsets)
    rows = ops.grouped_gemm(rows, down_proj, plan.expert_offsets, weight_layout="in_out")
    weights = top_k_weights.to(torch.promote_types(rows.dtype, torch.float32))
    output = ops.combine(rows, weights, plan).to(hidden_states.dtype)
    return output.view(hidden_states.shape[0], -1, self.hidden_size)


def longcat_flash_experts(self: Host, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Compute the routed experts; those from ``num_routed_experts`` on give the token itself.

    Their ids are of no expert with weights, so their slots cost no row.
    """
    identity = (top_k_weights * (top_k_index >= self.num_routed_experts)).sum(dim=-1, keepdim=True)
    output: Tensor = (identity * hidden_states).to(hidden_states.dtype)
    if self.gate_up_proj is None:
        return output
    # NOTE: gate_up_proj is allocated for the identity experts, too.
    projections = Projections(self.gate_up_proj[: self.num_routed_experts], self.down_proj)
    return output + _run(self, hidden_states, top_k_index, top_k_weights, projections)


def jetmoe_moe(self: Host, layer_input: Tensor) -> Tensor:
    """Route, compute the experts as one operator, and add the one bias of the output."""
    tokens = layer_input.flatten(0, -2)
    _, weights, ids = read_jetmoe(self, self.router, self.router(tokens))
    projections = Projections(self.input_linear.weight, self.output_linear.weight)
    output: Tensor = _run(self, tokens, ids, weights, projections).view_as(layer_input) + self.bias
    return output


def jetmoe_parallel_experts(self: Host, inputs: Tensor, expert_size: list[int]) -> Tensor:
    """Multiply sorted rows by their experts' weights: the grouped linears around JetMoE's attention."""
    ends = torch.tensor([0, *expert_size], dtype=torch.int32, device=inputs.device).cumsum(0, dtype=torch.int32)
    return ops.grouped_gemm(inputs.to(self.weight.dtype), self.weight, ends)


def switch_experts(self: Host, hidden_states: Tensor, selected_experts: Tensor, routing_weights: Tensor) -> Tensor:
    """Compute the experts that tokens chose and capacity kept: one-hot rows of zeros are dropped tokens."""
    one_hot = selected_experts.flatten(0, -2)
    ids = torch.where(one_hot.any(dim=-1), one_hot.argmax(dim=-1), -1).unsqueeze(-1)
    experts, ids = _used_modules(self, ids)
    if not experts:
        return torch.zeros_like(hidden_states)
    projections = Projections(_stack(experts, "wi", "weight"), _stack(experts, "wo", "weight"))
    return _run_modules(self, experts[0], hidden_states, ids, routing_weights, projections)


def nllb_moe(self: Host, hidden_states: Tensor, padding_mask: Tensor | None = None) -> Tensor:
    """Sum over each token's experts their output times the router's probability.

    transformers 5.18 passes a one-hot mask where ids are expected, so that only experts 0 and 1 ever run; this is what
    the model was trained with (fairseq, and transformers 4).
    """
    tokens = hidden_states.flatten(0, -2)
    _, router_probs, _ = self.router(tokens, padding_mask)
    weights, ids = router_probs.topk(min(2, self.num_experts), dim=-1)
    experts, ids = _used_modules(self.experts, ids.masked_fill(weights == 0, -1))
    if not experts:
        return torch.zeros_like(hidden_states)
    first, down, first_bias, down_bias = (
        _stack(experts, layer, kind) for kind in ("weight", "bias") for layer in ("fc1", "fc2")
    )
    dropped = self.experts.moe_token_dropout
    if not (self.training and dropped > 0):
        weights = weights * (1 - dropped)
        projections = Projections(first, down, first_bias, down_bias)
        return _run_modules(self, experts[0], tokens, ids, weights, projections).view_as(hidden_states)
    plan = make_plan(ids, len(experts))
    rows = ops.permute(tokens.to(down.dtype), plan)
    rows = ops.grouped_gemm(rows, first, plan.expert_offsets, first_bias)
    rows = experts[0].dropout(experts[0].act(rows))
    rows = ops.grouped_gemm(rows, down, plan.expert_offsets, down_bias)
    rows = self.experts.token_dropout(rows)
    output = ops.combine(rows, weights.to(torch.promote_types(rows.dtype, torch.float32)), plan)
    return output.to(hidden_states.dtype).view_as(hidden_states)


def _run(self: Host, tokens: Tensor, ids: Tensor, weights: Tensor, projections: Projections) -> Tensor:
    return run_experts(tokens, ids, weights, projections, gate_of(self), lambda rows: apply_gate(self, rows))


def _run_modules(
    self: Host, expert: Host, tokens: Tensor, ids: Tensor, weights: Tensor, projections: Projections
) -> Tensor:
    """Run experts that are modules of their own, fused unless there is dropout between their layers."""
    gate = gate_of(self) if expert.dropout.p == 0 or not expert.training else None
    return run_experts(tokens, ids, weights, projections, gate, lambda rows: expert.dropout(expert.act(rows)))


def _used_modules(modules: nn.ModuleDict, ids: Tensor) -> tuple[list[Host], Tensor]:
    """Return the experts with tokens and the ids among them; all of them while tracing, which knows no ids."""
    used = list(range(len(modules)))
    if not torch.compiler.is_compiling():
        found, ids = used_experts(ids, len(modules))
        used = found.tolist()
    return [modules[f"expert_{number}"] for number in used], ids


def _stack(experts: list[Host], layer: str, parameter: str) -> Tensor:
    """Stack a parameter of the used experts. NOTE: a copy, of no more than their GEMMs read anyway."""
    return torch.stack([getattr(getattr(expert, layer), parameter) for expert in experts])
