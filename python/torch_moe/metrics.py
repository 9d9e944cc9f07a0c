"""RoutingStats: what routers did, summed on the device, read when asked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torch_moe import ops
from torch_moe._layer_sums import LayerSums
from torch_moe._routing import flat_mask, is_recomputing, lost_choices, max_vio, sum_over_ranks
from torch_moe.nn.layer import MoE
from torch_moe.nn.router import TopKRouter
from torch_moe.observe import Observation, Read, RouterObserver, find_routers, read_router, token_mask
from torch_moe.summary import Summary

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["RoutingStats", "flip_rate", "max_vio"]


def flip_rate(topk_ids: Tensor, other_ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the share of chosen experts that another choice for the same tokens does not have.

    The order within a token does not matter.

    Parameters
    ----------
    topk_ids, other_ids : Tensor of shape (..., top_k), any integer dtype
        The two choices.
    mask : Tensor of shape (...), default=None
        False or 0 where a token is padding.

    Returns
    -------
    Tensor of shape (), dtype=float32
        The share; NaN where there is no token.

    Raises
    ------
    ValueError
        If the tokens differ, or the mask does not fit them.
    """
    tokens = topk_ids.shape[:-1]
    if other_ids.shape[:-1] != tokens:
        raise ValueError(
            f"flip_rate: other_ids must have the tokens of topk_ids, {list(tokens)}, got shape {list(other_ids.shape)}"
        )
    lost = lost_choices(topk_ids, other_ids)
    mask = flat_mask("flip_rate", mask, tokens)
    if mask is None:
        return lost.sum() / lost.numel()
    lost = lost & mask.view(tokens).unsqueeze(-1)
    return lost.sum() / (mask.sum() * lost.shape[-1])


class RoutingStats(RouterObserver):
    """Statistics of the routers of a model, per layer, without a wait for the device until they are read.

    Every forward adds to sums on the layer's device; :meth:`metrics` turns them into numbers there, and only
    :meth:`summary` copies them to the host. Recomputed activations are counted once; training and evaluation are both
    counted (``detach`` or ``reset`` between them to tell them apart). A forward costs about twice the router's own:
    attach for some steps only where that is too much.

    - ``tokens_per_expert``: how often each expert was chosen; ``gate_mass``: the weights it got.
    - ``max_vio``: the largest load over the mean load, minus 1, of the whole record; ``micro_max_vio``: the mean of
      that over the calls.
    - ``entropy``: of a token's probabilities over ln(num_experts), the mean: low is sure. ``mean_entropy``: the same of
      the mean probabilities; the difference is the mutual information of token and expert.
    - ``effective_experts``: exp of the entropy of the loads.
    - ``dead``, ``cold``: share of the experts with no token, and with less than a tenth of the fair load.
    - ``drop_rate``: share of the slots that capacity dropped.
    - ``margin``: between the lowest chosen and the highest other candidate (score and bias), the mean. Negative where
      groups kept a better expert out.
    - ``flip_rate``: share of the choices that would differ if the logits were rounded to bf16.

    Parameters
    ----------
    num_experts : int or sequence of int
        Number of experts, of each layer.
    num_layers : int, default=1
        Number of layers, if ``num_experts`` is one number.

    Raises
    ------
    ValueError
        If a size is less than 1.

    Examples
    --------
    >>> stats = RoutingStats(num_experts=4)
    >>> stats.observe(Observation(topk_ids=torch.tensor([[0, 1], [0, 2], [0, 1]])))
    >>> stats.tokens_per_expert(0)
    tensor([3, 2, 1, 0])
    >>> stats.metrics()["max_vio"]
    tensor([1.], dtype=torch.float64)
    """

    def __init__(self, num_experts: int | Sequence[int], num_layers: int = 1) -> None:
        super().__init__()
        sizes = [num_experts] * num_layers if isinstance(num_experts, int) else list(num_experts)
        if not sizes or min(sizes) < 1:
            raise ValueError(f"RoutingStats: num_experts and num_layers must be at least 1, got {sizes}")
        self._layers = [LayerSums(size) for size in sizes]

    @classmethod
    def attach(cls, model: nn.Module | Iterable[nn.Module], *, read: Read = read_router) -> RoutingStats:
        """Watch the routers of a model, and what their experts drop.

        Parameters
        ----------
        model : Module or iterable of Module
            A model, whose :class:`torch_moe.MoE` and lone :class:`torch_moe.TopKRouter` are watched; or router modules
            themselves, of any class that has ``num_experts`` and that ``read`` understands.
        read : callable, default=read_router
            As in :meth:`RouterObserver.watch`.

        Returns
        -------
        RoutingStats
            One layer per router, in the model's order.

        Raises
        ------
        ValueError
            If there is no router.
        """
        routers = find_routers(model)
        if not routers:
            raise ValueError("RoutingStats: no router to watch")
        # Experts without weights can be chosen, too.
        choices = (
            router.config.num_choices if isinstance(router, TopKRouter) else router.num_experts for router in routers
        )
        stats = cls([int(size) for size in choices])  # type: ignore[arg-type]
        stats.watch(routers, read)
        layers = {router: layer for layer, router in enumerate(routers)}
        for module in model.modules() if isinstance(model, nn.Module) else ():
            if isinstance(module, MoE) and module.router in layers:
                layer = layers[module.router]
                stats._layers[layer].num_limited = module.experts.num_experts
                hook = partial(stats._on_experts, layer)
                stats._hooks.append(module.experts.register_forward_pre_hook(hook))
        return stats

    @torch.no_grad()
    def _on_experts(self, layer: int, experts: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Take off the slots that are kept from those that :meth:`observe` took for dropped."""
        if is_recomputing():
            return
        *_, plan = inputs  # or ids, of which nothing was dropped
        of_expert = plan.slot_to_row >= 0 if isinstance(plan, ops.Plan) else (plan >= 0) & (plan < experts.num_experts)
        mask = flat_mask("RoutingStats", self.mask, of_expert.shape[:-1])
        kept = of_expert if mask is None else of_expert & mask.unsqueeze(-1)  # [T, K]
        self._layers[layer].take_off_kept(kept)

    @torch.no_grad()
    def observe(self, observation: Observation, layer: int = 0, *, mask: Tensor | None = None) -> None:
        """Add one forward of one layer.

        Parameters
        ----------
        observation : Observation
            The router's choice; what follows from a part of it that is None is not counted.
        layer : int, default=0
            Whose.
        mask : Tensor, default=None
            False or 0 where a token is padding, one element per token.

        Raises
        ------
        ValueError
            If the mask does not fit, or ``observation.tokens_per_expert`` is given with a mask: capacity counted the
            padding.
        """
        mask = token_mask("RoutingStats", observation, mask)
        if observation.tokens_per_expert is not None and mask is not None:
            raise ValueError("RoutingStats: tokens_per_expert counts padding, leave it out of a masked observation")
        self._layers[layer].add(observation, mask)

    def tokens_per_expert(self, layer: int) -> Tensor:
        """Return how often each expert of a layer was chosen.

        Parameters
        ----------
        layer : int
            Its number, in the model's order.

        Returns
        -------
        Tensor of shape (num_experts,), dtype=int64
            A copy, on the layer's device.
        """
        return self._layers[layer].tokens_per_expert.clone()

    def gate_mass(self, layer: int) -> Tensor:
        """Return the sum of the weights that each expert of a layer got.

        Parameters
        ----------
        layer : int
            Its number, in the model's order.

        Returns
        -------
        Tensor of shape (num_experts,), dtype=float64
            A copy, on the layer's device; exact to 2**-32 per weight.
        """
        return self._layers[layer].gate_mass.clone()

    @torch.no_grad()
    def metrics(self) -> dict[str, Tensor]:
        """Return each metric of the class by name.

        Returns
        -------
        dict of str to Tensor of shape (num_layers,), dtype=float64
            On the device of the first layer; NaN where nothing was observed.
        """
        device = self._layers[0].means.device
        layers = [sums.metrics() for sums in self._layers]
        return {name: torch.stack([layer[name].to(device) for layer in layers]) for name in layers[0]}

    def summary(self) -> Summary:
        """Copy the metrics to the host, which waits for the device.

        Returns
        -------
        Summary
            A table with one row per layer, text for ``print`` and a table for rich; ``-`` was not observed.
        """
        metrics = self.metrics()
        columns = [[f"{value:.4g}" if value == value else "-" for value in metrics[name].tolist()] for name in metrics]
        tokens = [str(int(sums.tokens_per_expert.sum())) for sums in self._layers]
        numbers = [str(layer) for layer in range(len(self._layers))]
        header = ["layer", "choices", *(name.replace("_", " ") for name in metrics)]
        return Summary("Routing", header, list(zip(numbers, tokens, *columns, strict=True)))

    def reset(self) -> None:
        """Forget everything observed."""
        for sums in self._layers:
            for value in sums.tensors().values():
                value.zero_()

    def merge(self, other: RoutingStats) -> None:
        """Add the record of another object, of another rank or another part of the data.

        Parameters
        ----------
        other : RoutingStats
            Of the same layers; it stays as it is.

        Raises
        ------
        ValueError
            If the layers differ.
        """
        self._add(other.state_dict())

    def sum_over_ranks(self, process_group: ProcessGroup | None = None) -> None:
        """Replace the record by its sum over all ranks, which all must call; then read it, and ``reset``.

        Parameters
        ----------
        process_group : ProcessGroup, default=None
            None is the default group where torch.distributed is initialised.
        """
        for sums in self._layers:
            for value in sums.tensors().values():
                value.copy_(sum_over_ranks(value, process_group))

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of all sums.

        Returns
        -------
        dict of str to Tensor
            By ``"<layer>.<name>"``; what is summed is additive over micro-batches, ranks and runs.
        """
        return {
            f"{layer}.{name}": value.clone()
            for layer, sums in enumerate(self._layers)
            for name, value in sums.tensors().items()
        }

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Replace the record by what :meth:`state_dict` returned.

        Parameters
        ----------
        state_dict : dict of str to Tensor
            Of the same layers.

        Raises
        ------
        ValueError
            If the layers differ; the record then stays.
        """
        self._add(state_dict, replace=True)

    def _add(self, state_dict: dict[str, Tensor], replace: bool = False) -> None:
        own = {f"{n}.{name}": value for n, sums in enumerate(self._layers) for name, value in sums.tensors().items()}
        shapes = [{name: list(value.shape) for name, value in record.items()} for record in (own, state_dict)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"RoutingStats: the record must have the shapes {shapes[0]}, got {shapes[1]}")
        for name, value in own.items():
            if replace:
                value.zero_()
            value.add_(state_dict[name].to(value.device))
