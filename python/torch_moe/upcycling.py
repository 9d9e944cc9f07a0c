"""upcycle: a Mixture-of-Experts layer that starts as the dense feed-forward network it is made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torch_moe.nn.dense import DenseFFN
from torch_moe.nn.layer import MoE
from torch_moe.ops.activation import is_gated


@torch.no_grad()
def upcycle(
    dense_ffn: nn.Module,
    num_experts: int,
    top_k: int,
    *,
    granularity: int = 1,
    router_noise: float = 0.02,
    drop_ratio: float = 0.0,
    generator: torch.Generator | None = None,
    **options: Any,  # noqa: ANN401
) -> MoE:
    r"""Make a :class:`torch_moe.MoE` of a dense feed-forward network, whose function it starts with.

    Every expert is a copy. With ``granularity`` G, a copy is split into G experts of 1/G of the width each, and each
    token is routed to whole copies: the router starts with equal rows for the experts of a copy, so that they are
    chosen together, and ``down_proj`` is scaled by G (and by the inverse of ``routed_scaling_factor``), because their
    weights sum to 1. The output is the dense one's up to rounding, for every token that capacity does not drop;
    training tells the experts apart.

    Drop-upcycling gives that up for diversity: in every expert a random ``drop_ratio`` of the intermediate channels is
    drawn anew from the normal distribution with the mean and deviation of the weights replaced, matrix by matrix.

    Parameters
    ----------
    dense_ffn : Module
        A :class:`torch_moe.nn.DenseFFN`; a module with the linear layers ``gate_proj``, ``up_proj``, ``down_proj`` and
        an ``act_fn``; or ``nn.Sequential(Linear, activation, Linear)``. It stays as it is.
    num_experts : int
        Number of experts, a multiple of ``granularity``.
    top_k : int
        Experts per token, a multiple of ``granularity``.
    granularity : int, default=1
        Experts that one copy is split into; divides the intermediate size.
    router_noise : float, default=0.02
        Standard deviation of the router's rows, drawn once per copy. With 0 all tokens go to the first experts.
    drop_ratio : float, default=0.0
        Share of the channels drawn anew. 0.5 is the paper's choice.
    generator : torch.Generator, default=None
        Of the device of the weights; None is the default one.
    **options
        Of :class:`torch_moe.MoE`: the router's, ``capacity_factor``, ``weight_layout``, ``recompute``; where the module
        does not tell its activation, that with ``alpha``, ``limit`` and ``up_offset``.

    Returns
    -------
    MoE
        On the device and in the dtype of the weights.

    Raises
    ------
    TypeError
        If the module is none of the above.
    ValueError
        If sizes do not divide or fit, an activation is not known, or an option would change the output.

    References
    ----------
    arXiv 2212.05055 (sparse upcycling), 2410.07524 (granular, with scaling), 2502.19261 (drop-upcycling).
    """
    dense = _read(dense_ffn, options)
    intermediate_size, hidden_size = dense.up.shape[1:]
    for name, size in (("num_experts", num_experts), ("top_k", top_k), ("intermediate size", intermediate_size)):
        _require(granularity >= 1 and size % granularity == 0, f"granularity must divide {name} = {size}", granularity)
    _require(0 <= drop_ratio <= 1, "drop_ratio must be in [0, 1]", drop_ratio)
    _require(router_noise >= 0, "router_noise must not be negative", router_noise)
    _check_output_is_kept(dense.options, options)
    if granularity > 1:
        _check_copies_stay_whole(num_experts, granularity, options)

    layer = MoE(
        hidden_size,
        intermediate_size // granularity,
        num_experts,
        top_k,
        device=dense.up.device,
        dtype=dense.up.dtype,
        **{**dense.options, **options},
    )
    copies = num_experts // granularity
    rows = torch.empty(copies, hidden_size, device=dense.up.device, dtype=torch.float32)
    rows.normal_(std=router_noise, generator=generator)
    layer.router.weight.copy_(rows.repeat_interleave(granularity, dim=0))

    scale = layer.router.config.routed_scaling_factor
    channels = torch.arange(intermediate_size, device=dense.up.device).chunk(granularity)
    for expert in range(num_experts):
        own = channels[expert % granularity]
        up, down = dense.up[:, own].clone(), dense.down[:, own].clone()  # [1 or 2, I/G, H], [H, I/G]
        if drop_ratio > 0:
            _redraw_channels(up, down, drop_ratio, generator)
        bias = None if dense.up_bias is None else dense.up_bias[:, own]
        _write(layer, expert, up, down * (granularity / scale), bias)
        if layer.experts.down_proj_bias is not None and dense.down_bias is not None:
            layer.experts.down_proj_bias[expert] = dense.down_bias / scale
    return layer


# Options with which the layer is not the dense network, whatever the weights are.
_PLAIN: dict[str, object] = {
    "num_shared_experts": 0,
    "shared_intermediate_size": None,
    "projection": "linear",
    "num_shared_sinks": 0,
    "num_zero_experts": 0,
    "weight_position": "output",
    "renormalize_p": 1.0,
    "second_expert_policy": "all",
}


def _check_output_is_kept(own: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Refuse options that contradict those of the dense network, or make the layer another function."""
    for name, plain in {**_PLAIN, **own}.items():
        given = options.get(name, plain)
        # How gate and up are interleaved in memory is the layer's own choice.
        _require(given == plain or name == "gate_layout", f"{name} would change the dense output: leave it", given)
    softmax = options.get("score_function", "softmax") == "softmax"
    softmax_last = softmax and options.get("score_order") == "topk_then_score"
    renormalize = options.get("renormalize", True)
    _require(renormalize or softmax_last, "weights must sum to a constant: renormalize must be True", renormalize)


def _check_copies_stay_whole(num_experts: int, granularity: int, options: Mapping[str, Any]) -> None:
    """Refuse what chooses by more than the logits, of which the experts of a copy have equal ones."""
    forced = options.get("force_balanced") or options.get("force_biased")
    by_logits = options.get("selection", "topk") == "topk" and not forced
    _require(by_logits, "granularity above 1 needs selection='topk', which keeps copies whole", options)
    noisy = options.get("noisy", False)
    _require(not noisy, "granularity above 1 needs noisy=False: noise would part the experts of a copy", noisy)
    num_groups = options.get("num_groups", 1)
    whole = num_groups < 1 or num_experts // num_groups % granularity == 0  # the layer refuses less than 1
    _require(whole, f"num_groups must leave the {granularity} experts of a copy in one group", num_groups)


class _Dense(NamedTuple):
    """Weights of a dense network, one matrix per projection, and the options of experts that compute the same."""

    up: Tensor  # [2, I, H]: gate and up; [1, I, H] when not gated
    down: Tensor  # [H, I]
    up_bias: Tensor | None  # [2 or 1, I]
    down_bias: Tensor | None  # [H]
    options: Mapping[str, Any]


def _read(ffn: nn.Module, options: Mapping[str, Any]) -> _Dense:
    if isinstance(ffn, DenseFFN):
        names = ("activation", "gate_layout", "alpha", "limit", "limit_position", "up_offset")
        own = {name: getattr(ffn, name) for name in names} | {"bias": ffn.down_proj.bias is not None}
        halves = 2 if is_gated(ffn.activation) else 1
        weight, bias = ffn.gate_up_proj.weight, ffn.gate_up_proj.bias
        return _Dense(
            _by_projection(weight, halves, ffn.gate_layout),
            ffn.down_proj.weight,
            None if bias is None else _by_projection(bias, halves, ffn.gate_layout),
            ffn.down_proj.bias,
            own,
        )
    if isinstance(ffn, nn.Sequential) and [isinstance(part, nn.Linear) for part in ffn] == [True, False, True]:
        linears: list[object] = [ffn[0], ffn[2]]
        known, kind = _UNGATED, _kind(ffn[1])
    else:
        linears = [getattr(ffn, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
        known, kind = _GATED, _kind(getattr(ffn, "act_fn", None))
    projections = [linear for linear in linears if isinstance(linear, nn.Linear)]
    if len(projections) < len(linears):
        raise TypeError(
            "upcycle: dense_ffn must be a DenseFFN, have linear gate_proj, up_proj and down_proj, or be "
            f"Sequential(Linear, activation, Linear), got {type(ffn).__name__} (copy its weights into a DenseFFN)"
        )
    own = {"activation": known.get(kind), "alpha": 1.0, "limit": None, "up_offset": 0.0}
    if kind not in known:
        if "activation" not in options:
            raise ValueError(f"upcycle: the activation {kind} is not known here: give activation=...")
        own = {"activation": options["activation"]}
    biases = [linear.bias for linear in projections if linear.bias is not None]
    if len(biases) not in (0, len(projections)):
        raise ValueError("upcycle: all projections must have a bias, or none (add one of zeros)")
    *ups, down = projections
    sizes = [list(linear.weight.shape) for linear in projections]
    if any(size != sizes[-1][::-1] for size in sizes[:-1]):
        raise ValueError(
            f"upcycle: the projections of dense_ffn must go from one width to another and back, got weights of {sizes}"
        )
    return _Dense(
        torch.stack([linear.weight for linear in ups]),
        down.weight,
        torch.stack([linear.bias for linear in ups]) if biases else None,
        down.bias,
        {**own, "bias": bool(biases)},
    )


_UNGATED = {"SiLU": "silu", "GELU": "gelu", "GELU(tanh)": "gelu_tanh", "ReLU": "relu"}
_GATED = {"SiLU": "swiglu", "GELU": "geglu", "GELU(tanh)": "geglu_tanh", "ReLU": "reglu"}


def _kind(activation: object) -> str:
    """Return the name of an activation's class, with the approximation of a GELU."""
    tanh = isinstance(activation, nn.GELU) and activation.approximate == "tanh"
    return type(activation).__name__ + ("(tanh)" if tanh else "")


def _by_projection(stacked: Tensor, halves: int, gate_layout: str) -> Tensor:
    """Split (halves * I, ...) into (halves, I, ...)."""
    if gate_layout == "interleaved" and halves == 2:
        return torch.stack([stacked[0::2], stacked[1::2]])
    return stacked.view(halves, -1, *stacked.shape[1:])


def _stacked(projections: Tensor, gate_layout: str) -> Tensor:
    """Undo :func:`_by_projection`."""
    if gate_layout == "interleaved":
        projections = projections.transpose(0, 1)
    return projections.flatten(0, 1)


def _write(layer: MoE, expert: int, up: Tensor, down: Tensor, bias: Tensor | None) -> None:
    experts = layer.experts
    gate_up, transposed = _stacked(up, experts.gate_layout), experts.weight_layout == "in_out"
    experts.gate_up_proj[expert] = gate_up.T if transposed else gate_up
    experts.down_proj[expert] = down.T if transposed else down
    if experts.gate_up_proj_bias is not None and bias is not None:
        experts.gate_up_proj_bias[expert] = _stacked(bias, experts.gate_layout)


def _redraw_channels(up: Tensor, down: Tensor, share: float, generator: torch.Generator | None) -> None:
    """Draw a random share of the intermediate channels anew, each whole, in place."""
    channels = torch.rand(up.shape[1], generator=generator, device=up.device).argsort()[: round(share * up.shape[1])]
    for matrix in up:
        matrix[channels] = _redraw(matrix[channels], generator)
    down[:, channels] = _redraw(down[:, channels], generator)


def _redraw(weights: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw normal numbers with the mean and deviation of ``weights``, which may be none."""
    if weights.numel() < 2:
        return weights
    drawn = torch.randn(weights.shape, generator=generator, device=weights.device)
    deviation, mean = torch.std_mean(weights.float())
    return (drawn * deviation + mean).to(weights.dtype)


def _require(condition: bool, expected: str, got: object) -> None:
    if not condition:
        raise ValueError(f"upcycle: {expected}, got {got}")
