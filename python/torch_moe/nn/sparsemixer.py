"""SparseMixer-v2 (arXiv 2409.12136): experts drawn one after the other, with a gradient that knows of the draw."""

from collections.abc import Callable

import torch
from torch import Tensor

from torch_moe.ops._common import Context

# With this probability a draw that is not the likeliest expert keeps a third of its weight (Heun's third-order method).
_SHRUNK = 0.75


class _Drawn(torch.autograd.Function):
    """The probability of the drawn expert times ``share``, with the gradient of the probability alone."""

    @staticmethod
    def forward(ctx: Context, logits: Tensor, probabilities: Tensor, ids: Tensor, share: Tensor) -> Tensor:
        ctx.save_for_backward(probabilities, ids)
        return probabilities.gather(-1, ids) * share

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, None, None, None]:
        probabilities, ids = ctx.saved_tensors
        grad = grad * probabilities.gather(-1, ids)
        return (probabilities * -grad).scatter_add(-1, ids, grad), None, None, None


def sparsemixer(
    router_logits: Tensor,
    top_k: int,
    tolerance: float,
    *,
    training: bool,
    expert_bias: Tensor | None = None,
    ids: Tensor | None = None,
    uniform: Callable[[Tensor], Tensor] = torch.rand_like,
) -> tuple[Tensor, Tensor]:
    r"""Choose experts one after the other, each among those whose logits come near the best that is left.

    Of the experts that are left, those stay whose logit :math:`z_i` fulfils
    :math:`(\max z - z_i) / \max(|z_i|, \max z) \le 2 \cdot \mathrm{tolerance}`; the weight is the softmax over them. In
    evaluation the best is chosen. In training one is drawn by these probabilities; if it is not the likeliest, its
    weight is a third with probability 3/4, and the gradient is that of the weight before.

    Parameters
    ----------
    router_logits : Tensor of shape (num_tokens, num_experts)
        The logits; all arithmetic is in their dtype.
    top_k : int
        Experts per token.
    tolerance : float
        How near: Phi-3.5-MoE has .01.
    training : bool
        Draw.
    expert_bias : Tensor of shape (num_experts,), default=None
        Added to the logits for who is near and who is chosen; the weights are the softmax of the logits without it.
    ids : Tensor of shape (num_tokens, top_k), default=None
        Take these experts, one after the other; the weight of one that is not near is 0, as that of an id of no expert.
    uniform : callable, default=torch.rand_like
        Draws numbers in [0, 1) of the shape of its argument, once per expert of a token.

    Returns
    -------
    topk_weights, topk_ids : Tensor of shape (num_tokens, top_k)
        The weights, differentiable, in the dtype of the logits, and the experts, int64, distinct within a token.
    """
    candidates = router_logits.detach()
    if expert_bias is not None:
        candidates = candidates + expert_bias.to(candidates.dtype)
    weights, choices = [], []
    taken = torch.zeros_like(candidates, dtype=torch.bool)
    for place in range(top_k):
        left = candidates.masked_fill(taken, -torch.inf)
        best, chosen = left.max(dim=-1, keepdim=True)
        far = (best - left) / candidates.abs().clamp(min=best) > 2 * tolerance
        probabilities = router_logits.masked_fill(far | taken, -torch.inf).softmax(dim=-1)
        if training:
            near = left.masked_fill(far, -torch.inf)
            likeliest = near.argmax(dim=-1, keepdim=True)
            gumbel = torch.empty_like(near, memory_format=torch.contiguous_format).exponential_().log()
            chosen = (near - gumbel).argmax(dim=-1, keepdim=True)
        if ids is not None:
            given = ids[:, place : place + 1].long()
            known = (given >= 0) & (given < candidates.shape[-1])
            chosen = given.where(known, 0)
            probabilities = probabilities * known
        if training:
            whole = (chosen == likeliest) | (uniform(best) > _SHRUNK)
            share = torch.add(0.3333, whole, alpha=0.6667).to(probabilities.dtype)
            drawn: Tensor = _Drawn.apply(router_logits, probabilities.detach(), chosen, share)  # type: ignore[no-untyped-call]
            weights.append(drawn)
        else:
            weights.append(probabilities.gather(-1, chosen))
        choices.append(chosen)
        taken = taken.scatter(-1, chosen, True)
    return torch.cat(weights, dim=-1), torch.cat(choices, dim=-1) if ids is None else ids
