"""Layers to measure, in the options of `torch_moe.MoE`: published ones, whose sizes are in `torch_moe.presets`."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from torch_moe.cli.errors import UsageError
from torch_moe.config import RouterConfig
from torch_moe.ops.activation import is_gated
from torch_moe.presets import PRESETS


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """Sizes and options of one MoE layer."""

    name: str
    source: str
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    num_tokens: int = 512
    activation: str = "swiglu"
    gate_layout: str = "concat"
    alpha: float = 1.0
    limit: float | None = None
    up_offset: float = 0.0
    bias: bool = False
    score_function: str = "softmax"
    score_order: str = "score_then_topk"
    renormalize: bool = True
    routed_scaling_factor: float = 1.0
    expert_bias: bool = False
    num_groups: int = 1
    topk_groups: int = 1

    @property
    def is_gated(self) -> bool:
        """Return whether the first GEMM gives a gate and an up value per intermediate column."""
        return is_gated(self.activation)

    @property
    def pre_activation_size(self) -> int:
        """Return the width of the first GEMM: 2I when gated, else I."""
        return self.intermediate_size * (2 if self.is_gated else 1)

    @property
    def num_rows(self) -> int:
        """Return R = T * K."""
        return self.num_tokens * self.top_k

    @property
    def params_per_expert(self) -> int:
        """Return the number of weights in one expert."""
        weights = (self.pre_activation_size + self.intermediate_size) * self.hidden_size
        return weights + (self.pre_activation_size + self.hidden_size if self.bias else 0)

    @property
    def num_params(self) -> int:
        """Return the number of weights in all experts and the router."""
        return self.num_experts * (self.params_per_expert + self.hidden_size)

    def with_experts(self, num_experts: int) -> LayerShape:
        """Return the same layer with another number of experts.

        Raises
        ------
        UsageError
            If the layer's router cannot have that number.
        """
        try:
            RouterConfig(
                hidden_size=self.hidden_size, num_experts=num_experts, top_k=self.top_k, **self.router_options()
            )
        except ValueError as error:
            raise UsageError(f"{self.name} cannot have {num_experts} experts: {error}") from error
        return replace(self, num_experts=num_experts)

    def layer_options(self) -> dict[str, Any]:
        """Return the keyword arguments of `torch_moe.MoE`."""
        sizes = ("hidden_size", "intermediate_size", "num_experts", "top_k", "bias", "expert_bias")
        return self._options(*sizes) | self.router_options() | self.activation_options()

    def router_options(self) -> dict[str, Any]:
        """Return the keyword arguments of `torch_moe.ops.route`, without the selection bias."""
        return self._options(
            "score_function", "score_order", "renormalize", "routed_scaling_factor", "num_groups", "topk_groups"
        )

    def activation_options(self) -> dict[str, Any]:
        """Return the keyword arguments of `torch_moe.ops.activation`."""
        return self._options("activation", "gate_layout", "alpha", "limit", "up_offset")

    def _options(self, *names: str) -> dict[str, Any]:
        return {name: getattr(self, name) for name in names}


def _of_preset(name: str, preset_name: str) -> LayerShape:
    """Return the routed part of a published layer: the bench has no shared experts, capacity or jitter."""
    preset = PRESETS[preset_name]
    router, experts = preset.moe.router, preset.moe.experts
    given = {field.name for field in fields(LayerShape)} - {"name", "source", "num_tokens"}
    options = {key: getattr(experts if hasattr(experts, key) else router, key) for key in given}
    without = "" if preset.moe.shared_experts is None else " (without its shared expert)"
    # The order of a weight's dimensions is the bench's, which compares all candidates on the same tensors.
    return LayerShape(name=name, source=preset.source + without, **options)


SHAPES = {
    shape.name: shape
    for shape in (
        LayerShape(
            name="seed",
            source="a small layer with Mixtral's proportions",
            hidden_size=1024,
            intermediate_size=3584,
            num_experts=8,
            top_k=2,
        ),
        _of_preset("mixtral", "mixtral-8x7b"),
        _of_preset("qwen3-30b-a3b", "qwen3-30b-a3b"),
        _of_preset("deepseek-v3", "deepseek-v3"),
        _of_preset("gpt-oss", "gpt-oss-20b"),
        _of_preset("switch", "switch-base-64"),
    )
}
