"""How a router of transformers chooses, found by running it, and how to make it choose by a bias, too.

Most routers return their logits, the weights and the ids, but each family computes the weights in its own code. A copy
of the router with random weights is run on random tokens, in both modes; if options of :func:`torch_moe.ops.route` give
its choice and its weights from its logits to a few roundings, these options are its rule. What has no rule is refused
with the reason, never guessed.
"""

import inspect
from collections.abc import Iterator, Sequence
from copy import deepcopy
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torch_moe._routing import route
from torch_moe.integrations.transformers.gate import Host
from torch_moe.nn._common import without_autocast

# What published models call a bias that only the selection sees.
BIAS_NAMES = ("e_score_correction_bias", "expert_bias", "balancing_biases")
# In this order, because with one expert per token all of them can give the same weights.
FUNCTIONS = ("softmax", "sigmoid", "sqrtsoftplus")
_TOKENS = 64
_LARGEST_BIAS = 0.25
# Roundings that a weight may need: exponentials, a sum over all experts, and a division.
_ROUNDINGS = 64


class Rule(NamedTuple):
    """Where a router's results are in the tuple that it returns, and how they follow from each other."""

    logits: int  # its position; the weights are always in the middle
    ids: int
    options: dict[str, Any]  # of ops.route
    are_probabilities: bool = False  # what is returned in place of the logits
    scale: str = ""  # the router's parameter (num_experts,) that multiplies the weights

    def logits_of(self, output: Sequence[Tensor]) -> Tensor:
        """Return the logits, of shape (num_tokens, num_experts), in fp32 (fp64 if they are)."""
        logits = output[self.logits].flatten(0, -2)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        # The softmax of the logarithm of probabilities gives these again.
        return logits.clamp(min=torch.finfo(logits.dtype).tiny).log() if self.are_probabilities else logits

    def select(self, router: nn.Module, logits: Tensor, top_k: int, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return weights and ids of shape (num_tokens, top_k) as the router would, with a bias on its selection."""
        weights, ids = route(logits, top_k, None if bias is None else bias.to(logits.dtype), **self.options)
        return (weights * getattr(router, self.scale)[ids.long()] if self.scale else weights), ids

    def steer(self, bias: Tensor, router: nn.Module, output: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the router's output with the choice that a bias on its scores makes, weighed without the bias.

        A token whose choice the bias does not change keeps what the router gave it, bit for bit: its order, its
        preference among equals and its roundings are then the family's own.
        """
        weights, ids = output[1], output[self.ids]
        logits, top_k = self.logits_of(output), ids.shape[-1]
        plain = self.select(router, logits.detach(), top_k, torch.zeros_like(bias))[1]
        new_weights, new_ids = self.select(router, logits, top_k, bias)
        unchanged = (plain.sort(dim=-1).values == new_ids.sort(dim=-1).values).all(dim=-1, keepdim=True)
        unchanged = unchanged.view(*ids.shape[:-1], 1)
        steered = list(output)
        steered[1] = torch.where(unchanged, weights, new_weights.view_as(weights).to(weights.dtype))
        steered[self.ids] = torch.where(unchanged, ids, new_ids.view_as(ids).to(ids.dtype))
        return tuple(steered)


def find_rule(router: nn.Module, num_experts: int, bias: Tensor | None) -> Rule | str:
    """Find a router's rule by running a copy of it.

    Parameters
    ----------
    router : Module
        Any module; it stays as it is, and so does the random generator.
    num_experts : int
        How many logits it has per token.
    bias : Tensor of shape (num_experts,), default=None
        The selection bias that the layer already has, in the router or handed to it.

    Returns
    -------
    Rule or str
        Why there is no rule, if there is none.
    """
    try:
        with torch.random.fork_rng(devices=()), torch.no_grad(), without_autocast("cpu"):
            torch.manual_seed(0)
            copy, bias, handed = _random_copy(router, bias)
            output = _call(copy.eval(), num_experts, handed)
            candidates = (_fit(rule, copy, output, bias) for rule in _candidates(copy, output, num_experts))
            rule = next((rule for rule in candidates if _gives(rule, copy, output, bias)), None)
            if rule is None:
                return "its weights follow from its logits by no rule that is known here"
            if not _gives(rule, copy, _call(copy.train(), num_experts, handed), bias):
                return "it chooses by another rule in training"
            if bias is not None and "num_groups" in rule.options:
                # No candidate was negative: only those tell what became of the other groups.
                bias.sub_(2 * _LARGEST_BIAS)
                if not _gives(rule, copy, _call(copy, num_experts, handed), bias):
                    rule.options["group_mask"] = "zero"
            return rule
    except Exception as error:  # whatever a stranger's code raises for inputs it did not expect
        return f"run on random tokens, it raised {type(error).__name__}: {error}"


def bias_of(block: nn.Module) -> tuple[nn.Module | None, str]:
    """Return which module of a block has a selection bias, and its name: a router or the block itself."""
    for module in block.modules():
        for name in BIAS_NAMES:
            if isinstance(getattr(module, name, None), Tensor):
                return module, name
    return None, ""


def _random_copy(router: nn.Module, bias: Tensor | None) -> tuple[Host, Tensor | None, Tensor | None]:
    """Return a copy in fp32 with random weights, its selection bias, and the same if it is an argument."""
    copy = deepcopy(router).cpu().float()
    for module in copy.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    for parameter in copy.parameters():
        if parameter.dim() == 1:
            parameter.uniform_(0.5, 1.5)
        else:
            parameter.normal_(0, parameter.shape[-1] ** -0.5)
    if bias is None:
        return copy, None, None
    owner, name = bias_of(copy)
    if owner is None:
        handed = torch.empty(bias.numel()).uniform_(0, _LARGEST_BIAS)
        return copy, handed, handed
    own: Tensor = getattr(owner, name)
    own.uniform_(0, _LARGEST_BIAS)
    return copy, own.view(-1), None


def _call(router: Host, num_experts: int, bias: Tensor | None) -> tuple[Tensor, ...]:
    """Return what the router gives for random tokens, which some want as a batch of sequences."""
    sizes = [parameter.shape[1] for parameter in router.parameters() if parameter.dim() == 2]
    hidden_states = torch.randn(_TOKENS, sizes[0] if sizes else num_experts)
    arguments = () if bias is None else (bias,)
    parameters = inspect.signature(router.forward).parameters.values()
    required = [parameter for parameter in parameters if parameter.default is inspect.Parameter.empty]
    if len(required) > 1 + len(arguments):
        raise ValueError(f"it needs {', '.join(parameter.name for parameter in required)}")
    try:
        output = router(hidden_states, *arguments)
    except ValueError:
        output = router(hidden_states.unsqueeze(0), *arguments)
    if not isinstance(output, tuple) or len(output) != 3:
        raise ValueError("it does not return logits, weights and ids")
    return output


def _candidates(router: Host, output: tuple[Tensor, ...], num_experts: int) -> Iterator[Rule]:
    """Yield every rule that the shapes and the router's attributes allow, without the factor."""
    ids = 0 if not output[0].is_floating_point() else 2
    top_k, first = output[ids].shape[-1], output[2 - ids].flatten(0, -2)
    if first.shape != (_TOKENS, num_experts) or top_k > num_experts:
        return
    are_probabilities = bool((first >= 0).all() and torch.allclose(first.sum(dim=-1), torch.ones(_TOKENS)))
    numbers = sorted({n for n in vars(router).values() if type(n) is int and 1 <= n <= num_experts})
    groups: list[dict[str, Any]] = [{}]
    for number, kept in product(numbers, numbers):
        if num_experts % number == 0 and kept < number and top_k <= kept * num_experts // number:
            scores = ("top2_sum", "max") if number < num_experts else ("max",)
            groups += [{"num_groups": number, "topk_groups": kept, "group_score": score} for score in scores]
    scales = [name for name, parameter in router.named_parameters() if parameter.shape == (num_experts,)]
    norms = [{"renormalize": True}, {"renormalize": False}]
    if getattr(router, "renormalize_p", 1.0) != 1:
        norms = [{"renormalize": True, "renormalize_p": router.renormalize_p}]
    for scale, group, norm, function in product(("", *scales), groups, norms, FUNCTIONS):
        options = {"score_function": function, **norm, **group}
        yield Rule(2 - ids, ids, options, are_probabilities, scale)


def _fit(rule: Rule, router: Host, output: tuple[Tensor, ...], bias: Tensor | None) -> Rule:
    """Return the rule with the factor that makes the sum of its weights the router's."""
    weights, _ = rule.select(router, rule.logits_of(output), output[rule.ids].shape[-1], bias)
    factor = (output[1].double().sum() / weights.double().sum()).item()
    # As many digits as fp32 has: 2.5 rather than 2.4999999.
    return rule._replace(options={**rule.options, "routed_scaling_factor": float(f"{factor:.7g}")})


def _gives(rule: Rule, router: Host, output: tuple[Tensor, ...], bias: Tensor | None) -> bool:
    """Tell whether the rule gives the router's choice and weights."""
    logits = rule.logits_of(output)
    actual_ids = output[rule.ids].flatten(0, -2)
    weights, ids = rule.select(router, logits, actual_ids.shape[-1], bias)
    actual = torch.zeros_like(logits).scatter(1, actual_ids, output[1].flatten(0, -2))
    expected = torch.zeros_like(logits).scatter(1, ids.long(), weights)
    return torch.allclose(actual, expected, rtol=_ROUNDINGS * torch.finfo(torch.float32).eps, atol=0)
