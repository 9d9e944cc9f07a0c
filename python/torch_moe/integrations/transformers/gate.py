"""Which activation a host's experts apply, found by running it.

transformers names no activation: each experts class has a method ``_apply_gate``, and ``config.hidden_act`` need not be
what that method computes. The method is run once on a fixed table of gate and up values that reaches every clamp
region and both tails. If exactly one member of :func:`torch_moe.ops.activation`'s family gives these values to a few
roundings, the experts run as one fused operator with it. Otherwise the method itself runs between two grouped GEMMs:
slower, never wrong.
"""

from collections.abc import Collection, Iterator
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any, NamedTuple, TypeAlias, TypeGuard

import torch
from torch import Tensor, nn

from torch_moe import reference
from torch_moe.nn._common import without_autocast
from torch_moe.ops.activation import GATED_ACTIVATIONS, UNGATED_ACTIVATIONS

# A module of another library: what it carries is looked up at run time.
Host: TypeAlias = Any

CACHE = "_torch_moe_probe"
_MISSING = object()
# Constants that published models write into the code of their gates; those kept in attributes are read there.
_ALPHAS, _LIMITS, _UP_OFFSETS = (1.0, 1.702), (7.0, 10.0), (0.0, 1.0)
# Tails, the bends of relu and of the bell of gelu, and both sides of the limits above.
_POINTS = (-20.0, -11.0, -8.5, -5.0, -2.5, -1.0, -0.3, 0.0, 0.2, 0.7, 1.0, 1.9, 3.0, 6.0, 8.0, 9.5, 12.0, 21.0)
# A limit above this is none in practice, and would drown the table's other values.
_LARGEST = 1e4
# Roundings that an fp32 activation may need, each relative to the largest term of the formula.
_ROUNDINGS = 16


class Gate(NamedTuple):
    """A member of the family of :func:`torch_moe.ops.activation`, by the names of its arguments."""

    activation: str
    gate_layout: str = "concat"
    alpha: float = 1.0
    limit: float | None = None
    up_offset: float = 0.0

    def __str__(self) -> str:
        """Return the name and whatever differs from the defaults."""
        fields = zip(self._fields, self, Gate(self.activation), strict=True)
        return ", ".join([self.activation, *(f"{name}={value}" for name, value, usual in fields if value != usual)])


class Probe(NamedTuple):
    """What probing a module found, and which of its attributes it depended on."""

    reads: tuple[tuple[str, object], ...]
    gate: Gate | None
    reason: str  # why there is no gate

    def is_fresh(self, module: nn.Module) -> bool:
        """Tell whether the attributes still are what they were."""
        return all(_same(getattr(module, name, _MISSING), value) for name, value in self.reads)


def gate_of(module: nn.Module) -> Gate | None:
    """Return the activation of an experts module, or None if it is not in the family or cannot be probed now.

    The answer is kept on the module, and found again when an attribute changes that the activation reads. Under
    ``torch.compile`` only a kept answer is used: see :func:`prepare`.

    Parameters
    ----------
    module : Module
        With ``has_gate`` and ``_apply_gate``, or ``act_fn`` when not gated.

    Returns
    -------
    Gate or None
        Options of :func:`torch_moe.ops.experts`.
    """
    kept: Probe | None = module.__dict__.get(CACHE)
    if kept is not None and kept.is_fresh(module):
        return kept.gate
    if torch.compiler.is_compiling():
        return None
    found = probe(module)
    if found is None:
        return None
    module.__dict__[CACHE] = found
    return found.gate


def apply_gate(module: Host, pre_activation: Tensor) -> Tensor:
    """Run the module's own activation on rows of its first projection."""
    output: Tensor = module._apply_gate(pre_activation) if module.has_gate else module.act_fn(pre_activation)
    return output


def probe(module: nn.Module) -> Probe | None:
    """Run the module's activation on the table and look for it in the family.

    Parameters
    ----------
    module : Module
        As in :func:`gate_of`.

    Returns
    -------
    Probe or None
        None where values cannot be computed (fake tensors); asked again, the answer may differ.
    """
    recorder = _Recorder(module)
    gated = bool(recorder.has_gate)
    try:
        with torch.no_grad(), without_autocast("cpu"):
            apply_gate(recorder, torch.cat(_table(()), dim=-1))  # to learn which numbers it reads
            numbers = {value for _, value in recorder.reads() if _is_number(value) and 0 < value < _LARGEST}
            gate, up = _table(numbers)
            pre_activation = torch.cat([gate, up], dim=-1) if gated else gate
            actual = apply_gate(recorder, pre_activation)
    except Exception as error:  # whatever a stranger's code raises for a table it did not expect
        return Probe(recorder.reads(), None, f"its activation raised {type(error).__name__} when probed")
    if type(actual) is not Tensor:
        return None
    opaque = [name for name, value in recorder.reads() if not _is_constant(value)]
    if opaque:
        return Probe(recorder.reads(), None, f"its activation depends on more than constants ({', '.join(opaque)})")
    if actual.shape != gate.shape or actual.dtype != torch.float32:
        return Probe(recorder.reads(), None, "its activation does not map [R, 2I] to [R, I]")
    family = _gated(numbers) if gated else (Gate(name) for name in UNGATED_ACTIVATIONS)
    matches = [candidate for candidate in family if _is(candidate, actual, pre_activation)]
    if len(matches) == 1:
        return Probe(recorder.reads(), matches[0], "")
    return Probe(recorder.reads(), None, f"{len(matches)} known activations give what its own gives")


def _table(numbers: Collection[float]) -> tuple[Tensor, Tensor]:
    """Return gate and up values, every point with every point, of shape (1, number of pairs)."""
    beyond = [sign * factor * limit for limit in (*_LIMITS, *numbers) for sign in (-1, 1) for factor in (0.75, 1.5)]
    points = torch.tensor(sorted({*_POINTS, *beyond}))
    points = points[: len(points) // 2 * 2]  # an even number: interleaved pairs then never straddle the halves
    # The roll makes pairs of neighbours (interleaved) other than pairs of halves (concatenated).
    return points.repeat_interleave(len(points))[None], points.repeat(len(points)).roll(len(points) // 3)[None]


def _gated(numbers: Collection[float]) -> Iterator[Gate]:
    """Yield every gated member of the family that the numbers allow."""
    alphas, limits = sorted({*_ALPHAS, *numbers}), sorted({*_LIMITS, *numbers})
    for layout in ("concat", "interleaved"):
        yield from (Gate(name, layout) for name in GATED_ACTIVATIONS if name != "swiglu")
        for alpha in alphas:
            for limit in (None, *limits):
                yield from (Gate("swiglu", layout, alpha, limit, up_offset) for up_offset in _UP_OFFSETS)


def _is(candidate: Gate, actual: Tensor, pre_activation: Tensor) -> bool:
    """Tell whether the candidate gives these values to a few roundings of its largest term."""
    pre_activation = pre_activation.double()
    expected = reference.activation(pre_activation, **candidate._asdict())
    # No term of a formula exceeds a small multiple of (|g| + 1)(|u| + 1); relu2 is g g.
    gate = up = pre_activation
    if candidate.activation in GATED_ACTIVATIONS:
        interleaved = (pre_activation[..., ::2], pre_activation[..., 1::2])
        gate, up = interleaved if candidate.gate_layout == "interleaved" else pre_activation.chunk(2, dim=-1)
    allowed = _ROUNDINGS * torch.finfo(torch.float32).eps * (gate.abs() + 1) * (up.abs() + 1)
    return bool(((actual.double() - expected).abs() <= allowed).all())


class _Recorder:
    """Stands for a module while its activation is probed, and notes which attributes that reads."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._reads: dict[str, object] = {}

    def __getattr__(self, name: str) -> Host:
        value = getattr(self._module, name)
        if isinstance(value, MethodType) and value.__self__ is self._module:
            return MethodType(value.__func__, self)  # what the method reads is noted, too
        self._reads[name] = value
        return value

    def reads(self) -> tuple[tuple[str, object], ...]:
        return tuple(self._reads.items())


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_constant(value: object) -> bool:
    """Tell whether a value that an activation read can change only by being replaced."""
    if isinstance(value, nn.Module):
        random = any(isinstance(part, nn.modules.dropout._DropoutNd) for part in value.modules())
        return not random and next(value.parameters(), None) is None and next(value.buffers(), None) is None
    return value is None or isinstance(value, (bool, int, float, str, FunctionType, BuiltinFunctionType))


def _same(value: object, before: object) -> bool:
    return value is before or (isinstance(before, (bool, int, float, str)) and value == before)
