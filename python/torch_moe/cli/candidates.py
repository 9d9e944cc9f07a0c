"""Everything the benchmark times for one layer: the layer itself and the baselines, on the same weights and input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from torch_moe.cli import baselines
from torch_moe.cli.floor import Work, dense_work, moe_work
from torch_moe.cli.problem import Problem

TORCH_MOE = "torch_moe"
K_DENSE = "k_dense"
DENSE_ACTIVE = "dense_active"
DENSE_TOTAL = "dense_total"
LOOP = "loop"
GROUPED_MM = "grouped_mm"
LABELS = {
    TORCH_MOE: "torch_moe layer",
    K_DENSE: "K x dense",
    DENSE_ACTIVE: "dense, active size (K*I)",
    DENSE_TOTAL: "dense, total size (E*I)",
    LOOP: "loop over experts",
    GROUPED_MM: "torch grouped_mm",
}
# (hidden_states, topk_weights, topk_ids) -> output
Experts = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to compute a layer of this size."""

    name: str
    num_experts: int  # whose weights it uses
    forward: Callable[[torch.Tensor], torch.Tensor]
    parameters: tuple[torch.Tensor, ...]
    work: Work
    work_with_backward: Work
    is_dense: bool = False  # a function of its own; the others compute the layer's

    def forward_call(self, problem: Problem) -> Callable[[], object]:
        """Return what is timed for the forward, under ``no_grad``: a model enters that once, not for each layer."""
        return lambda: self.forward(problem.hidden_states)

    def backward_call(self, problem: Problem) -> Callable[[], object]:
        """Return what is timed for forward and backward: gradients of the input and of every parameter."""

        def call() -> object:
            with torch.enable_grad():
                return self.gradients(problem.hidden_states, problem.grad_output)[1]

        return call

    def gradients(
        self, hidden_states: torch.Tensor, grad_output: torch.Tensor
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Return the output, and the gradients of the input and of `parameters`, in this order."""
        leaf = hidden_states.detach().requires_grad_()
        output = self.forward(leaf)
        return output.detach(), torch.autograd.grad(output, (leaf, *self.parameters), grad_output)


def routed_candidate(
    problem: Problem,
    name: str,
    experts: Experts,
    layer: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Candidate:
    """Build a candidate that computes the layer's function.

    Parameters
    ----------
    problem : Problem
        The layer and its input.
    name : str
        Of the candidate.
    experts : callable
        The layer from its routing on: (hidden_states, topk_weights, topk_ids) -> output.
    layer : callable or None, default=None
        The whole layer; None routes in plain torch. Not used where the routing is given.
    """
    shape, weights, given = problem.shape, problem.weights, problem.given_routing
    size = problem.hidden_states.element_size()

    def forward(x: torch.Tensor) -> torch.Tensor:
        if given:
            return experts(x, problem.topk_weights, problem.topk_ids)
        return layer(x) if layer else experts(x, *baselines.route(x, weights, shape, problem.forced_ids))

    one, two = (
        moe_work(shape, problem.tokens_per_expert, size, backward=backward, given_routing=given)
        for backward in (False, True)
    )
    _, *expert_parameters = weights.trainable()
    return Candidate(
        name=name,
        num_experts=shape.num_experts,
        forward=forward,
        parameters=(problem.topk_weights, *expert_parameters) if given else weights.trainable(),
        work=one,
        work_with_backward=two,
    )


def make_candidates(problem: Problem, *, only: tuple[str, ...] | None = None) -> tuple[list[Candidate], dict[str, str]]:
    """Build the candidates that fit this machine.

    Parameters
    ----------
    problem : Problem
        The layer, its input and its limits.
    only : tuple of str or None, default=None
        Names to build; None builds all.

    Returns
    -------
    candidates : list of Candidate
        In the order of the table.
    skipped : dict of str to str
        Reason by name, for the others.
    """
    shape, weights, size = problem.shape, problem.weights, problem.hidden_states.element_size()
    skipped: dict[str, str] = {}

    def in_torch(name: str, function: Callable[..., torch.Tensor]) -> Candidate:
        def experts(x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
            return function(x, topk_weights, topk_ids, weights, shape)

        return routed_candidate(problem, name, experts)

    def dense(name: str, parts: list[baselines.DenseWeights], num_experts: int) -> Candidate:
        def forward(hidden_states: torch.Tensor) -> torch.Tensor:
            output = baselines.dense(hidden_states, parts[0], shape)
            for part in parts[1:]:
                output = output + baselines.dense(hidden_states, part, shape)
            return output

        one, two = (dense_work(shape, num_experts, size, backward=backward) for backward in (False, True))
        parameters = tuple(tensor for part in parts for tensor in part.trainable())
        return Candidate(
            name=name,
            num_experts=num_experts,
            forward=forward,
            parameters=parameters,
            work=one,
            work_with_backward=two,
            is_dense=True,
        )

    def build(name: str) -> Candidate | None:
        if name == TORCH_MOE:
            return routed_candidate(problem, name, problem.forward_routed, problem.forward)
        if name == LOOP:
            return in_torch(name, baselines.loop_over_experts)
        if name == GROUPED_MM:
            reason = baselines.why_not_grouped_mm(problem.hidden_states.dtype)
            if reason is None:
                return in_torch(name, baselines.grouped_mm)
        elif name == K_DENSE:
            return dense(name, baselines.split_experts(weights, shape.top_k), shape.top_k)
        elif name == DENSE_ACTIVE:
            return dense(name, [baselines.merge_experts(weights, shape.top_k, shape)], shape.top_k)
        else:
            reason = problem.limits.why_not_dense_total(shape, size)
            if reason is None:
                return dense(name, [baselines.merge_experts(weights, shape.num_experts, shape)], shape.num_experts)
        skipped[name] = reason
        return None

    built = [build(name) for name in LABELS if only is None or name in only]
    return [candidate for candidate in built if candidate is not None], skipped
