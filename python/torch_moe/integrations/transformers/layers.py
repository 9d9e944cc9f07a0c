"""The MoE layers of a transformers model: what to watch, and what steers them."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from torch_moe.integrations.transformers.gate import Host
from torch_moe.integrations.transformers.report import is_decorated
from torch_moe.integrations.transformers.router import Rule, bias_of, find_rule
from torch_moe.integrations.transformers.swap import PREFIX
from torch_moe.observe import Observation

# The name under which a router that has no selection bias gets one: a buffer that is not saved with the model.
OWN_BIAS = "torch_moe_selection_bias"


class Layer(NamedTuple):
    """One MoE layer of a model."""

    name: str  # of the experts
    watched: nn.Module  # its router where the router's rule is known, else its experts
    num_experts: int
    bias_owner: nn.Module | None  # what has a selection bias of the model's own
    bias_name: str
    rule: Rule | str  # or why there is none

    @property
    def bias(self) -> Tensor | None:
        """The selection bias as it is now, of shape (num_experts,): moving a model replaces its tensors."""
        if self.bias_owner is not None:
            return _flat(getattr(self.bias_owner, self.bias_name))
        own = getattr(self.watched, OWN_BIAS, None)
        return None if own is None else _flat(own)


def find_layers(model: nn.Module) -> Iterator[Layer]:
    """Yield the MoE layers of a model: every module that is called with ids and weights, or that chooses them."""
    for name, module in model.named_modules():
        block = model.get_submodule(name.rpartition(".")[0])
        router = next((child for key, child in block.named_children() if key in ("gate", "router")), None)
        num_experts = _num_experts(module, router)
        if num_experts is None:
            continue
        owner, bias_name = bias_of(block)
        bias = None if owner is None else _flat(getattr(owner, bias_name))
        num_experts = num_experts if bias is None else bias.numel()
        rule: Rule | str = "it chooses by a design of its own"
        if router is not None and module is not router:
            rule = find_rule(router, num_experts, bias)
            module = router if isinstance(rule, Rule) else module
        yield Layer(name, module, num_experts, owner, bias_name, rule)


def _num_experts(module: Host, router: nn.Module | None) -> int | None:
    """Return how many experts a module chooses among, or is called with ids of; None for other modules."""
    kind, down_proj = _kind(module), getattr(module, "down_proj", None)
    if kind == "ZayaRouter":
        return int(module.num_router_classes)
    if kind in _READERS or kind == "DbrxExperts":
        return int(module.num_experts)
    called_with_ids = (kind in _CALLED_WITH_IDS or is_decorated(module)) and _kind(router) not in _READERS
    return down_proj.shape[0] if called_with_ids and isinstance(down_proj, Tensor) else None


def read(layers: dict[nn.Module, Layer], module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Observation:  # noqa: ANN401
    """Make an observation of a layer's router, or of its experts from the ids and weights they are called with."""
    rule = layers[module].rule
    if isinstance(rule, Rule):
        ids, bias = output[rule.ids].flatten(0, -2), layers[module].bias
        return Observation(ids, output[1].view(ids.shape), rule.logits_of(output), bias, rule.options)
    reader = _READERS.get(_kind(module))
    return Observation(inputs[1], inputs[2]) if reader is None else reader(module, output)


def _flat(bias: Tensor) -> Tensor:
    return bias.detach().view(-1)


def _kind(module: nn.Module | None) -> str:
    """Return the name of the class, before a swap."""
    return type(module).__name__.removeprefix(PREFIX)


def _llama4(router: Host, output: tuple[Tensor, Tensor]) -> Observation:
    scores, logits = output
    ids = logits.topk(router.top_k, dim=1).indices
    return Observation(ids, scores.gather(1, ids), logits)


def _jetmoe(router: Host, output: tuple[Any, ...]) -> Observation:
    logits, ids = output[4].topk(router.top_k, dim=1)
    return Observation(ids, logits.softmax(dim=1), output[4])


def _zaya(router: Host, output: tuple[Tensor, ...]) -> Observation:
    """Read Zaya's router, which returns weight 0 and id 0 for the class without an expert."""
    logits, weights, ids, _ = output
    ids = ids.masked_fill(weights == 0, router.num_experts)
    return Observation(ids, weights, logits.float(), router.balancing_biases, {"renormalize": False})


def _mask_of_ids(top_k: int, router: Host, output: tuple[Tensor, Tensor, Tensor]) -> Observation:
    """Read a router that returns a dense (tokens, experts) mask or weights, zero where not chosen."""
    dense = output[0 if top_k == 1 else 1].flatten(0, -2)
    weights, ids = dense.topk(top_k, dim=-1)
    return Observation(ids.masked_fill(weights == 0, -1), weights, output[2].flatten(0, -2))


_CALLED_WITH_IDS = ("LongcatFlashExperts", "Step3p7Experts")
# Routers that are read themselves, because their experts are not called with ids, or not with all that was chosen.
_READERS: dict[str, Callable[[Host, Any], Observation]] = {
    "Llama4Router": _llama4,
    "JetMoeTopKGating": _jetmoe,
    "SwitchTransformersTop1Router": partial(_mask_of_ids, 1),
    "NllbMoeTop2Router": partial(_mask_of_ids, 2),
    "ZayaRouter": _zaya,
}
