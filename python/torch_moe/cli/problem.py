"""One layer with its input: what every candidate gets."""

from __future__ import annotations

from dataclasses import dataclass

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
    """

    shape: LayerShape
    layer: MoE
    weights: Weights
    hidden_states: torch.Tensor  # [T, H]
    grad_output: torch.Tensor  # [T, H]
    forced_ids: torch.Tensor | None  # [T, K]
    topk_ids: torch.Tensor  # [T, K]
    tokens_per_expert: tuple[int, ...]
    limits: Limits

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Run the layer, router included."""
        if self.forced_ids is None:
            output: torch.Tensor = self.layer(hidden_states)
            return output
        _, topk_weights, _ = self.layer.router(hidden_states)
        plan = ops.plan(self.forced_ids, self.shape.num_experts)
        forced: torch.Tensor = self.layer.experts(hidden_states, topk_weights, plan)
        return forced


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
    hidden_states = text.hidden_states(shape.num_tokens, shape.hidden_size, seed).to(DTYPES[dtype])
    forced_ids = None
    if routing != "text":
        forced_ids = draw_routing(routing, shape.num_tokens, shape.num_experts, shape.top_k, seed=seed)
    with torch.no_grad():
        topk_ids = layer.router(hidden_states)[2] if forced_ids is None else forced_ids
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
        hidden_states=hidden_states,
        grad_output=torch.randn(hidden_states.shape).to(hidden_states.dtype),
        forced_ids=forced_ids,
        topk_ids=topk_ids,
        tokens_per_expert=tuple(ops.plan(topk_ids, shape.num_experts).tokens_per_expert.tolist()),
        limits=limits,
    )
