"""Experts with FP8 block weights, multiplied in the activations' dtype."""

import torch
from torch import Tensor

from torch_moe.integrations.transformers.forward import Projections, run_experts
from torch_moe.integrations.transformers.gate import Host, apply_gate, gate_of


def fp8_experts_forward(self: Host, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Compute the experts of transformers' ``FP8Experts``: its forward when the implementation is ``"torch_moe"``.

    The weights of the experts that have tokens are dequantised for the call, to the dtype of the hidden states; the
    activations are not quantised, so the result is closer to the dequantised model than transformers' own. For
    inference: the weights get no gradient, the hidden states and the routing weights do.

    Parameters
    ----------
    self : Module
        An ``FP8Experts`` with float8 weights and one scale per block, per tensor or per half of ``gate_up_proj``.
    hidden_states, top_k_index, top_k_weights
        As in :func:`experts_forward`.

    Returns
    -------
    Tensor of shape (num_tokens, hidden_size), dtype of ``hidden_states``
        The weighted sums.

    Raises
    ------
    TypeError
        If the weights are packed FP4.
    """
    first = "gate_up_proj" if self.has_gate else "up_proj"
    weights = (getattr(self, first), self.down_proj)
    scales = (getattr(self, f"{first}_scale_inv"), self.down_proj_scale_inv)
    for weight in weights:
        if weight.dtype not in (torch.float8_e4m3fn, torch.float8_e5m2):
            raise TypeError(
                f"torch_moe FP8 experts: weights must be float8, got {weight.dtype} (packed FP4 is not supported: "
                "load the model with dequantize=True)"
            )

    def apply(pre_activation: Tensor) -> Tensor:
        return apply_gate(self, pre_activation)

    gate, num_experts, dtype = gate_of(self), weights[1].shape[0], hidden_states.dtype
    if torch.compiler.is_compiling():  # how many experts have tokens is not known while tracing
        used, ids = None, top_k_index
    else:
        used, ids = used_experts(top_k_index, num_experts)
    block = self.block_size
    gate_up, down = (_dequantize(w, s, block, used, dtype) for w, s in zip(weights, scales, strict=True))
    if down.shape[0] == 0:  # no token has a local expert
        return torch.zeros_like(hidden_states)
    return run_experts(hidden_states, ids, top_k_weights, Projections(gate_up, down), gate, apply)


def used_experts(topk_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Give the experts that have tokens consecutive numbers.

    Parameters
    ----------
    topk_ids : Tensor of shape (num_tokens, top_k), dtype=int64
        The experts of each token; ids outside ``[0, num_experts)`` are of none.
    num_experts : int
        Number of experts.

    Returns
    -------
    tuple of (Tensor of shape (num_used,), Tensor of shape (num_tokens, top_k)), dtype=int64
        The used experts in rising order, and the ids as positions among them, -1 for none. Waits for the device.
    """
    ids = topk_ids.clamp(-1, num_experts)
    found = torch.zeros(num_experts + 2, dtype=torch.bool, device=ids.device).index_fill(0, ids.flatten() + 1, True)
    used = found[1:-1].nonzero().flatten()
    positions = torch.full((num_experts + 2,), -1, dtype=torch.int64, device=ids.device)
    positions[used + 1] = torch.arange(len(used), device=ids.device)
    return used, positions[ids + 1]


def _dequantize(
    weight: Tensor, scale: Tensor, block_size: tuple[int, int] | None, used: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Return ``weight * scale`` [E or used, N, K], each scale of [E, n, k] spread over its block."""
    if used is not None:
        weight, scale = weight.view(torch.uint8)[used].view(weight.dtype), scale.float()[used]
    scale = scale.float()
    for dim in (1, 2):
        size, number = weight.shape[dim], scale.shape[dim]
        block = -(-size // number)  # per tensor, or per half of gate_up_proj
        if block_size is not None and -(-size // block_size[dim - 1]) == number:
            block = block_size[dim - 1]
        scale = scale.repeat_interleave(block, dim).narrow(dim, 0, size)
    return (weight.float() * scale).to(dtype)
