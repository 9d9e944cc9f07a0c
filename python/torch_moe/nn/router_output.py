"""What a router hands to the layer, the losses and the observers."""

from typing import NamedTuple

from torch import Tensor


class RouterOutput(NamedTuple):
    """What a router decided.

    Attributes
    ----------
    router_logits : Tensor of shape (num_tokens, num_experts), dtype=float32
        The logits, differentiable, after noise and softcap. Zero experts have columns too.
    topk_weights : Tensor of shape (num_tokens, top_k), dtype=float32
        The weights, differentiable.
    topk_ids : Tensor of shape (num_tokens, top_k), dtype=int32
        The experts, before anything is dropped. With expert choice the number of columns varies, and -1 is none.
    """

    router_logits: Tensor
    topk_weights: Tensor
    topk_ids: Tensor


class ExtendedRouterOutput(NamedTuple):
    """What a router returns that does more than choose: those with shared sinks or a state.

    Attributes
    ----------
    router_logits, topk_weights, topk_ids
        As in :class:`RouterOutput`.
    shared_weights : Tensor of shape (num_tokens, num_shared_sinks), dtype=float32, or None
        What the shared experts weigh.
    router_state : Tensor of shape (num_tokens, projection_size), dtype=float32, or None
        To be given to the router of the next layer.
    """

    router_logits: Tensor
    topk_weights: Tensor
    topk_ids: Tensor
    shared_weights: Tensor | None = None
    router_state: Tensor | None = None
