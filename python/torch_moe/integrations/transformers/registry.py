"""Make torch-moe an experts implementation of transformers, and take it away again."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

from torch import Tensor

from torch_moe.integrations.transformers.forward import experts_forward
from torch_moe.integrations.transformers.fp8 import fp8_experts_forward
from torch_moe.integrations.transformers.gate import Host
from torch_moe.ops._common import has_kernels

NAME = "torch_moe"
STOCK = "grouped_mm"  # the implementation that every decorated model takes by default

ExpertsForward: TypeAlias = Callable[[Host, Tensor, Tensor, Tensor], Tensor]


def enable(as_default: bool = False) -> None:
    """Register the experts implementation ``"torch_moe"`` with transformers, for dense and for FP8 experts.

    A model takes it by ``from_pretrained(..., experts_implementation="torch_moe")``, also ``from_config``, or later by
    ``model.set_experts_implementation("torch_moe")``. Every model whose experts class carries transformers'
    ``use_experts_implementation`` can; for the others there is :func:`swap`. May be called again, before or after a
    model is made.

    Parameters
    ----------
    as_default : bool, default=False
        Also take the place of ``"grouped_mm"``, transformers' default: every model of this process then runs on
        torch-moe without being told, on the devices it has kernels for; on others the default stays.

    Raises
    ------
    ImportError
        If transformers is absent or has no experts interface.
    """
    dense, fp8 = _interfaces()
    dense.register(NAME, experts_forward)
    fp8.register(NAME, fp8_experts_forward)
    if as_default:
        from transformers.integrations.moe import grouped_mm_experts_forward

        dense.register(STOCK, _where_there_are_kernels(experts_forward, grouped_mm_experts_forward))


def disable() -> None:
    """Undo :func:`enable`: remove ``"torch_moe"`` and put transformers' own default back.

    A model that is still set to ``"torch_moe"`` raises transformers' KeyError at its next call; set it to another
    implementation first.
    """
    dense, fp8 = _interfaces()
    from transformers.integrations.moe import grouped_mm_experts_forward

    for interface in (dense, fp8):
        interface._global_mapping.pop(NAME, None)
    dense.register(STOCK, grouped_mm_experts_forward)


def is_enabled() -> bool:
    """Tell whether ``"torch_moe"`` is registered."""
    return NAME in _interfaces()[0]._global_mapping


def is_default() -> bool:
    """Tell whether torch-moe has taken the place of transformers' default."""
    return getattr(_interfaces()[0]._global_mapping[STOCK], "is_torch_moe", False)


@contextmanager
def transformers_with(feature: str) -> Iterator[None]:
    """Have an import from transformers fail with what is missing and how to get it."""
    try:
        yield
    except ImportError as error:
        raise ImportError(
            f"torch_moe.integrations.transformers needs transformers with {feature}, which this environment lacks "
            "(pip install 'torch-moe[transformers]')"
        ) from error


def _interfaces() -> tuple[Host, Host]:
    with transformers_with("an experts interface"):
        from transformers.integrations.finegrained_fp8 import FP8ExpertsInterface
        from transformers.integrations.moe import ExpertsInterface
    return ExpertsInterface, FP8ExpertsInterface


def _where_there_are_kernels(ours: ExpertsForward, stock: ExpertsForward) -> ExpertsForward:
    def forward(self: Host, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        implementation = ours if has_kernels(hidden_states.device) else stock
        return implementation(self, hidden_states, top_k_index, top_k_weights)

    forward.is_torch_moe = True  # type: ignore[attr-defined]
    return forward
