"""Which modules of a transformers model run on torch-moe, and how."""

import re
from typing import TypeVar

from torch import nn

from torch_moe.integrations.transformers.forward import projections_of
from torch_moe.integrations.transformers.gate import CACHE, Host, Probe, gate_of
from torch_moe.integrations.transformers.registry import NAME, STOCK, is_default, is_enabled
from torch_moe.integrations.transformers.swap import is_swapped, unserved

_Model = TypeVar("_Model", bound=nn.Module)


def is_decorated(module: nn.Module) -> bool:
    """Tell whether transformers' experts interface serves a module."""
    return all(hasattr(module, flag) for flag in ("has_gate", "has_bias", "is_transposed", "config"))


def prepare(model: _Model) -> _Model:
    """Find the activations of all experts now, not at the first call.

    Needed before ``torch.compile`` only: while tracing, an activation that is not known yet runs as the module's own
    code between two grouped GEMMs. Not needed after the model has run once.

    Parameters
    ----------
    model : Module
        Any model.

    Returns
    -------
    Module
        The same model.
    """
    for module in model.modules():
        if hasattr(module, "has_gate"):
            gate_of(module)
    return model


def explain(model: nn.Module) -> str:
    """Tell which experts of a model run on torch-moe, fused or not, and why.

    Parameters
    ----------
    model : Module
        Any model; its weights are not touched.

    Returns
    -------
    str
        One line per kind of experts module, with how many there are.
    """
    lines: dict[str, int] = {}
    for name, module in model.named_modules():
        if is_swapped(module):
            how = "torch_moe, by a change of class (unswap(model) undoes it)"
        elif is_decorated(module):
            how = _describe(module)
        elif unserved(module):
            how = "runs on transformers' own code, which ignores experts_implementation (swap(model) changes that)"
        else:
            continue
        line = f"{re.sub(r'[.][0-9]+(?=[.]|$)', '.*', name)} ({type(module).__name__}): {how}"
        lines[line] = lines.get(line, 0) + 1
    return "\n".join(f"{count} x {line}" for line, count in lines.items()) or "no experts module of transformers"


def _describe(module: Host) -> str:
    implementation = module.config._experts_implementation
    if implementation != NAME and not (implementation == STOCK and is_default()):
        return f"runs on transformers' {implementation!r} (set_experts_implementation({NAME!r}) changes that)"
    if not is_enabled():
        return f"set to {NAME!r}, which is not registered: the next call raises KeyError (call enable())"
    layout = projections_of(module).weight_layout
    gate = gate_of(module)
    if gate is not None:
        return f"torch_moe, one fused operator: {gate}; weights {layout}"
    kept: Probe | None = vars(module).get(CACHE)
    reason = "its weights are on no device" if kept is None else kept.reason
    return f"torch_moe, not fused: its own activation between two grouped GEMMs ({reason}); weights {layout}"
