"""The forward of the layer stage by stage, each as its own operator on the input it would get: where the time goes."""

from __future__ import annotations

from collections.abc import Callable

import torch

from torch_moe import ops
from torch_moe.cli.problem import Problem


def stage_calls(problem: Problem) -> dict[str, Callable[[], object]]:
    """Return one function per stage, in the order the data flows.

    Parameters
    ----------
    problem : Problem
        The layer and its input.

    Returns
    -------
    dict of str to callable
        Functions without arguments.
    """
    with torch.no_grad():
        return _stage_calls(problem)


def _stage_calls(problem: Problem) -> dict[str, Callable[[], object]]:
    weights, options = problem.weights, problem.shape.activation_options()
    x, ids, num_experts = problem.hidden_states, problem.topk_ids, problem.shape.num_experts
    plan = ops.plan(ids, num_experts)
    topk_weights = problem.layer.router(x)[1]
    rows = ops.permute(x, plan)
    pre_activation = ops.grouped_gemm(rows, weights.gate_up_proj, plan.expert_offsets, weights.gate_up_bias)
    hidden = ops.activation(pre_activation, **options)
    outputs = ops.grouped_gemm(hidden, weights.down_proj, plan.expert_offsets, weights.down_bias)

    calls: dict[str, Callable[[], object]] = {
        "route (with the router's GEMM)": lambda: problem.layer.router(x),
        "plan": lambda: ops.plan(ids, num_experts),
        "permute": lambda: ops.permute(x, plan),
        "GEMM gate_up": lambda: ops.grouped_gemm(rows, weights.gate_up_proj, plan.expert_offsets, weights.gate_up_bias),
        "activation": lambda: ops.activation(pre_activation, **options),
        "GEMM down": lambda: ops.grouped_gemm(hidden, weights.down_proj, plan.expert_offsets, weights.down_bias),
        "combine": lambda: ops.combine(outputs, topk_weights, plan),
    }
    return {name: torch.no_grad()(call) for name, call in calls.items()}
