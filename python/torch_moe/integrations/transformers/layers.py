"""The MoE layers of a transformers model: what to watch, and what steers them."""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from torch_moe.integrations.transformers.families import OWN_BIAS, AsTriple, Family, Triple, family_of
from torch_moe.integrations.transformers.gate import Host
from torch_moe.integrations.transformers.report import is_decorated
from torch_moe.integrations.transformers.router import Rule, bias_of, find_rule
from torch_moe.integrations.transformers.swap import PREFIX
from torch_moe.observe import Observation


class Handle(Protocol):
    """What undoes something."""

    def remove(self) -> None:
        """Undo it."""


class Instead(NamedTuple):
    """A method of one module that something else is called instead of."""

    module: nn.Module
    method: str

    def remove(self) -> None:
        """Let the module have its method back."""
        vars(self.module).pop(self.method, None)


class Layer(NamedTuple):
    """One MoE layer of a model."""

    name: str  # of the experts, or of the router of a family that is read in its own way
    watched: nn.Module  # its router where it can be read, else its experts
    num_experts: int
    bias_owner: nn.Module | None  # what has a selection bias of the model's own
    bias_name: str
    rule: Rule | str  # or why there is none
    block: nn.Module
    family: Family | None = None

    @property
    def bias(self) -> Tensor | None:
        """The selection bias as it is now, of shape (num_experts,): moving a model replaces its tensors."""
        if self.bias_owner is not None:
            return _flat(getattr(self.bias_owner, self.bias_name))
        own = getattr(self.watched, OWN_BIAS, None)
        return None if own is None else _flat(own)

    @property
    def can_obey(self) -> bool:
        """Whether there is a selection bias, or one can be added."""
        is_written_down = self.family is not None and self.family.instead is not None
        return self.bias is not None or isinstance(self.rule, Rule) or is_written_down

    def add_bias(self) -> Handle | None:
        """Give a router without a selection bias one, of zeros, and let it choose by it."""
        if self.bias is not None:
            return None
        router, rule, family = self.watched, self.rule, self.family
        zeros = torch.zeros(self.num_experts, device=next(router.parameters()).device)
        router.register_buffer(OWN_BIAS, zeros, persistent=False)
        if family is None or family.instead is None:
            assert isinstance(rule, Rule)
            # First of all hooks: others, such as those that record the router's output, see what is chosen in the end.
            return router.register_forward_hook(partial(_choose_again, rule, family), prepend=True)
        if isinstance(rule, Rule):
            owner, instead = self.block, partial(family.instead, self.block, partial(_steered, rule, router))
        else:
            owner, instead = router, partial(family.instead, router)
        vars(owner)[family.method] = instead
        return Instead(owner, family.method)

    def remove_bias(self) -> None:
        """Take away what :meth:`add_bias` added."""
        self.watched._buffers.pop(OWN_BIAS, None)
        self.watched._non_persistent_buffers_set.discard(OWN_BIAS)


def find_layers(model: nn.Module) -> Iterator[Layer]:
    """Yield the MoE layers of a model: blocks of a known family, and every module that is called with ids."""
    for name, module in model.named_modules():
        block = model.get_submodule(name.rpartition(".")[0])
        family = family_of(module)
        if family is not None:
            yield _layer_of(name, module, family)
        elif family_of(block) is None and _is_called_with_ids(module):
            router = next((child for key, child in block.named_children() if key in ("gate", "router")), None)
            owner, bias_name = bias_of(block)
            bias = None if owner is None else _flat(getattr(owner, bias_name))
            num_experts = module.down_proj.shape[0] if bias is None else bias.numel()
            rule: Rule | str = "it chooses by a design of its own"
            if router is not None:
                rule = find_rule(router, num_experts, bias)
                module = router if isinstance(rule, Rule) else module
            yield Layer(name, module, num_experts, owner, bias_name, rule, block)


def _layer_of(path: str, block: Host, family: Family) -> Layer:
    key, router = next((key, child) for key, child in block.named_children() if key in ("gate", "router"))
    owners = (router, getattr(block, "experts", block), block)
    names = ("num_router_classes", "num_experts")
    number = next(getattr(owner, name) for owner in owners for name in names if hasattr(owner, name))
    rule = family.reason or find_rule(AsTriple(family, block, router), number, None)
    return Layer(f"{path}.{key}", router, number, *bias_of(block), rule, block, family)


def _is_called_with_ids(module: Host) -> bool:
    """Tell whether a module is called with ids of its experts, and weights."""
    kind = type(module).__name__.removeprefix(PREFIX)
    known = kind in ("LongcatFlashExperts", "Step3p7Experts") or is_decorated(module)
    return known and isinstance(getattr(module, "down_proj", None), Tensor)


@torch.no_grad()
def read(layers: dict[nn.Module, Layer], module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Observation:  # noqa: ANN401
    """Make an observation of a layer's router, or of its experts from the ids and weights they are called with."""
    layer = layers[module]
    rule, family, bias = layer.rule, layer.family, layer.bias
    if family is not None:
        triple = family.read(layer.block, module, output)
        if not isinstance(rule, Rule):
            return Observation(triple[2], triple[1], triple[0].float(), bias, family.options)
        # What is read may be the choice without the bias; who has chosen by it chooses the same again.
        output = triple if bias is None else _steered(rule, module, triple)
    elif isinstance(rule, str):
        return Observation(inputs[1], inputs[2])
    ids = output[rule.ids].flatten(0, -2)
    return Observation(ids, output[1].view(ids.shape), rule.logits_of(output), bias, rule.options)


def _flat(bias: Tensor) -> Tensor:
    return bias.detach().view(-1)


def _steered(rule: Rule, router: nn.Module, output: tuple[Any, ...]) -> Triple:
    return rule.steer(getattr(router, OWN_BIAS), router, output)


def _choose_again(rule: Rule, family: Family | None, router: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:  # noqa: ANN401
    if family is None or family.write is None:
        return _steered(rule, router, output)
    _, weights, ids = _steered(rule, router, family.read(None, router, output))
    return family.write(router, output, weights, ids)
