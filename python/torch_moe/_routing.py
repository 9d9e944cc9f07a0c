"""What losses, balancers and metrics ask of a routing: scores, counts, and sums over the ranks.

Legend: T tokens, E num_experts, K top_k. Everything is plain torch on tensors that exist, and nothing waits for the
device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torch_moe import ops, reference
from torch_moe.ops._common import has_kernels

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

SCORE_FUNCTIONS = ("softmax", "sigmoid", "sqrtsoftplus")


def scores(router_logits: Tensor, score_function: str = "softmax") -> Tensor:
    """Return each expert's score, in fp32 (fp64 for fp64 logits), differentiable.

    Parameters
    ----------
    router_logits : Tensor of shape (..., num_experts), any floating dtype
        The router's logits.
    score_function : {"softmax", "sigmoid", "sqrtsoftplus"}, default="softmax"
        The last is ``sqrt(softplus(logit))``.

    Returns
    -------
    Tensor of shape (..., num_experts), dtype=float32 or float64
        The scores.
    """
    if score_function not in SCORE_FUNCTIONS:
        raise ValueError(f"score_function must be in {SCORE_FUNCTIONS}, got {score_function!r}")
    return reference.scores(router_logits.to(torch.promote_types(router_logits.dtype, torch.float32)), score_function)


def probabilities(router_logits: Tensor, score_function: str = "softmax") -> Tensor:
    """Return the scores divided by their sum over all experts: what one compares between score functions."""
    return normalized(scores(router_logits, score_function), score_function)


def normalized(score: Tensor, score_function: str) -> Tensor:
    """Return what :func:`scores` returned divided by its sum over all experts."""
    if score_function == "softmax":
        return score
    return score / score.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(score.dtype).tiny)


def count_tokens(topk_ids: Tensor, num_experts: int, mask: Tensor | None = None) -> Tensor:
    """Count how often each expert was chosen.

    Parameters
    ----------
    topk_ids : Tensor of shape (..., num_tokens, top_k), any integer dtype
        The experts of each token. An id outside ``[0, num_experts)`` is not counted.
    num_experts : int
        Number of experts.
    mask : Tensor of shape (..., num_tokens), dtype=bool, default=None
        False where a token is padding, which is not counted.

    Returns
    -------
    Tensor of shape (..., num_experts), dtype=int64
        The counts, one row for every leading index.
    """
    ids = topk_ids.long()
    counted = (ids >= 0) & (ids < num_experts)
    if mask is not None:
        counted = counted & mask.unsqueeze(-1)
    # What is not counted goes to one expert more, cut off below: neither shapes nor the host depend on the data.
    bins = torch.where(counted, ids, num_experts).flatten(-2)
    counts = bins.new_zeros(*bins.shape[:-1], num_experts + 1)
    return counts.scatter_add(-1, bins, torch.ones_like(bins))[..., :num_experts]


def max_vio(tokens_per_expert: Tensor) -> Tensor:
    """Return ``max(count) / mean(count) - 1`` over the last dimension: 0 is even, NaN is no count at all.

    Parameters
    ----------
    tokens_per_expert : Tensor of shape (..., num_experts), any dtype
        The counts.

    Returns
    -------
    Tensor of shape (...), dtype=float64
        The violation.

    References
    ----------
    arXiv 2408.15664.
    """
    counts = tokens_per_expert.double()
    return counts.amax(dim=-1) / counts.mean(dim=-1) - 1


def lost_choices(topk_ids: Tensor, other_ids: Tensor) -> Tensor:
    """Tell of each choice (..., K) whether another choice for the same tokens lacks it, whatever their order."""
    return ~(topk_ids.unsqueeze(-1) == other_ids.unsqueeze(-2)).any(dim=-1)


def route(
    router_logits: Tensor,
    top_k: int,
    expert_bias: Tensor | None,
    **options: Any,  # noqa: ANN401  # those of ops.route
) -> tuple[Tensor, Tensor]:
    """Call :func:`torch_moe.ops.route`, or its specification on a device that has no kernels."""
    function = ops.route if has_kernels(router_logits.device) else reference.route
    return function(router_logits, top_k, expert_bias, **options)


def flat_mask(owner: str, mask: Tensor | None, tokens: Sequence[int]) -> Tensor | None:
    """Return a mask as booleans of shape (num_tokens,).

    Parameters
    ----------
    owner : str
        Whose argument it is, for the message.
    mask : Tensor or None
        False or 0 where a token is padding, in the shape of the tokens, or any shape where either is flat.
    tokens : sequence of int
        The shape of the tokens.

    Raises
    ------
    ValueError
        If the mask has other elements, or the same ones in another shape: (length, batch) is no (batch, length).
    """
    if mask is None:
        return None
    num_tokens = math.prod(tokens)
    if mask.numel() != num_tokens:
        raise ValueError(
            f"{owner}: mask must have one element per token, {num_tokens}, got shape {list(mask.shape)} "
            "(True for a token, False for padding)"
        )
    if min(mask.dim(), len(tokens)) > 1 and mask.shape != tuple(tokens):
        raise ValueError(
            f"{owner}: mask must have the shape of the tokens, {list(tokens)}, got {list(mask.shape)} (transpose it, "
            "or call .flatten() if its order is that of the tokens)"
        )
    return mask.reshape(-1).bool()


def sum_over_ranks(tensor: Tensor, process_group: ProcessGroup | None = None) -> Tensor:
    """Return the sum of ``tensor`` over a process group.

    Parameters
    ----------
    tensor : Tensor
        This rank's part; it stays as it is.
    process_group : ProcessGroup, default=None
        None is the default group where torch.distributed is initialised, and this process alone elsewhere.

    Returns
    -------
    Tensor
        The sum, on every rank.
    """
    distributed = torch.distributed
    if process_group is None and not (distributed.is_available() and distributed.is_initialized()):
        return tensor
    total = tensor.clone()
    distributed.all_reduce(total, group=process_group)
    return total


def is_recomputing() -> bool:
    """Tell whether autograd is running a backward: a forward in there is activation recomputation.

    A compiled graph recomputes by itself and runs what it traced once per call.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
