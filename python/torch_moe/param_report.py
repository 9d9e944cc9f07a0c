"""How large a model is: parameters, operations and memory, counted on modules that hold no memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from torch_moe.config import MoEConfig
from torch_moe.nn import DenseFFN, MoE
from torch_moe.presets import PRESETS, Preset

# Adam's two moments, and the fp32 copy of the weights that training in 16 bits keeps.
_MOMENT_BYTES, _MASTER_BYTES = 8, 4


@dataclass(frozen=True, kw_only=True)
class ParamReport:
    """What a model has and what a token uses of it.

    Attributes
    ----------
    embeddings, unembedding, attention, routers, routed_experts, shared_experts, dense, other : int
        Parameters of all layers together. Norms and position biases are other; tied embeddings count once. Selection
        biases are no parameters.
    active_routed_experts : int
        Those of the routed experts that a token passes.
    flops_per_token : int
        Operations of a forward pass, two per weight of every product a token takes part in. The attention's products of
        queries with keys, which grow with the context, are not counted. A training step costs three times as much.
    """

    embeddings: int
    unembedding: int
    attention: int
    routers: int
    routed_experts: int
    active_routed_experts: int
    shared_experts: int
    dense: int
    other: int
    flops_per_token: int

    @property
    def total(self) -> int:
        """Return all parameters."""
        return self._always + self.routed_experts

    @property
    def active(self) -> int:
        """Return the parameters that a token uses, both embeddings included."""
        return self._always + self.active_routed_experts

    @property
    def _always(self) -> int:
        parts = (self.embeddings, self.unembedding, self.attention, self.routers, self.shared_experts, self.dense)
        return sum(parts) + self.other

    def weight_bytes(self, dtype: torch.dtype = torch.bfloat16) -> int:
        """Return the memory of the weights.

        Parameters
        ----------
        dtype : torch.dtype, default=torch.bfloat16
            Of the weights.

        Returns
        -------
        int
            Bytes.
        """
        return self.total * dtype.itemsize

    def training_bytes(self, dtype: torch.dtype = torch.bfloat16) -> int:
        """Return the memory of weights, gradients, AdamW's fp32 states and master weights, without activations.

        Parameters
        ----------
        dtype : torch.dtype, default=torch.bfloat16
            Of weights and gradients.

        Returns
        -------
        int
            Bytes.
        """
        master = _MASTER_BYTES if dtype.itemsize < _MASTER_BYTES else 0
        return self.total * (2 * dtype.itemsize + master + _MOMENT_BYTES)


def param_report(model: Preset | MoEConfig | str) -> ParamReport:
    """Count a published model, or one MoE layer.

    Parameters
    ----------
    model : Preset, MoEConfig or str
        A model, a layer alone, or the name of a preset.

    Returns
    -------
    ParamReport
        The counts.

    Raises
    ------
    ValueError
        If there is no preset of that name.

    Examples
    --------
    >>> report = param_report("mixtral-8x7b")
    >>> f"{report.total:,} {report.active:,}"
    '46,702,792,704 12,879,925,248'
    """
    if isinstance(model, str):
        if model not in PRESETS:
            raise ValueError(f"param_report: model must be one of {', '.join(PRESETS)}, got {model!r}")
        model = PRESETS[model]
    if isinstance(model, MoEConfig):
        return _report(model)
    hidden_size = model.moe.router.hidden_size
    norms = 2 * model.num_layers + 1 if model.num_norms is None else model.num_norms
    kinds = [(attention.build(hidden_size), count) for attention, count in model.attention.items()]
    num_dense = model.num_layers - model.num_moe_layers
    dense: nn.Module = nn.Module()
    if num_dense:
        experts = model.moe.experts
        dense = DenseFFN(hidden_size, model.dense_intermediate_size, activation=experts.activation, device="meta")
    embedding = model.vocab_size * hidden_size
    return _report(
        model.moe,
        num_layers=model.num_moe_layers,
        embeddings=embedding,
        unembedding=0 if model.tied_embeddings else embedding,
        attention=sum(_count(modules) * count for modules, count in kinds),
        dense=_count(dense) * num_dense,
        other=norms * hidden_size + model.num_other_params,
        products=embedding + sum(_products(modules) * count for modules, count in kinds) + _products(dense) * num_dense,
    )


def _report(
    config: MoEConfig,
    *,
    num_layers: int = 1,
    embeddings: int = 0,
    unembedding: int = 0,
    attention: int = 0,
    dense: int = 0,
    other: int = 0,
    products: int = 0,
) -> ParamReport:
    layer = MoE.from_config(config, device="meta")
    experts, router, shared = layer.experts, layer.router, layer.shared_experts
    num_experts = config.experts.num_experts
    # A token's choices may hold experts without weights: it then passes fewer, which counts can only bound.
    chosen = min(config.router.top_k, num_experts)
    matrices = (experts.gate_up_proj.numel() + experts.down_proj.numel()) // num_experts * chosen
    matrices += router.weight.numel() + (0 if router.mlp is None else _products(router.mlp))
    matrices += 0 if shared is None else _products(shared)
    latent = [part for part in (layer.latent_down, layer.latent_up) if part is not None]
    matrices += sum(_products(part) for part in latent)
    ends = _count(layer) - _count(router) - _count(experts) - (0 if shared is None else _count(shared))
    return ParamReport(
        embeddings=embeddings,
        unembedding=unembedding,
        attention=attention,
        routers=_count(router) * num_layers,
        routed_experts=_count(experts) * num_layers,
        active_routed_experts=_count(experts) // num_experts * chosen * num_layers,
        shared_experts=0 if shared is None else _count(shared) * num_layers,
        dense=dense,
        other=other + ends * num_layers,
        flops_per_token=2 * (products + matrices * num_layers),
    )


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _products(module: nn.Module) -> int:
    """Return the weights that multiply a token: those of linear maps and convolutions, without biases."""
    return sum(part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear | nn.Conv1d))
