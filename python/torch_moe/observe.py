"""Hooks that read what routers decide, each forward once: the common part of balancers and statistics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torch_moe._routing import flat_mask, is_recomputing
from torch_moe.nn.router import TopKRouter


class Observation(NamedTuple):
    """What one call of a router decided; what a balancer or metric does not need may be None.

    Attributes
    ----------
    topk_ids : Tensor of shape (num_tokens, top_k), any integer dtype
        The chosen experts. An id outside ``[0, num_experts)`` is not counted.
    topk_weights : Tensor of shape (num_tokens, top_k), default=None
        Their weights.
    router_logits : Tensor of shape (num_tokens, num_experts), default=None
        The logits.
    expert_bias : Tensor of shape (num_experts,), default=None
        What was added to the scores for the selection.
    route_options : mapping, default=None
        The keyword arguments of :func:`torch_moe.ops.route` that select these ids; None if none do.
    tokens_per_expert : Tensor of shape (num_experts,), default=None
        The load after capacity.
    score_function : str, default="softmax"
        What makes probabilities of the logits, where ``route_options`` does not tell.
    is_replay : bool, default=False
        Whether the ids were given to the router: then they follow from no logits of this call.
    """

    topk_ids: Tensor
    topk_weights: Tensor | None = None
    router_logits: Tensor | None = None
    expert_bias: Tensor | None = None
    route_options: Mapping[str, Any] | None = None
    tokens_per_expert: Tensor | None = None
    score_function: str = "softmax"
    is_replay: bool = False


Read = Callable[[nn.Module, tuple[Any, ...], Any], Observation]
"""Makes an Observation of a router, the arguments it was called with, and what it returned."""

# Those of route's options that the selection depends on.
_SELECTION = ("score_function", "score_order", "num_groups", "topk_groups", "group_score", "group_mask")


def read_router(router: nn.Module, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> Observation:
    """Read a :class:`torch_moe.TopKRouter`, or any module that returns its tensors.

    Parameters
    ----------
    router : Module
        What was called.
    inputs : tuple
        Its positional arguments, which are not looked at.
    output : tuple
        Logits, weights and ids, and perhaps more.

    Returns
    -------
    Observation
        With ``route_options`` where :func:`torch_moe.ops.route` selects the ids of a TopKRouter from its logits.
    """
    router_logits, topk_weights, topk_ids = output[:3]
    bias = getattr(router, "expert_bias", None)
    if not isinstance(router, TopKRouter):
        return Observation(topk_ids, topk_weights, router_logits, bias)
    config = router.config
    forced = config.force_balanced or config.force_biased > 0 or config.second_expert_policy == "sampling"
    by_route = config.selection in ("topk", "top2_gshard") and not forced
    options = {name: getattr(config, name) for name in _SELECTION} if by_route else None
    function = config.score_function
    return Observation(topk_ids, topk_weights, router_logits, bias, options, score_function=function)


def find_routers(model: nn.Module | Iterable[nn.Module]) -> list[nn.Module]:
    """Return the routers of a model in its order, each once; an iterable of modules is taken as it is."""
    if isinstance(model, nn.Module):
        return [module for module in model.modules() if isinstance(module, TopKRouter)]
    return list(dict.fromkeys(model))


class RouterObserver(ABC):
    """Base of what watches the routers of a model, one *layer* per router.

    It is no module: it lives beside the model as an optimiser does, with a ``state_dict`` of its own, so that neither
    casting the model nor the broadcast of its buffers touches the counts.

    Attributes
    ----------
    mask : Tensor or None
        False or 0 where a token of the next forward is padding, one element per token in the routers' order. Set it
        before each forward of a padded batch; None counts all tokens.
    """

    def __init__(self) -> None:
        self.mask: Tensor | None = None
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def watch(self, routers: Iterable[nn.Module], read: Read = read_router) -> None:
        """Observe each forward of ``routers``, layer by layer in their order, until :meth:`detach`.

        Parameters
        ----------
        routers : iterable of Module
            One per layer.
        read : callable, default=read_router
            Makes an :class:`Observation` of a router, the arguments it was called with, and what it returned.
        """
        for layer, router in enumerate(routers):
            hook = partial(self._on_forward, layer, read)
            self._hooks.append(router.register_forward_hook(hook, with_kwargs=True))

    def _on_forward(
        self,
        layer: int,
        read: Read,
        router: nn.Module,
        inputs: tuple[Any, ...],
        options: dict[str, Any],
        output: Any,  # noqa: ANN401
    ) -> None:
        # A forward inside the backward is the recomputation of one that was counted.
        if self._wants(router) and not is_recomputing():
            observation = read(router, inputs, output)
            if options.get("route_override") is not None:
                observation = observation._replace(is_replay=True)
            self.observe(observation, layer, mask=self.mask)

    def _wants(self, router: nn.Module) -> bool:
        """Tell whether a forward of ``router`` in its present mode counts."""
        return True

    @abstractmethod
    def observe(self, observation: Observation, layer: int = 0, *, mask: Tensor | None = None) -> None:
        """Take in one forward of one layer, except the tokens where ``mask`` is False or 0."""

    def detach(self) -> None:
        """Remove the hooks; what was observed stays."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()


def token_mask(owner: str, observation: Observation, mask: Tensor | None) -> Tensor | None:
    """Return the mask as booleans of shape (num_tokens,), or raise if it does not fit the observation."""
    return flat_mask(owner, mask, observation.topk_ids.shape[:-1])
