"""activation: the nonlinearity between the two GEMMs."""

from typing import Any

import torch
from torch import Tensor

from torch_moe.ops._common import Context, Options, check_rank, refuse_double_backward, register_autograd, register_fake

GATED_ACTIVATIONS = ("swiglu", "geglu", "geglu_tanh", "reglu")
UNGATED_ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")


def is_gated(activation: str) -> bool:
    """Tell whether ``activation`` takes a gate and an up value per output column."""
    return activation in GATED_ACTIVATIONS


def activation(
    pre_activation: Tensor,
    activation: str = "swiglu",
    *,
    gate_layout: str = "concat",
    alpha: float = 1.0,
    limit: float | None = None,
    up_offset: float = 0.0,
) -> Tensor:
    r"""Apply the expert's nonlinearity, gated or not, to each row.

    With gate :math:`g` and up value :math:`u`: ``swiglu`` is :math:`g\,\sigma(\alpha g)(u + \mathrm{up\_offset})`,
    after :math:`g \leftarrow \min(g, \mathrm{limit})` and :math:`u \leftarrow \mathrm{clamp}(u, \pm\mathrm{limit})`;
    ``geglu`` :math:`g\,\Phi(g)\,u`, ``geglu_tanh`` the same by the tanh approximation, ``reglu``
    :math:`\max(g, 0)\,u`. Not gated: ``silu``, ``gelu``, ``gelu_tanh``, ``relu`` and ``relu2``
    :math:`= \max(h, 0)^2`. Differentiable in ``pre_activation``; the gradient is zero outside the clamp.

    Parameters
    ----------
    pre_activation : Tensor of shape (num_rows, 2 * intermediate_size), dtype=float32, bfloat16, float16 or float64
        Gate and up values; of shape (num_rows, intermediate_size) when not gated.
    activation : str, default="swiglu"
        One of the names above.
    gate_layout : {"concat", "interleaved"}, default="concat"
        All gates, then all up values; or gate and up in turn.
    alpha, up_offset : float
        ``swiglu`` only. gpt-oss has 1.702 and 1.
    limit : float, default=None
        ``swiglu`` only. None clamps nothing; gpt-oss has 7.

    Returns
    -------
    Tensor of shape (num_rows, intermediate_size), same dtype
        Computed in fp32 (fp64 for float64).

    Raises
    ------
    RuntimeError
        If an option is unknown, or an odd last dimension is to be gated.

    References
    ----------
    arXiv 2002.05202 (GLU variants), 1606.08415 (GELU), 2109.08668 (squared ReLU).
    """
    output: Tensor = torch.ops.moe.activation(
        pre_activation, activation, gate_layout=gate_layout, alpha=alpha, limit=limit, up_offset=up_offset
    )
    return output


@register_fake("activation")
def _(pre_activation: Tensor, activation: str = "swiglu", **options: Options) -> Tensor:
    check_rank("activation", "pre_activation", pre_activation, 2)
    num_rows, width = pre_activation.shape
    return pre_activation.new_empty((num_rows, width // 2 if is_gated(activation) else width))


@register_fake("activation_backward")
def _(grad_output: Tensor, pre_activation: Tensor, activation: str, **options: Options) -> Tensor:
    return pre_activation.new_empty(pre_activation.shape)


def _setup_context(ctx: Context, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
    pre_activation, ctx.activation = inputs
    ctx.save_for_backward(pre_activation)
    ctx.options = keyword_only_inputs


def _backward(ctx: Context, grad_output: Tensor) -> tuple[Tensor, None]:
    (pre_activation,) = ctx.saved_tensors
    return torch.ops.moe.activation_backward(grad_output, pre_activation, ctx.activation, **ctx.options), None


register_autograd("activation", _backward, setup_context=_setup_context)
refuse_double_backward("activation_backward")
