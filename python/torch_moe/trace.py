"""trace: one token's way through a layer, step by step, in numbers one can check by hand."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torch_moe import ops
from torch_moe._routing import probabilities, scores
from torch_moe.nn.layer import MoE
from torch_moe.nn.router_output import ExtendedRouterOutput, RouterOutput
from torch_moe.summary import Summary


class Trace(NamedTuple):
    """What a layer did with one token; ``print`` shows a table of the experts, chosen ones first.

    Attributes
    ----------
    router_logits : Tensor of shape (num_experts,)
        The router's linear map of the token.
    scores : Tensor of shape (num_experts,)
        The score function of each logit.
    probabilities : Tensor of shape (num_experts,)
        The scores over their sum; of a softmax, the scores themselves.
    expert_bias : Tensor of shape (num_experts,), or None
        What is added to the scores for the selection only.
    topk_ids : Tensor of shape (top_k,), dtype=int32
        The chosen experts, numbered from 0.
    topk_weights : Tensor of shape (top_k,)
        Their weights.
    contributions : Tensor of shape (top_k, hidden_size)
        Each chosen expert's output times its weight.
    shared : Tensor of shape (hidden_size,), or None
        The output of the shared experts.
    output : Tensor of shape (hidden_size,)
        The layer's output for this token alone: the sum of the contributions, and of ``shared``.
    """

    router_logits: Tensor
    scores: Tensor
    probabilities: Tensor
    expert_bias: Tensor | None
    topk_ids: Tensor
    topk_weights: Tensor
    contributions: Tensor
    shared: Tensor | None
    output: Tensor

    def summary(self) -> Summary:
        """Return one row per expert, and one for the shared experts; ``|contribution|`` is a Euclidean norm."""
        chosen = {expert: choice for choice, expert in enumerate(self.topk_ids.tolist())}
        others = [expert for expert in range(len(self.scores)) if expert not in chosen]
        rows = []
        for expert in [expert for expert in chosen if 0 <= expert < len(self.scores)] + others:
            cells = [self.router_logits[expert], self.scores[expert], self.probabilities[expert]]
            if self.expert_bias is not None:
                cells.append(self.expert_bias[expert])
            if expert in chosen:
                choice = chosen[expert]
                cells += [self.topk_weights[choice], self.contributions[choice].norm()]
            rows.append([str(expert), *(f"{cell.item():.4f}" for cell in cells)])
        header = ["expert", "logit", "score", "probability", "weight", "|contribution|"]
        if self.expert_bias is not None:
            header.insert(4, "bias")
        if self.shared is not None:
            rows.append(["shared", *[""] * (len(header) - 2), f"{self.shared.norm().item():.4f}"])
        rows = [row + [""] * (len(header) - len(row)) for row in rows]
        return Summary(f"{len(chosen)} of {len(self.scores)} experts", header, rows)

    def __str__(self) -> str:
        """Return the summary as text."""
        return str(self.summary())


@torch.no_grad()
def trace(layer: MoE, x: Tensor, *, token_ids: Tensor | None = None) -> Trace:
    """Follow one token through a layer, in eval mode; training is not disturbed.

    Alone, the token meets no capacity limit.

    Parameters
    ----------
    layer : MoE
        The layer.
    x : Tensor of shape (hidden_size,), or any with one token
        The token.
    token_ids : Tensor of one integer, default=None
        Its id, which ``selection="hash"`` looks up.

    Returns
    -------
    Trace
        Every intermediate result.

    Raises
    ------
    ValueError
        If ``x`` is not one token of the layer's width.

    Examples
    --------
    Eight experts, of which expert e multiplies a positive input by e, and a router that hands its input through:

    >>> layer = MoE(hidden_size=8, intermediate_size=8, num_experts=8, top_k=2, activation="relu")
    >>> with torch.no_grad():
    ...     _ = layer.router.weight.copy_(torch.eye(8))
    ...     _ = layer.experts.gate_up_proj.copy_(torch.eye(8).expand(8, 8, 8))
    ...     _ = layer.experts.down_proj.copy_(torch.arange(8).view(8, 1, 1) * torch.eye(8))
    >>> token = torch.tensor([2.1, 0.3, -1.5, 0.8, -0.2, 2.9, 0.1, -0.7])
    >>> result = trace(layer, token)
    >>> print(result)
    2 of 8 experts
    expert    logit   score  probability  weight  |contribution|
         5   2.9000  0.5582       0.5582  0.6900         12.7038
         0   2.1000  0.2508       0.2508  0.3100          0.0000
         1   0.3000  0.0415       0.0415
         2  -1.5000  0.0069       0.0069
         3   0.8000  0.0684       0.0684
         4  -0.2000  0.0251       0.0251
         6   0.1000  0.0339       0.0339
         7  -0.7000  0.0153       0.0153
    >>> torch.equal(result.output, layer(token))
    True
    """
    hidden_size = layer.router.hidden_size
    if x.numel() != hidden_size or x.shape[-1:] != (hidden_size,):
        raise ValueError(f"trace: x must be one token of hidden_size {hidden_size}, got shape {list(x.shape)}")
    mode = {module: module.training for module in layer.modules()}
    layer.eval()
    try:
        # The parts' forward, not the parts: hooks that count what a layer does are not to count this.
        token = x.reshape(1, hidden_size)
        routed = layer.router.forward(token, token_ids=token_ids)
        # One row per choice: each goes through its own expert alone, with its own weight.
        each = RouterOutput(routed.router_logits, routed.topk_weights.view(-1, 1), routed.topk_ids.view(-1, 1))
        contributions = _routed(layer, token.expand(len(each.topk_ids), -1), each)
        weights = getattr(routed, "shared_weights", None)
        weighed = () if weights is None else (weights,)
        shared = None if layer.shared_experts is None else layer.shared_experts.forward(token, *weighed)
        others = [*([] if shared is None else [shared]), *_without_weights(layer, token, routed)]
        output = layer._finish(_summed(layer, token, routed), others)[0]
        shared = None if shared is None else shared[0]
    finally:
        for module, training in mode.items():
            module.training = training
    function, router_logits = layer.router.config.score_function, routed.router_logits[0]
    bias = layer.router.expert_bias
    return Trace(
        router_logits,
        scores(router_logits, function),
        probabilities(router_logits, function),
        None if bias is None else bias.clone(),  # a balancer moves it in place
        routed.topk_ids[0],
        routed.topk_weights[0],
        contributions,
        shared,
        output,
    )


def _summed(layer: MoE, tokens: Tensor, routed: RouterOutput | ExtendedRouterOutput) -> Tensor:
    """Return what the chosen experts give, in their own width."""
    plan = ops.plan(routed.topk_ids, layer.router.num_experts)
    return layer.experts.forward(layer._narrow(tokens), layer.router.weights_of_kept(routed, plan), plan)


def _routed(layer: MoE, tokens: Tensor, routed: RouterOutput) -> Tensor:
    """Return what the chosen experts give, those without weights included, in the width of a token."""
    output = layer.experts.forward(
        layer._narrow(tokens), routed.topk_weights, ops.plan(routed.topk_ids, layer.router.num_experts)
    )
    output = output if layer.latent_up is None else layer.latent_up(output)
    return sum(_without_weights(layer, tokens, routed), output)


def _without_weights(layer: MoE, tokens: Tensor, routed: RouterOutput | ExtendedRouterOutput) -> list[Tensor]:
    config = layer.config.router
    has_some = config.num_zero_experts > 0 and config.zero_expert == "identity"
    return [layer._identity(tokens, routed)] if has_some else []
