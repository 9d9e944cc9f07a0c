"""Layers of published models, as data: one row per model, in the options of `torch_moe.MoE`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch_moe.cli.errors import UsageError


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
        return self.activation in ("swiglu", "geglu", "geglu_tanh", "reglu")

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
            If `top_k` or the groups do not fit that number.
        """
        if num_experts < self.top_k:
            raise UsageError(
                f"{self.name} picks top_k={self.top_k} experts per token, so it needs at least as many "
                f"(got {num_experts})"
            )
        if num_experts % self.num_groups != 0:
            raise UsageError(f"{self.name} has {self.num_groups} groups of experts; {num_experts} is no multiple of it")
        if num_experts // self.num_groups * self.topk_groups < self.top_k:
            raise UsageError(
                f"{self.name} picks {self.top_k} experts from {self.topk_groups} of {self.num_groups} "
                f"groups; {num_experts} experts are too few"
            )
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
        LayerShape(
            name="mixtral",
            source="Mixtral 8x7B, arXiv 2401.04088",
            hidden_size=4096,
            intermediate_size=14336,
            num_experts=8,
            top_k=2,
        ),
        LayerShape(
            name="qwen3-30b-a3b",
            source="Qwen3-30B-A3B, arXiv 2505.09388",
            hidden_size=2048,
            intermediate_size=768,
            num_experts=128,
            top_k=8,
        ),
        LayerShape(
            name="deepseek-v3",
            source="DeepSeek-V3, arXiv 2412.19437 (without its shared expert)",
            hidden_size=7168,
            intermediate_size=2048,
            num_experts=256,
            top_k=8,
            score_function="sigmoid",
            expert_bias=True,
            num_groups=8,
            topk_groups=4,
            routed_scaling_factor=2.5,
        ),
        LayerShape(
            name="gpt-oss",
            source="gpt-oss-20b, arXiv 2508.10925",
            hidden_size=2880,
            intermediate_size=2880,
            num_experts=32,
            top_k=4,
            gate_layout="interleaved",
            alpha=1.702,
            limit=7.0,
            up_offset=1.0,
            bias=True,
            score_order="topk_then_score",
            renormalize=False,
        ),
        LayerShape(
            name="switch",
            source="Switch-Base-64, arXiv 2101.03961",
            hidden_size=768,
            intermediate_size=3072,
            num_experts=64,
            top_k=1,
            activation="relu",
            renormalize=False,
        ),
    )
}
