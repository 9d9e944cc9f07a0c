"""RoutingStats: what routers did, summed on the device, read when asked."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torch_moe import ops, reference
from torch_moe._routing import count_tokens, flat_mask, is_recomputing, normalized, scores, sum_over_ranks
from torch_moe.nn.layer import MoE
from torch_moe.nn.router import TopKRouter
from torch_moe.observe import Observation, Read, RouterObserver, find_routers, read_router, token_mask
from torch_moe.summary import Summary

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

COLD_SHARE = 0.1
"""An expert with less than this part of its fair load is cold."""

# Means are kept as a sum and the weight it is over, so that records add up in any order.
_MEANS = ("micro_max_vio", "entropy", "drop_rate", "margin", "flip_rate")


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
    """
    kept = (topk_ids.unsqueeze(-1) == other_ids.unsqueeze(-2)).any(dim=-1)
    if mask is not None:
        kept = kept | ~mask.bool().view(kept.shape[:-1]).unsqueeze(-1)
    slots = kept.numel() if mask is None else mask.bool().sum() * kept.shape[-1]
    return (~kept).sum() / slots


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
        self._layers = [_Sums(size) for size in sizes]

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
            if isinstance(module, MoE):
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
        mask = flat_mask("RoutingStats", self.mask, of_expert.shape[0])
        kept = of_expert if mask is None else of_expert & mask.unsqueeze(-1)  # [T, K]
        sums = self._layers[layer]
        sums.move(kept.device)
        sums.means[0, _MEANS.index("drop_rate")] -= kept.sum()

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
        ids, weights, logits, bias, options, kept, score_function = observation
        mask = token_mask("RoutingStats", observation, mask)
        if kept is not None and mask is not None:
            raise ValueError("RoutingStats: tokens_per_expert counts padding, leave it out of a masked observation")
        sums = self._layers[layer]
        sums.move(ids.device)
        num_experts = sums.tokens_per_expert.numel()

        ids = ids.long()
        counted = (ids >= 0) & (ids < num_experts)
        if mask is not None:
            counted = counted & mask.unsqueeze(-1)
        counts = count_tokens(ids, num_experts, mask)
        num_slots = counted.sum()
        sums.tokens_per_expert += counts
        seen = num_slots > 0
        sums.add_mean("micro_max_vio", torch.where(seen, max_vio(counts), 0), seen)
        if sums.num_limited is not None:
            limited = counts[: sums.num_limited].sum()
            sums.add_mean("drop_rate", limited, limited)
        elif kept is not None:
            sums.add_mean("drop_rate", num_slots - kept.sum(), num_slots)

        if weights is not None:
            sums.gate_mass += _per_expert(weights, ids, counted, num_experts)
        if logits is None:
            return
        options = {"score_function": score_function, **(options or {})}
        score = scores(logits, options["score_function"])  # [T, E], as few passes over it as there can be
        probability = normalized(score, options["score_function"])
        entropy = torch.special.entr(probability).sum(dim=-1) / max(math.log(num_experts), 1e-300)
        if mask is not None:
            probability, entropy = probability.masked_fill(~mask.unsqueeze(-1), 0), entropy.masked_fill(~mask, 0)
        num_tokens = torch.full_like(num_slots, ids.shape[0]) if mask is None else mask.sum()
        sums.add_mean("entropy", entropy.sum(), num_tokens)
        sums.probability_mass += probability.sum(dim=0)
        if observation.route_options is None:
            return
        if ids.shape[-1] < num_experts:
            candidates = logits if options.get("score_order") == "topk_then_score" else score
            margin, known = _margins(candidates if bias is None else candidates + bias, ids, counted)
            sums.add_mean("margin", torch.where(known, margin, 0).sum(), known.sum())
        # The specification stands in for the operator on devices that have none yet.
        route = ops.route if logits.is_cpu else reference.route
        rounded = logits.to(torch.bfloat16).to(logits.dtype)
        other = route(rounded, ids.shape[-1], bias if bias is None else bias.to(rounded.dtype), **options)[1]
        lost = ~(ids.unsqueeze(-1) == other.unsqueeze(-2)).any(dim=-1) & counted
        sums.add_mean("flip_rate", lost.sum(), num_slots)

    def tokens_per_expert(self, layer: int) -> Tensor:
        """Return how often each expert of a layer was chosen, (num_experts,), dtype=int64; a copy."""
        return self._layers[layer].tokens_per_expert.clone()

    def gate_mass(self, layer: int) -> Tensor:
        """Return the sum of the weights that each expert of a layer got, (num_experts,), dtype=float64; a copy."""
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
        """Copy the metrics to the host: a table with one row per layer, rich's where rich prints it."""
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
        """Return copies of all sums by layer and name."""
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


class _Sums:
    """The sums of one layer, all additive."""

    def __init__(self, num_experts: int) -> None:
        self.tokens_per_expert = torch.zeros(num_experts, dtype=torch.int64)
        self.gate_mass = torch.zeros(num_experts, dtype=torch.float64)
        self.probability_mass = torch.zeros(num_experts, dtype=torch.float64)
        self.means = torch.zeros(2, len(_MEANS), dtype=torch.float64)  # sums, and the weights they are over
        self.num_limited: int | None = None  # experts whose kept slots are seen, the first ones

    def tensors(self) -> dict[str, Tensor]:
        names = ("tokens_per_expert", "gate_mass", "probability_mass", "means")
        return {name: getattr(self, name) for name in names}

    def move(self, device: torch.device) -> None:
        """Keep the sums where the routing comes from: no copy, and no wait, per forward."""
        if self.means.device != device:
            for name, value in self.tensors().items():
                setattr(self, name, value.to(device))

    def add_mean(self, name: str, value: Tensor, weight: Tensor) -> None:
        column = _MEANS.index(name)
        self.means[0, column] += value
        self.means[1, column] += weight

    def metrics(self) -> dict[str, Tensor]:
        counts, num_experts = self.tokens_per_expert, self.tokens_per_expert.numel()
        load, probability = counts / counts.sum(), self.probability_mass / self.probability_mass.sum()
        seen = torch.where(counts.sum() > 0, 1.0, torch.nan)
        means = dict(zip(_MEANS, self.means[0] / self.means[1], strict=True))
        cold = counts < COLD_SHARE * counts.sum() / num_experts
        return {
            "max_vio": max_vio(counts),
            "micro_max_vio": means["micro_max_vio"],
            "effective_experts": torch.special.entr(load.double()).sum().exp(),
            "dead": (counts == 0).double().mean() * seen,
            "cold": cold.double().mean() * seen,
            "drop_rate": means["drop_rate"],
            "entropy": means["entropy"],
            "mean_entropy": torch.special.entr(probability).sum() / max(math.log(num_experts), 1e-300),
            "margin": means["margin"],
            "flip_rate": means["flip_rate"],
        }


def _per_expert(values: Tensor, ids: Tensor, counted: Tensor, num_experts: int) -> Tensor:
    """Return the sum of ``values`` [T, K] of each expert, [E], fp64.

    In integers of 2**-32, which add up to the same sum in any order: the order varies from run to run on a GPU.
    """
    integers = (torch.where(counted, values, 0).double() * 2**32).round().long().flatten()
    bins = torch.where(counted, ids, 0).flatten()
    return bins.new_zeros(num_experts).scatter_add(0, bins, integers).double() / 2**32


def _margins(candidates: Tensor, ids: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """Return the lowest chosen minus the highest other candidate of each token, [T], and where both are known."""
    valid = ids.clamp(0, candidates.shape[-1] - 1)
    margin = candidates.gather(1, valid).amin(dim=-1) - candidates.scatter(1, valid, -torch.inf).amax(dim=-1)
    return margin, counted.all(dim=-1) & margin.isfinite()
