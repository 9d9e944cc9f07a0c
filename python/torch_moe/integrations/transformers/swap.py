"""Run the MoE classes of transformers that its experts interface does not serve, by a change of class."""

import importlib
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

from torch import nn

from torch_moe.integrations.transformers import swapped
from torch_moe.integrations.transformers.forward import experts_forward
from torch_moe.integrations.transformers.gate import CACHE, Host

PREFIX = "TorchMoe"


class Swap(NamedTuple):
    """What a class of transformers becomes."""

    module: str  # where the class is, under transformers.models
    forward: Callable[..., object] | None  # None keeps the class's own
    attributes: dict[str, object] = {}  # noqa: RUF012 - never written


def _contract(act_fn: Callable[[Host], object] | None = None, **flags: bool) -> dict[str, object]:
    """Return the attributes by which transformers describes experts, and where the activation is if not in act_fn."""
    attributes: dict[str, object] = {"has_gate": True, "has_bias": False, "is_transposed": False}
    attributes["_apply_gate"] = swapped.concatenated_gate
    if act_fn is not None:
        attributes["act_fn"] = property(act_fn)
    return attributes | flags


# Every class of transformers 5.18 that is a sparse FFN and has no decorator.
SWAPS = {
    "Llama4TextMoe": Swap("llama4", swapped.llama4_moe),
    "Llama4TextExperts": Swap("llama4", None, _contract(is_transposed=True)),
    "DbrxExperts": Swap("dbrx", swapped.dbrx_experts),
    "LongcatFlashExperts": Swap("longcat_flash", swapped.longcat_flash_experts, _contract()),
    "JetMoeMoE": Swap("jetmoe", swapped.jetmoe_moe, _contract(lambda self: self.activation)),
    "JetMoeParallelExperts": Swap("jetmoe", swapped.jetmoe_parallel_experts),
    # Its gate has a method of its own already.
    "Step3p7Experts": Swap("step3p7", experts_forward, {"has_gate": True, "has_bias": False, "is_transposed": False}),
    "SwitchTransformersExperts": Swap(
        "switch_transformers", swapped.switch_experts, _contract(lambda self: self["expert_0"].act, has_gate=False)
    ),
    "NllbMoeSparseMLP": Swap(
        "nllb_moe", swapped.nllb_moe, _contract(lambda self: self.experts["expert_0"].act, has_gate=False)
    ),
}


def swap(model: nn.Module) -> list[str]:
    """Let the MoE modules of Llama-4, DBRX, LongCat-Flash, JetMoE, Step-3.7, Switch and NLLB-MoE run on torch-moe.

    transformers' experts interface does not serve these classes. Each module of exactly such a class (a subclass of
    your own is left alone) becomes an instance of a subclass with another forward: parameters, their names, hooks,
    saving and loading stay as they are. Call it after loading; call :func:`unswap` to go back.

    NOTE: NLLB-MoE gives *other* results than transformers 5.18, which runs only the experts 0 and 1 of each layer;
    swapped, it computes what the model was trained with.

    Parameters
    ----------
    model : Module
        Any model; one without such modules is not changed.

    Returns
    -------
    list of str
        Names of the modules that changed class.
    """
    names = []
    for name, module in model.named_modules():
        if unserved(module):
            module.__class__ = _subclass(type(module).__name__)
            names.append(name)
    return names


def unswap(model: nn.Module) -> list[str]:
    """Undo :func:`swap`.

    Parameters
    ----------
    model : Module
        Any model.

    Returns
    -------
    list of str
        Names of the modules that got their class back.
    """
    names = []
    for name, module in model.named_modules():
        if is_swapped(module):
            vars(module).pop(CACHE, None)
            module.__class__ = type(module).__mro__[1]
            names.append(name)
    return names


def unserved(module: nn.Module) -> bool:
    """Tell whether a module is one that :func:`swap` would change."""
    known = SWAPS.get(type(module).__name__)
    return known is not None and type(module).__module__ == _module_of(known)


def is_swapped(module: nn.Module) -> bool:
    """Tell whether a module is one that :func:`swap` changed."""
    return type(module).__module__ == __name__


def _module_of(known: Swap) -> str:
    return f"transformers.models.{known.module}.modeling_{known.module}"


@cache
def _subclass(name: str) -> type[nn.Module]:
    known = SWAPS[name]
    parent = getattr(importlib.import_module(_module_of(known)), name)
    attributes = {**known.attributes, "__module__": __name__, "__doc__": f"{name} of transformers, on torch-moe."}
    if known.forward is not None:
        attributes["forward"] = known.forward
    return type(PREFIX + name, (parent,), attributes)


def __getattr__(name: str) -> type[nn.Module]:
    """Return the subclass of that name: pickle looks for it here."""
    if name.removeprefix(PREFIX) in SWAPS and name.startswith(PREFIX):
        return _subclass(name.removeprefix(PREFIX))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
