"""Check every candidate against the fp64 reference before anything is timed.

Outputs and input gradients are compared on a sample of tokens; the gradient that comes in is zero for all other
tokens, so the reference gives the parameters' gradients from the sample alone. The reference works expert by expert:
one expert in fp64 is the most it ever holds.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from torch_moe import reference
from torch_moe.cli import baselines
from torch_moe.cli.candidates import LABELS, Candidate
from torch_moe.cli.errors import WrongResult
from torch_moe.cli.problem import Problem
from torch_moe.testing import assert_close

SAMPLE = 32
# Share of tokens on which fp32 and fp64 logits may choose other experts: candidates that are nearly tied.
MAX_TIED = 0.01
# Elementwise operations that round one after the other in the longest activation here (clamped swiglu, in torch).
ELEMENTWISE = (1, 1, 1, 1)


def verify(problem: Problem, candidates: Sequence[Candidate], *, backward: bool, sample_size: int = SAMPLE) -> int:
    """Compare candidates with the reference.

    Parameters
    ----------
    problem : Problem
        The layer and its input.
    candidates : sequence of Candidate
        What to compare.
    backward : bool
        Whether gradients are compared, too.
    sample_size : int, default=32
        Number of tokens to compare; fewer for large experts, each of which is computed in fp64.

    Returns
    -------
    int
        Number of tokens compared.

    Raises
    ------
    WrongResult
        If a result is further from the reference than `torch_moe.testing.tolerance` allows.
    """
    sample = _sample_tokens(problem, sample_size)
    expected = _Expected(problem, sample, backward=backward)
    for candidate in candidates:
        try:
            if candidate.is_dense:
                _check_dense(problem, candidate, sample)
            else:
                expected.check(candidate)
        except AssertionError as error:
            raise WrongResult(
                f"{LABELS.get(candidate.name, candidate.name)} differs from the fp64 reference: {error}"
            ) from error
    return len(sample)


def _sample_tokens(problem: Problem, size: int) -> torch.Tensor:
    """Return tokens on whose experts fp64, the layer and the baselines agree."""
    x, shape = problem.hidden_states, problem.shape
    if problem.given_routing:
        return torch.linspace(0, shape.num_tokens - 1, min(size, shape.num_tokens)).long()
    with torch.no_grad():
        _, expected = _route_fp64(problem, x.double(), problem.weights.router.double())
        ours = problem.layer.router(x)[2]
        theirs = baselines.route(x, problem.weights, shape)[1]
    agree: torch.Tensor = ((expected == ours) & (expected == theirs)).all(dim=1)
    if agree.double().mean() < 1 - max(MAX_TIED, 1 / shape.num_tokens):
        raise WrongResult(f"routes differ from the fp64 reference on {int((~agree).sum())} of {len(agree)} tokens")
    tokens: torch.Tensor = agree.nonzero().flatten()
    return tokens[torch.linspace(0, len(tokens) - 1, min(size, len(tokens))).long()]


def _route_fp64(problem: Problem, x: torch.Tensor, router: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    bias = problem.weights.expert_bias
    bias = None if bias is None else bias.double()
    topk_weights, topk_ids = reference.route(x @ router.T, problem.shape.top_k, bias, **problem.shape.router_options())
    return topk_weights, topk_ids


def _run_expert(
    problem: Problem, expert: int, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Return one expert's share of the output in fp64, and its parameters as leaves."""
    weights = problem.weights
    named = (weights.gate_up_proj, weights.down_proj, weights.gate_up_bias, weights.down_bias)
    leaves = [None if tensor is None else tensor[expert].detach().double()[None] for tensor in named]
    present = tuple(leaf.requires_grad_() for leaf in leaves if leaf is not None)
    gate_up, down, gate_up_bias, down_bias = leaves
    assert gate_up is not None
    assert down is not None
    plan = reference.plan(torch.where(topk_ids == expert, 0, -1), 1)
    options = problem.shape.activation_options()
    return reference.experts(x, gate_up, down, topk_weights, plan, gate_up_bias, down_bias, **options), present


class _Expected:
    """What the reference gives on the sample: output, and gradients of input, routing and its busiest expert."""

    def __init__(self, problem: Problem, sample: torch.Tensor, *, backward: bool) -> None:
        shape, self._problem, self._sample = problem.shape, problem, sample
        x = problem.hidden_states[sample].double().requires_grad_()
        router = problem.weights.router.detach().double().requires_grad_()
        if problem.given_routing:
            routed_weights, ids = problem.topk_weights[sample].double(), problem.topk_ids[sample]
        else:
            routed_weights, ids = _route_fp64(problem, x, router)
            ids = ids if problem.forced_ids is None else problem.forced_ids[sample]
        topk_weights = routed_weights.detach().requires_grad_()
        grad_output = problem.grad_output[sample].double()
        counts = torch.bincount(ids.flatten(), minlength=shape.num_experts)
        self._expert, self._count = int(counts.argmax()), int(counts.max())
        self._gradients: tuple[torch.Tensor, ...] | None = None

        self._output = torch.zeros_like(x)
        grad_x, grad_topk_weights = torch.zeros_like(x), torch.zeros_like(topk_weights)
        of_expert: tuple[torch.Tensor, ...] = ()
        for expert in counts.nonzero().flatten().tolist():
            with torch.set_grad_enabled(backward):
                output, leaves = _run_expert(problem, expert, x, topk_weights, ids)
            self._output += output.detach()
            if backward:
                inputs = (x, topk_weights, *(leaves if expert == self._expert else ()))
                one_x, one_weights, *one_leaves = torch.autograd.grad(output, inputs, grad_output)
                grad_x, grad_topk_weights = grad_x + one_x, grad_topk_weights + one_weights
                of_expert = tuple(one_leaves) or of_expert
        if backward and problem.given_routing:
            self._gradients = (grad_x, grad_topk_weights, *of_expert)
        elif backward:
            more_x, grad_router = torch.autograd.grad(routed_weights, (x, router), grad_topk_weights)
            self._gradients = (grad_x + more_x, grad_router, *of_expert)

    def check(self, candidate: Candidate) -> None:
        problem, shape, sample = self._problem, self._problem.shape, self._sample
        dtype = problem.hidden_states.dtype
        # Router, then first GEMM, activation, second GEMM, weight, and the sum over a token's experts.
        router = (shape.hidden_size, shape.num_experts)
        steps = (*router, shape.hidden_size, *ELEMENTWISE, shape.intermediate_size, 1, *(1,) * shape.top_k)
        if self._gradients is None:
            with torch.no_grad():
                output = candidate.forward(problem.hidden_states)
            assert_close(output[sample], self._output, *steps)
            return
        grad_output = torch.zeros_like(problem.grad_output)
        grad_output[sample] = problem.grad_output[sample]
        output, gradients = candidate.gradients(problem.hidden_states, grad_output)
        assert_close(output[sample], self._output, *steps)
        grad_x, grad_routing, *of_experts = gradients
        if problem.given_routing:
            grad_routing = grad_routing[sample]  # of topk_weights; else of the router's weight
        back = (*steps, shape.hidden_size, *ELEMENTWISE)  # as far as the gradient of the pre-activation
        inner = (*back, shape.pre_activation_size, *(1,) * shape.top_k, shape.num_experts)
        assert_close(grad_x[sample], self._gradients[0], *inner)
        assert_close(grad_routing, self._gradients[1], *inner, self._count, dtype=dtype)
        for actual, expected in zip(of_experts, self._gradients[2:], strict=True):
            assert_close(actual[self._expert][None], expected, *back, self._count)


def _check_dense(problem: Problem, candidate: Candidate, sample: torch.Tensor) -> None:
    """Compare with the sum of the experts it is made of: routing to all of them with weight 1."""
    shape = problem.shape
    sample = sample[:: max(1, len(sample) // 8)]
    num_experts = candidate.num_experts
    x = problem.hidden_states[sample].double()
    ids = torch.arange(num_experts, dtype=torch.int32).repeat(len(sample), 1)
    with torch.no_grad():
        ones = torch.ones(ids.shape, dtype=torch.float64)
        expected = torch.zeros_like(x)
        for expert in range(num_experts):
            expected += _run_expert(problem, expert, x, ones, ids)[0]
        output = candidate.forward(problem.hidden_states[sample])
    steps = (shape.hidden_size, *ELEMENTWISE, num_experts * shape.intermediate_size, *(1,) * shape.top_k)
    assert_close(output, expected, *steps)
