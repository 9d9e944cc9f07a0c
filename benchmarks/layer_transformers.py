"""Hugging Face's experts as contenders: transformers' own classes, on the weights of the layer under test."""

import importlib.util
from collections.abc import Callable
from types import SimpleNamespace

import torch

from torch_moe.cli.candidates import Candidate, routed_candidate
from torch_moe.cli.problem import Problem

IMPLEMENTATIONS = ("eager", "grouped_mm")
# Above, eager's backward takes minutes: it builds a gradient of all experts' weights for each expert that it indexes.
MOST_EXPERTS_OF_EAGER_BACKWARD = 16


def why_not(problem: Problem) -> str | None:
    """Return why transformers cannot compute this layer, or None when it can."""
    if importlib.util.find_spec("transformers") is None:
        return "transformers is not installed"
    shape = problem.shape
    plain = (shape.alpha, shape.limit, shape.up_offset, shape.gate_layout) == (1.0, None, 0.0, "concat")
    if shape.bias or not plain or shape.activation not in ("swiglu", "relu"):
        return f"its Mixtral and Nemotron-H experts have no bias and no {shape.activation} as {shape.name} has"
    return None


def make_candidates(problem: Problem) -> list[Candidate]:
    """Return one candidate per implementation; none where `why_not` gives a reason."""
    if why_not(problem) is not None:
        return []
    return [routed_candidate(problem, f"hf_{name}", _experts(problem, name)) for name in IMPLEMENTATIONS]


def takes_too_long(candidate: Candidate, pass_name: str) -> bool:
    """Whether this contender is left out of a pass."""
    return (
        candidate.name == "hf_eager"
        and pass_name == "backward"
        and candidate.num_experts > MOST_EXPERTS_OF_EAGER_BACKWARD
    )


def _experts(problem: Problem, implementation: str) -> Callable[..., torch.Tensor]:
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

    shape, weights = problem.shape, problem.weights
    config = SimpleNamespace(
        _experts_implementation=implementation,
        num_local_experts=shape.num_experts,
        n_routed_experts=shape.num_experts,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        moe_intermediate_size=shape.intermediate_size,
        moe_latent_size=None,
        hidden_act="silu",
        mlp_hidden_act="relu",
    )
    with torch.device("meta"):
        module = (MixtralExperts if shape.is_gated else NemotronHExperts)(config)
    setattr(module, "gate_up_proj" if shape.is_gated else "up_proj", weights.gate_up_proj)
    module.down_proj = weights.down_proj

    def experts(x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
        return module(x, topk_ids.long(), topk_weights).to(x.dtype)

    return experts
