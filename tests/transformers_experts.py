"""Bare experts modules under transformers' decorator, one per combination of its flags, and their run in fp64."""

import torch
from torch import nn
from transformers.integrations.moe import use_experts_implementation


class Config:
    _experts_implementation = "torch_moe"


def make_experts(
    num_experts=4, hidden=24, intermediate=20, *, act_fn=nn.functional.silu, apply_gate=None, seed=0, **flags
):
    """Return a decorated experts module with seeded weights; ``apply_gate(self, gate_up)`` is its ``_apply_gate``."""
    gated, biased, transposed = (
        flags.get(name, name == "has_gate") for name in ("has_gate", "has_bias", "is_transposed")
    )
    generator = torch.Generator().manual_seed(seed)

    def parameter(out_features, in_features):
        drawn = torch.randn(num_experts, out_features, in_features, generator=generator) / in_features**0.5
        return nn.Parameter(drawn.transpose(1, 2).contiguous() if transposed else drawn)

    class Experts(nn.Module):
        def __init__(self, config):
            super().__init__()
            first = "gate_up_proj" if gated else "up_proj"
            width = 2 * intermediate if gated else intermediate
            self.num_experts, self.act_fn = num_experts, act_fn
            self.register_parameter(first, parameter(width, hidden))
            self.down_proj = parameter(hidden, intermediate)
            if biased:
                bias = torch.randn(num_experts, width, generator=generator)
                self.register_parameter(f"{first}_bias", nn.Parameter(bias))
                self.down_proj_bias = nn.Parameter(torch.randn(num_experts, hidden, generator=generator))

        def forward(self, hidden_states, top_k_index, top_k_weights):
            """The definition, expert by expert; slots of no expert add nothing."""
            first = "gate_up_proj" if gated else "up_proj"
            output = torch.zeros_like(hidden_states)
            for expert in range(num_experts):
                weights, biases = [getattr(self, first)[expert], self.down_proj[expert]], [0, 0]
                if transposed:
                    weights = [weight.T for weight in weights]
                if biased:
                    biases = [getattr(self, f"{first}_bias")[expert], self.down_proj_bias[expert]]
                for k in range(top_k_index.shape[1]):
                    token = (top_k_index[:, k] == expert).nonzero().flatten()
                    rows = hidden_states[token] @ weights[0].T + biases[0]
                    rows = self._apply_gate(rows) if gated else self.act_fn(rows)
                    rows = (rows @ weights[1].T + biases[1]) * top_k_weights[token, k, None]
                    output = output.index_add(0, token, rows)
            return output

    if apply_gate is not None:
        Experts._apply_gate = apply_gate
    return use_experts_implementation(**flags)(Experts)(Config())


def make_inputs(num_tokens=13, hidden=24, num_experts=4, top_k=2, seed=1):
    """Return hidden states, distinct ids per token and weights."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(num_tokens, num_experts, generator=generator).argsort(dim=1)[:, :top_k]
    weights = torch.randn(num_tokens, top_k, generator=generator).softmax(dim=-1)
    return torch.randn(num_tokens, hidden, generator=generator), ids, weights


def run_experts(module, hidden, ids, weights, implementation):
    """Return output and every gradient, by name."""
    module.config._experts_implementation = implementation
    module.zero_grad()
    hidden, weights = (tensor.detach().clone().requires_grad_() for tensor in (hidden, weights))
    output = module(hidden, ids, weights)
    seeded = torch.randn(output.shape, generator=torch.Generator().manual_seed(7)).bfloat16()
    output.backward(seeded.to(output.dtype))
    grads = {name: parameter.grad for name, parameter in module.named_parameters()}
    return {"output": output.detach(), "hidden_states": hidden.grad, "top_k_weights": weights.grad, **grads}
