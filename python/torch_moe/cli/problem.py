"""One layer with its input: what every candidate gets."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from torch_moe import MoE, ops
from torch_moe.cli import text
from torch_moe.cli.baselines import Weights
from torch_moe.cli.limits import Limits
from torch_moe.cli.shapes import LayerShape
from torch_moe.testing import routing as draw_routing

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A layer, its input, and the routing that follows.

    `forced_ids` is None where the router decides; otherwise its k-th weight goes to the k-th expert given here.
    With `given_routing` candidates start from `topk_weights` and `topk_ids`: the router is no part of what is timed.
    """

    shape: LayerShape
    layer: MoE
    weights: Weights
    hidden_states: torch.Tensor  # [T, H]
    grad_output: torch.Tensor  # [T, H]
    forced_ids: torch.Tensor | None  # [T, K]
    topk_weights: torch.Tensor  # [T, K]
    topk_ids: torch.Tensor  # [T, K]
    tokens_per_expert: tuple[int, ...]
    limits: Limits
    given_routing: bool = False

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Run the layer, router included."""
        if self.forced_ids is None:
            output: torch.Tensor = self.layer(hidden_states)
            return output
        _, topk_weights, _ = self.layer.router(hidden_states)
        return self.forward_routed(hidden_states, topk_weights, self.forced_ids)

    def forward_routed(
        self, hidden_states: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor
    ) -> torch.Tensor:
        """Run the layer from its routing on: plan and experts."""
        output: torch.Tensor = self.layer.experts(hidden_states, topk_weights, topk_ids)
        return output

    def with_input(self, num_tokens: int, routing: str, seed: int) -> Problem:
        """Return the same layer with another input, as :func:`make_problem` would make it."""
        shape = replace(self.shape, num_tokens=num_tokens)
        return replace(self, shape=shape, **_draw_input(self.layer, shape, routing, seed))


def make_problem(shape: LayerShape, dtype: str, routing: str, seed: int, limits: Limits) -> Problem:
    """Build a layer with seeded weights, and embed text for it.

    Parameters
    ----------
    shape : LayerShape
        What to build.
    dtype : {"fp32", "bf16", "fp16"}
        Of weights and input.
    routing : {"text", "uniform", "zipf", "one_expert"}
        "text" lets the router decide; the others are those of `torch_moe.testing.routing`.
    seed : int
        Of weights, text and routing.
    limits : Limits
        Kept for the choice of candidates.
    """
    torch.manual_seed(seed)
    layer = MoE(**shape.layer_options(), dtype=DTYPES[dtype])
    return Problem(
        shape=shape,
        layer=layer,
        weights=Weights(
            router=layer.router.weight,
            expert_bias=layer.router.expert_bias,
            gate_up_proj=layer.experts.gate_up_proj,
            down_proj=layer.experts.down_proj,
            gate_up_bias=layer.experts.gate_up_proj_bias,
            down_bias=layer.experts.down_proj_bias,
        ),
        limits=limits,
        **_draw_input(layer, shape, routing, seed),
    )


def _draw_input(layer: MoE, shape: LayerShape, routing: str, seed: int) -> dict[str, Any]:
    """Return the fields of a problem that depend on its input."""
    hidden_states, forced_ids = draw_input(shape, layer.experts.gate_up_proj.dtype, routing, seed)
    with torch.no_grad():
        _, topk_weights, topk_ids = layer.router(hidden_states)
    topk_ids = topk_ids if forced_ids is None else forced_ids
    return {
        "hidden_states": hidden_states,
        "grad_output": torch.randn(hidden_states.shape).to(hidden_states.dtype),
        "forced_ids": forced_ids,
        "topk_weights": topk_weights.requires_grad_(),
        "topk_ids": topk_ids,
        "tokens_per_expert": tuple(ops.plan(topk_ids, shape.num_experts).tokens_per_expert.tolist()),
    }


def draw_input(
    shape: LayerShape, dtype: torch.dtype, routing: str, seed: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return text as hidden states (T, H), and the experts (T, K) that replace the router's choice, if any do."""
    hidden_states = text.hidden_states(shape.num_tokens, shape.hidden_size, seed).to(dtype)
    if routing == "text":
        return hidden_states, None
    return hidden_states, draw_routing(routing, shape.num_tokens, shape.num_experts, shape.top_k, seed=seed)
