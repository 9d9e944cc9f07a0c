r"""Auxiliary losses, as functions of tensors that a routing has: returned, never collected.

One definition for every router: with :math:`f_i` the share of assignments that expert :math:`i` really got and
:math:`P_i` the mean over tokens of its score, normalised over the experts, balance reads exactly 1 for any ``top_k``,
number of experts and score function. A model's loss is the *mean* over its layers; pooling the layers first hides
layers that collapse on different experts. Multiply by a coefficient and add to the task's loss::

    output, routing = layer(x, return_routing=True)
    loss = task_loss + 0.01 * load_balancing_loss(routing.router_logits, routing.topk_ids)

NOTE: balance is not the minimum: f and P may disagree, and the value then falls below 1. Nor is the value a monitor:
all tokens on one of 8 experts at probability .13 read 1.04. Watch the counts (:class:`torch_moe.RoutingStats`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from torch_moe._routing import count_tokens, flat_mask, is_recomputing, probabilities, sum_over_ranks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["GlobalLoad", "hf_load_balancing_loss", "importance_loss", "load_balancing_loss", "load_loss", "z_loss"]


def load_balancing_loss(
    router_logits: Tensor,
    topk_ids: Tensor | None = None,
    *,
    tokens_per_expert: Tensor | None = None,
    mask: Tensor | None = None,
    score_function: str = "softmax",
    level: str = "micro",
) -> Tensor:
    r"""Return :math:`E \sum_i f_i P_i`, 1 at balance; the gradient goes through :math:`P` only.

    The load :math:`f` is that of the true routing: count ``topk_ids`` as the router gave them, bias, groups and all.
    Three levels of balance:

    - ``level="micro"``: all tokens of this call together.
    - ``level="sequence"``: each sequence alone, then the mean over the sequences.
    - global: give ``tokens_per_expert`` summed over micro-batches and ranks, from :class:`GlobalLoad`. :math:`P` stays
      local, so that the mean of the losses over micro-batches and ranks is the loss of all their tokens together.

    Parameters
    ----------
    router_logits : Tensor of shape (..., num_experts)
        The logits; (num_sequences, num_tokens, num_experts) for ``level="sequence"``.
    topk_ids : Tensor of shape (..., top_k), any integer dtype, default=None
        The chosen experts; leading dimensions as in ``router_logits``. An id outside ``[0, num_experts)`` is not
        counted: to leave out slots that capacity dropped, write ``topk_ids.masked_fill(plan.slot_to_row < 0, -1)``.
    tokens_per_expert : Tensor of shape (num_experts,), default=None
        The load itself, in place of ``topk_ids``: ``routing.tokens_per_expert`` is the load after capacity.
        (num_sequences, num_experts) for ``level="sequence"``.
    mask : Tensor of shape (...) or flat, default=None
        False or 0 where a token is padding: it enters neither :math:`f` (of ``topk_ids``) nor :math:`P`.
    score_function : {"softmax", "sigmoid", "sqrtsoftplus"}, default="softmax"
        The router's.
    level : {"micro", "sequence"}, default="micro"
        Over what the load is balanced.

    Returns
    -------
    Tensor of shape (), dtype=float32 (float64 for float64 logits)
        The loss without a coefficient; 0 where there is no token.

    Raises
    ------
    ValueError
        If a shape or option does not fit, or not exactly one of ``topk_ids`` and ``tokens_per_expert`` is given.

    References
    ----------
    arXiv 2101.03961 (Switch), 2412.19437 (sequence level), 2501.11873 (global level).
    """
    name, num_experts = "load_balancing_loss", router_logits.shape[-1]
    if (topk_ids is None) == (tokens_per_expert is None):
        raise ValueError(f"{name}: give exactly one of topk_ids and tokens_per_expert")
    tokens = _tokens_of_level(router_logits, level)
    logits = router_logits.reshape(*tokens, num_experts)
    mask = flat_mask(name, mask, router_logits.shape[:-1])
    mask = None if mask is None else mask.view(tokens)
    if topk_ids is not None:
        if topk_ids.shape[:-1].numel() != logits.shape[:-1].numel():
            raise ValueError(
                f"{name}: topk_ids must have the tokens of router_logits, {list(router_logits.shape[:-1])}, got "
                f"{list(topk_ids.shape)}"
            )
        tokens_per_expert = count_tokens(topk_ids.reshape(*tokens, -1), num_experts, mask)
    assert tokens_per_expert is not None
    expected = (*tokens[:-1], num_experts)
    if tokens_per_expert.shape != expected:
        raise ValueError(
            f"{name}: tokens_per_expert must have shape {list(expected)}, got {list(tokens_per_expert.shape)}"
        )

    if mask is not None:
        logits = logits.masked_fill(~mask.unsqueeze(-1), 0)  # else NaN in the padding would spoil the gradient
    mean_probability, num_tokens = _mean_over_tokens(probabilities(logits, score_function), mask)  # [..., E], [...]
    load = tokens_per_expert.detach().to(mean_probability.dtype)
    load = load / load.sum(dim=-1, keepdim=True).clamp(min=1)
    losses = num_experts * (load * mean_probability).sum(dim=-1)
    # A sequence without a token reads 0 and is no sequence.
    return losses.sum() / (num_tokens > 0).sum().clamp(min=1)


def _tokens_of_level(router_logits: Tensor, level: str) -> tuple[int, ...]:
    """Return the shape of the tokens, of which the last dimension is what the load is balanced over."""
    shape = router_logits.shape
    if level == "micro":
        return (shape[:-1].numel(),)
    if level != "sequence":
        raise ValueError(
            f"load_balancing_loss: level must be in ('micro', 'sequence'), got {level!r} (for the global level give "
            "tokens_per_expert of GlobalLoad)"
        )
    if len(shape) != 3:
        raise ValueError(
            "load_balancing_loss: level='sequence' needs router_logits of shape (num_sequences, num_tokens, "
            f"num_experts), got {list(shape)} (call .view)"
        )
    return tuple(shape[:-1])


def importance_loss(topk_weights: Tensor, topk_ids: Tensor, num_experts: int, *, mask: Tensor | None = None) -> Tensor:
    r"""Return :math:`E \sum_i q_i^2 = 1 + CV^2(q)`, with :math:`q_i` expert :math:`i`'s share of the gate weights.

    1 at balance, ``num_experts`` when one expert has it all; the original form is this minus 1, with the same gradient.
    It balances what the experts *weigh*, not how many tokens they get: a count has no gradient.

    Parameters
    ----------
    topk_weights : Tensor of shape (..., top_k)
        The weights, differentiable.
    topk_ids : Tensor of shape (..., top_k), any integer dtype
        The experts, distinct within a token. An id outside ``[0, num_experts)`` has no share.
    num_experts : int
        Number of experts.
    mask : Tensor of shape (...) or flat, default=None
        False or 0 where a token is padding.

    Returns
    -------
    Tensor of shape (), dtype=float32 (float64 for float64 weights)
        The loss without a coefficient; 0 where there is no weight.

    Raises
    ------
    ValueError
        If a shape does not fit.

    References
    ----------
    arXiv 1701.06538, section 4.
    """
    if topk_weights.shape != topk_ids.shape:
        raise ValueError(
            f"importance_loss: topk_weights and topk_ids must have one shape, got {list(topk_weights.shape)} and "
            f"{list(topk_ids.shape)}"
        )
    ids = topk_ids.reshape(-1, topk_ids.shape[-1]).long()
    weights = topk_weights.reshape(ids.shape).to(torch.promote_types(topk_weights.dtype, torch.float32))
    counted = (ids >= 0) & (ids < num_experts)
    mask = flat_mask("importance_loss", mask, topk_ids.shape[:-1])
    if mask is not None:
        counted = counted & mask.unsqueeze(-1)
    # Ids are distinct within a token, so that nothing is added up in an order that varies from run to run.
    gates = weights.new_zeros(ids.shape[0], num_experts + 1)
    gates = gates.scatter(1, torch.where(counted, ids, num_experts), weights.masked_fill(~counted, 0))
    return _squared_variation(gates[:, :num_experts].sum(dim=0))


def load_loss(
    noisy_logits: Tensor, clean_logits: Tensor, noise_std: Tensor, top_k: int, *, mask: Tensor | None = None
) -> Tensor:
    r"""Return :math:`E \sum_i q_i^2 = 1 + CV^2(q)`, with :math:`q_i` expert :math:`i`'s share of the smooth load.

    For the noisy top-k router. How many tokens an expert gets has no gradient; how likely it is to get them has:
    :math:`P(x, i) = \Phi((z_i - t_i) / \sigma_i)` is the probability that fresh noise on expert :math:`i` alone puts it
    among the ``top_k``, where :math:`t_i` is the ``top_k``-th largest noisy logit of the others. Its load is the sum of
    P over the tokens. 1 at balance, ``num_experts / top_k`` when the same experts get every token; the original form is
    this minus 1, with the same gradient, and is added to :func:`importance_loss`::

        output, routing = layer(x, return_routing=True)
        loss = load_loss(routing.router_logits, *layer.router.noise(x.flatten(0, -2)), top_k)

    Parameters
    ----------
    noisy_logits : Tensor of shape (..., num_experts)
        The logits that chose, of a router in training.
    clean_logits : Tensor of shape (..., num_experts)
        The same without noise, :math:`z`.
    noise_std : Tensor of shape (..., num_experts)
        Standard deviation of the noise, :math:`\sigma`.
    top_k : int
        Experts per token, fewer than there are: nothing is to be balanced where every token takes all.
    mask : Tensor of shape (...) or flat, default=None
        False or 0 where a token is padding.

    Returns
    -------
    Tensor of shape (), dtype=float32 (float64 for float64 logits)
        The loss without a coefficient; 0 where there is no token.

    Raises
    ------
    ValueError
        If a shape or ``top_k`` does not fit.

    References
    ----------
    arXiv 1701.06538, appendix A.
    """
    shape, num_experts = noisy_logits.shape, noisy_logits.shape[-1]
    if not shape == clean_logits.shape == noise_std.shape:
        raise ValueError(
            "load_loss: noisy_logits, clean_logits and noise_std must have one shape, got "
            f"{list(shape)}, {list(clean_logits.shape)} and {list(noise_std.shape)}"
        )
    if not 1 <= top_k < num_experts:
        raise ValueError(f"load_loss: top_k must be in [1, num_experts - 1 = {num_experts - 1}], got {top_k}")
    dtype = torch.promote_types(noisy_logits.dtype, torch.float32)
    noisy, clean, std = (t.reshape(-1, num_experts).to(dtype) for t in (noisy_logits, clean_logits, noise_std))
    mask = flat_mask("load_loss", mask, shape[:-1])
    padding = None if mask is None else ~mask.unsqueeze(-1)
    if padding is not None:  # else NaN in the padding would spoil the gradient
        noisy, clean = noisy.masked_fill(padding, 0), clean.masked_fill(padding, 0)
    best = noisy.topk(top_k + 1, dim=-1).values
    last, next_one = best[:, top_k - 1 : top_k], best[:, top_k:]
    threshold = torch.where(noisy >= last, next_one, last)  # the last place, were the expert not there
    probability = torch.special.ndtr((clean - threshold) / std.clamp(min=torch.finfo(dtype).eps))
    if padding is not None:
        probability = probability.masked_fill(padding, 0)
    return _squared_variation(probability.sum(dim=0))


def z_loss(router_logits: Tensor, *, mask: Tensor | None = None) -> Tensor:
    r"""Return the mean over tokens of :math:`(\log \sum_i e^{z_i})^2`, which keeps logits small.

    Parameters
    ----------
    router_logits : Tensor of shape (..., num_experts)
        The logits :math:`z`.
    mask : Tensor of shape (...) or flat, default=None
        False or 0 where a token is padding.

    Returns
    -------
    Tensor of shape (), dtype=float32 (float64 for float64 logits)
        The loss without a coefficient; 0 where there is no token.

    Raises
    ------
    ValueError
        If a shape does not fit.

    References
    ----------
    arXiv 2202.08906 (ST-MoE), which uses the coefficient 1e-3.
    """
    logits = router_logits.reshape(-1, router_logits.shape[-1])
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    mask = flat_mask("z_loss", mask, router_logits.shape[:-1])
    if mask is not None:
        logits = logits.masked_fill(~mask.unsqueeze(-1), 0)
    return _mean_over_tokens(logits.logsumexp(dim=-1).square().unsqueeze(-1), mask)[0].squeeze(-1)


def hf_load_balancing_loss(
    router_logits: Tensor | Sequence[Tensor], top_k: int, *, attention_mask: Tensor | None = None
) -> Tensor:
    r"""Return the loss as Hugging Face transformers defines it, for comparison: it reads ``top_k`` at balance.

    Its load is a plain top-k of the softmax, whatever the router did, and its layers are pooled before the product. For
    one softmax layer without bias, groups and capacity it is ``top_k`` times :func:`load_balancing_loss`.

    Parameters
    ----------
    router_logits : Tensor of shape (num_tokens, num_experts), or a sequence of them, one per layer
        The logits.
    top_k : int
        Experts per token.
    attention_mask : Tensor of shape (batch_size, sequence_length), default=None
        0 where a token is padding; the tokens of every layer.

    Returns
    -------
    Tensor of shape (), dtype=float32 (float64 for float64 logits)
        The loss without a coefficient.

    Raises
    ------
    ValueError
        If the mask does not fit.
    """
    layers = [router_logits] if isinstance(router_logits, Tensor) else list(router_logits)
    probability = torch.cat([probabilities(layer.reshape(-1, layer.shape[-1])) for layer in layers])  # [L * T, E]
    num_experts = probability.shape[-1]
    chosen = functional.one_hot(probability.topk(top_k, dim=-1).indices, num_experts).sum(dim=1)  # [L * T, E]
    mask = flat_mask("hf_load_balancing_loss", attention_mask, [probability.shape[0] // len(layers)])
    mask = None if mask is None else mask.repeat(len(layers))
    mean_chosen = _mean_over_tokens(chosen.to(probability.dtype), mask)[0]
    return num_experts * (mean_chosen * _mean_over_tokens(probability, mask)[0]).sum()


class GlobalLoad:
    """The load of one layer summed over micro-batches and ranks, for :func:`load_balancing_loss` at the global level.

    Call it once per micro-batch: it returns the load of this optimiser step so far. Call :meth:`reset` after the
    optimiser's step. Inside a region that is recomputed for the backward, the second run adds nothing.

    Parameters
    ----------
    num_experts : int
        Number of experts.
    process_group : ProcessGroup, default=None
        Ranks to sum over; None is the default group where torch.distributed is initialised.

    References
    ----------
    arXiv 2501.11873.

    Examples
    --------
    >>> load = GlobalLoad(num_experts=4)
    >>> load(torch.tensor([[0, 1], [0, 2]]))
    tensor([2, 1, 1, 0])
    >>> load(torch.tensor([[3, 1], [3, 2]]))
    tensor([2, 2, 2, 2])
    """

    def __init__(self, num_experts: int, process_group: ProcessGroup | None = None) -> None:
        self.num_experts = num_experts
        self.process_group = process_group
        self.tokens_per_expert = torch.zeros(num_experts, dtype=torch.int64)

    @torch.no_grad()
    def __call__(self, topk_ids: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Add the experts that a micro-batch chose.

        Parameters
        ----------
        topk_ids : Tensor of shape (..., top_k), any integer dtype
            The experts, as in :func:`load_balancing_loss`.
        mask : Tensor of shape (...) or flat, default=None
            False or 0 where a token is padding.

        Returns
        -------
        Tensor of shape (num_experts,), dtype=int64
            The load since the last reset, this micro-batch included.
        """
        if self.tokens_per_expert.device != topk_ids.device:
            self.tokens_per_expert = self.tokens_per_expert.to(topk_ids.device)
        if not is_recomputing():
            ids = topk_ids.reshape(-1, topk_ids.shape[-1])
            counts = count_tokens(ids, self.num_experts, flat_mask("GlobalLoad", mask, topk_ids.shape[:-1]))
            self.tokens_per_expert.add_(sum_over_ranks(counts, self.process_group))
        return self.tokens_per_expert.clone()

    def reset(self) -> None:
        """Forget the load: a new optimiser step begins."""
        self.tokens_per_expert.zero_()


def _squared_variation(amounts: Tensor) -> Tensor:
    """Return 1 plus the squared coefficient of variation of what each expert has (num_experts,), 0 if none has any."""
    share = amounts / amounts.sum().clamp(min=torch.finfo(amounts.dtype).tiny)
    return amounts.shape[0] * share.square().sum()


def _mean_over_tokens(values: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the mean of ``values`` (..., T, N) over the unmasked tokens, 0 without any, and their number (...)."""
    if mask is None:
        num_tokens = torch.full(values.shape[:-2], values.shape[-2], dtype=values.dtype, device=values.device)
        return values.sum(dim=-2) / max(values.shape[-2], 1), num_tokens
    num_tokens = mask.sum(dim=-1, dtype=values.dtype)
    total = values.masked_fill(~mask.unsqueeze(-1), 0).sum(dim=-2)
    return total / num_tokens.unsqueeze(-1).clamp(min=1), num_tokens
