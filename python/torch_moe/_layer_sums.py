"""What RoutingStats keeps of one layer: sums on the layer's device, and the metrics that follow from them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torch_moe._routing import count_tokens, lost_choices, max_vio, normalized, route, scores
from torch_moe.observe import Observation

COLD_SHARE = 0.1
"""An expert with less than this part of its fair load is cold."""

# Means are kept as a sum and the weight it is over, so that records add up in any order.
_MEANS = ("micro_max_vio", "entropy", "drop_rate", "margin", "flip_rate")


class LayerSums:
    """The sums of one layer, all additive. T tokens, K top_k, E num_experts."""

    def __init__(self, num_experts: int) -> None:
        self.tokens_per_expert = torch.zeros(num_experts, dtype=torch.int64)
        self.gate_mass = torch.zeros(num_experts, dtype=torch.float64)
        self.probability_mass = torch.zeros(num_experts, dtype=torch.float64)
        self.means = torch.zeros(2, len(_MEANS), dtype=torch.float64)  # sums, and the weights they are over
        self.num_limited: int | None = None  # experts whose kept slots are seen, the first ones

    @property
    def num_experts(self) -> int:
        return self.tokens_per_expert.numel()

    def tensors(self) -> dict[str, Tensor]:
        names = ("tokens_per_expert", "gate_mass", "probability_mass", "means")
        return {name: getattr(self, name) for name in names}

    def move(self, device: torch.device) -> None:
        """Keep the sums where the routing comes from: no copy, and no wait, per forward."""
        if self.means.device != device:
            for name, value in self.tensors().items():
                setattr(self, name, value.to(device))

    def add(self, observation: Observation, mask: Tensor | None) -> None:
        """Add one forward, except the tokens where ``mask`` (T,) is False."""
        ids = observation.topk_ids.long()
        self.move(ids.device)
        counted = (ids >= 0) & (ids < self.num_experts)  # [T, K]
        if mask is not None:
            counted = counted & mask.unsqueeze(-1)
        self._add_choice(observation, counted, mask)
        if observation.router_logits is None:
            return
        options = {"score_function": observation.score_function, **(observation.route_options or {})}
        # As few passes over the scores as there can be: they are the large tensors here.
        score = scores(observation.router_logits, options["score_function"])
        self._add_probabilities(normalized(score, options["score_function"]), mask)
        if observation.route_options is not None and not observation.is_replay:
            by_logit = options.get("score_order") == "topk_then_score"
            self._add_margins(observation, observation.router_logits if by_logit else score, ids, counted)
            rounded = observation.router_logits.bfloat16().to(observation.router_logits.dtype)
            bias = observation.expert_bias
            other = route(rounded, ids.shape[-1], None if bias is None else bias.to(rounded.dtype), **options)[1]
            self._add_mean("flip_rate", (lost_choices(ids, other) & counted).sum(), counted.sum())

    def take_off_kept(self, kept: Tensor) -> None:
        """Take off the slots (T, K) that are kept from those that :meth:`add` took for dropped."""
        self.move(kept.device)
        self.means[0, _MEANS.index("drop_rate")] -= kept.sum()

    def metrics(self) -> dict[str, Tensor]:
        """Return each metric of RoutingStats by name, of shape (), fp64."""
        counts, num_experts = self.tokens_per_expert, self.num_experts
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
            "mean_entropy": _relative_entropy(probability),
            "margin": means["margin"],
            "flip_rate": means["flip_rate"],
        }

    def _add_choice(self, observation: Observation, counted: Tensor, mask: Tensor | None) -> None:
        counts = count_tokens(observation.topk_ids, self.num_experts, mask)
        self.tokens_per_expert += counts
        num_slots = counted.sum()
        seen = num_slots > 0
        self._add_mean("micro_max_vio", torch.where(seen, max_vio(counts), 0), seen)
        if self.num_limited is not None:
            limited = counts[: self.num_limited].sum()
            self._add_mean("drop_rate", limited, limited)
        elif observation.tokens_per_expert is not None:
            self._add_mean("drop_rate", num_slots - observation.tokens_per_expert.sum(), num_slots)
        if observation.topk_weights is not None:
            ids = observation.topk_ids.long()
            self.gate_mass += _per_expert(observation.topk_weights, ids, counted, self.num_experts)

    def _add_probabilities(self, probability: Tensor, mask: Tensor | None) -> None:
        entropy, num_tokens = _relative_entropy(probability), self.means.new_full((), probability.shape[0])
        if mask is not None:
            probability, entropy = probability.masked_fill(~mask.unsqueeze(-1), 0), entropy.masked_fill(~mask, 0)
            num_tokens = mask.sum()
        self._add_mean("entropy", entropy.sum(), num_tokens)
        self.probability_mass += probability.sum(dim=0)

    def _add_margins(self, observation: Observation, candidates: Tensor, ids: Tensor, counted: Tensor) -> None:
        if ids.shape[-1] >= self.num_experts:
            return
        if observation.expert_bias is not None:
            candidates = candidates + observation.expert_bias
        margin, known = _margins(candidates, ids, counted)
        self._add_mean("margin", torch.where(known, margin, 0).sum(), known.sum())

    def _add_mean(self, name: str, value: Tensor, weight: Tensor) -> None:
        column = _MEANS.index(name)
        self.means[0, column] += value
        self.means[1, column] += weight


def _relative_entropy(probability: Tensor) -> Tensor:
    """Return the entropy over that of even probabilities, (...); 0 for a single expert."""
    entropy: Tensor = torch.special.entr(probability).sum(dim=-1)
    return entropy / math.log(probability.shape[-1]) if probability.shape[-1] > 1 else entropy


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
