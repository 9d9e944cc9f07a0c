"""Published models as data: the MoE layer of each, and what else counts into its parameters.

``PRESETS["mixtral-8x7b"].moe`` is a :class:`MoEConfig`; :func:`torch_moe.param_report` counts the whole model. Sizes
are those of the models' published ``config.json``; heads for multi-token prediction and vision towers are left out.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch_moe.attention_sizes import Attention, GatedDeltaNet, GroupedQueryAttention, LatentAttention
from torch_moe.config import ExpertsConfig, MoEConfig, RouterConfig, SharedExpertsConfig


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A model: its MoE layer, and the sizes of the rest.

    Parameters
    ----------
    name, source : str
        What it is called, and where the sizes are from.
    moe : MoEConfig
        One MoE layer.
    num_layers, num_moe_layers : int
        Layers, and those of them that are MoE; the others are dense.
    attention : mapping of Attention to int
        How often each kind of attention occurs.
    vocab_size : int
        Rows of the embedding.
    dense_intermediate_size : int, default=0
        Width of the dense layers, which have the experts' activation.
    tied_embeddings : bool, default=False
        Whether the logits' projection is the embedding.
    num_norms : int, default=None
        Norms of one hidden_size each; None: two per layer and one at the end.
    num_other_params : int, default=0
        Parameters of other kinds, which are no factor of any product.
    """

    name: str
    source: str
    moe: MoEConfig
    num_layers: int
    num_moe_layers: int
    attention: dict[Attention, int] = field(hash=False)
    vocab_size: int
    dense_intermediate_size: int = 0
    tied_embeddings: bool = False
    num_norms: int | None = None
    num_other_params: int = 0


def _mixtral() -> Preset:
    return Preset(
        name="mixtral-8x7b",
        source="Mixtral 8x7B, arXiv 2401.04088",
        moe=MoEConfig(
            router=RouterConfig(hidden_size=4096, num_experts=8, top_k=2),
            experts=ExpertsConfig(hidden_size=4096, intermediate_size=14336, num_experts=8),
        ),
        num_layers=32,
        num_moe_layers=32,
        attention={GroupedQueryAttention(num_heads=32, num_kv_heads=8, head_dim=128): 32},
        vocab_size=32000,
    )


def _switch() -> Preset:
    attention = GroupedQueryAttention(num_heads=12, num_kv_heads=12, head_dim=64)
    return Preset(
        name="switch-base-64",
        source="Switch-Base-64, arXiv 2101.03961",
        moe=MoEConfig(
            router=RouterConfig(
                hidden_size=768,
                num_experts=64,
                top_k=1,
                renormalize=False,
                input_jitter=0.01,
                capacity_factor=1.25,
            ),
            experts=ExpertsConfig(hidden_size=768, intermediate_size=3072, num_experts=64, activation="relu"),
        ),
        num_layers=24,  # an encoder and a decoder of 12, every other layer MoE
        num_moe_layers=12,
        attention={attention: 12 + 2 * 12},  # the decoder's layers have two
        vocab_size=32128,
        dense_intermediate_size=3072,
        tied_embeddings=True,
        num_norms=2 * 12 + 3 * 12 + 2,
        num_other_params=2 * 32 * 12,  # relative position biases
    )


def _deepseek_v3() -> Preset:
    return Preset(
        name="deepseek-v3",
        source="DeepSeek-V3, arXiv 2412.19437",
        moe=MoEConfig(
            router=RouterConfig(
                hidden_size=7168,
                num_experts=256,
                top_k=8,
                score_function="sigmoid",
                expert_bias=True,
                num_groups=8,
                topk_groups=4,
                routed_scaling_factor=2.5,
            ),
            experts=ExpertsConfig(hidden_size=7168, intermediate_size=2048, num_experts=256),
            shared_experts=SharedExpertsConfig(hidden_size=7168, intermediate_size=2048),
        ),
        num_layers=61,
        num_moe_layers=58,
        attention={LatentAttention(num_heads=128, q_lora_rank=1536, kv_lora_rank=512): 61},
        vocab_size=129280,
        dense_intermediate_size=18432,
    )


def _kimi_k2() -> Preset:
    return Preset(
        name="kimi-k2",
        source="Kimi-K2, arXiv 2507.20534",
        moe=MoEConfig(
            router=RouterConfig(
                hidden_size=7168,
                num_experts=384,
                top_k=8,
                score_function="sigmoid",
                expert_bias=True,
                routed_scaling_factor=2.827,
            ),
            experts=ExpertsConfig(hidden_size=7168, intermediate_size=2048, num_experts=384),
            shared_experts=SharedExpertsConfig(hidden_size=7168, intermediate_size=2048),
        ),
        num_layers=61,
        num_moe_layers=60,
        attention={LatentAttention(num_heads=64, q_lora_rank=1536, kv_lora_rank=512): 61},
        vocab_size=163840,
        dense_intermediate_size=18432,
    )


def _qwen3() -> Preset:
    return Preset(
        name="qwen3-30b-a3b",
        source="Qwen3-30B-A3B, arXiv 2505.09388",
        moe=MoEConfig(
            router=RouterConfig(hidden_size=2048, num_experts=128, top_k=8),
            experts=ExpertsConfig(hidden_size=2048, intermediate_size=768, num_experts=128),
        ),
        num_layers=48,
        num_moe_layers=48,
        attention={GroupedQueryAttention(num_heads=32, num_kv_heads=4, head_dim=128, qk_norm="head"): 48},
        vocab_size=151936,
    )


def _qwen3_next() -> Preset:
    full = GroupedQueryAttention(num_heads=16, num_kv_heads=2, head_dim=256, qk_norm="head", output_gate=True)
    linear = GatedDeltaNet(num_key_heads=16, num_value_heads=32, key_head_dim=128, value_head_dim=128, conv_size=4)
    return Preset(
        name="qwen3-next-80b-a3b",
        source="Qwen3-Next-80B-A3B, config.json",
        moe=MoEConfig(
            router=RouterConfig(hidden_size=2048, num_experts=512, top_k=10),
            experts=ExpertsConfig(hidden_size=2048, intermediate_size=512, num_experts=512),
            shared_experts=SharedExpertsConfig(hidden_size=2048, intermediate_size=512, gate="sigmoid"),
        ),
        num_layers=48,
        num_moe_layers=48,
        attention={full: 12, linear: 36},
        vocab_size=151936,
    )


def _gpt_oss(name: str, num_layers: int, num_experts: int) -> Preset:
    return Preset(
        name=name,
        source=f"{name}, arXiv 2508.10925",
        moe=MoEConfig(
            router=RouterConfig(
                hidden_size=2880,
                num_experts=num_experts,
                top_k=4,
                projection_bias=True,
                score_order="topk_then_score",
                renormalize=False,
            ),
            experts=ExpertsConfig(
                hidden_size=2880,
                intermediate_size=2880,
                num_experts=num_experts,
                bias=True,
                weight_layout="in_out",
                gate_layout="interleaved",
                alpha=1.702,
                limit=7.0,
                up_offset=1.0,
            ),
        ),
        num_layers=num_layers,
        num_moe_layers=num_layers,
        attention={
            GroupedQueryAttention(
                num_heads=64, num_kv_heads=8, head_dim=64, qkv_bias=True, output_bias=True, sinks=True
            ): num_layers
        },
        vocab_size=201088,
    )


def _olmoe() -> Preset:
    return Preset(
        name="olmoe-1b-7b",
        source="OLMoE-1B-7B, arXiv 2409.02060",
        moe=MoEConfig(
            router=RouterConfig(hidden_size=2048, num_experts=64, top_k=8, renormalize=False),
            experts=ExpertsConfig(hidden_size=2048, intermediate_size=1024, num_experts=64),
        ),
        num_layers=16,
        num_moe_layers=16,
        attention={GroupedQueryAttention(num_heads=16, num_kv_heads=16, head_dim=128, qk_norm="width"): 16},
        vocab_size=50304,
    )


def _llama4(name: str, num_experts: int, num_moe_layers: int) -> Preset:
    return Preset(
        name=name,
        source=f"{name}, config.json of its text model",
        moe=MoEConfig(
            router=RouterConfig(
                hidden_size=5120,
                num_experts=num_experts,
                top_k=1,
                score_function="sigmoid",
                score_order="topk_then_score",
                renormalize=False,
            ),
            experts=ExpertsConfig(
                hidden_size=5120,
                intermediate_size=8192,
                num_experts=num_experts,
                weight_layout="in_out",
                weight_position="input",
            ),
            shared_experts=SharedExpertsConfig(hidden_size=5120, intermediate_size=8192),
        ),
        num_layers=48,
        num_moe_layers=num_moe_layers,
        attention={GroupedQueryAttention(num_heads=40, num_kv_heads=8, head_dim=128): 48},
        vocab_size=202048,
        dense_intermediate_size=16384,
    )


def _glm() -> Preset:
    return Preset(
        name="glm-4.5",
        source="GLM-4.5, arXiv 2508.06471",
        moe=MoEConfig(
            router=RouterConfig(
                hidden_size=5120,
                num_experts=160,
                top_k=8,
                score_function="sigmoid",
                expert_bias=True,
                routed_scaling_factor=2.5,
            ),
            experts=ExpertsConfig(hidden_size=5120, intermediate_size=1536, num_experts=160),
            shared_experts=SharedExpertsConfig(hidden_size=5120, intermediate_size=1536),
        ),
        num_layers=92,
        num_moe_layers=89,
        attention={
            GroupedQueryAttention(num_heads=96, num_kv_heads=8, head_dim=128, qkv_bias=True, qk_norm="head"): 92
        },
        vocab_size=151552,
        dense_intermediate_size=12288,
    )


def _minimax() -> Preset:
    return Preset(
        name="minimax-m2",
        source="MiniMax-M2, config.json",
        moe=MoEConfig(
            router=RouterConfig(hidden_size=3072, num_experts=256, top_k=8, score_function="sigmoid", expert_bias=True),
            experts=ExpertsConfig(hidden_size=3072, intermediate_size=1536, num_experts=256),
        ),
        num_layers=62,
        num_moe_layers=62,
        attention={GroupedQueryAttention(num_heads=48, num_kv_heads=8, head_dim=128, qk_norm="width"): 62},
        vocab_size=200064,
    )


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        _switch(),
        _mixtral(),
        _deepseek_v3(),
        _kimi_k2(),
        _qwen3(),
        _qwen3_next(),
        _gpt_oss("gpt-oss-20b", 24, 32),
        _gpt_oss("gpt-oss-120b", 36, 128),
        _olmoe(),
        _llama4("llama-4-scout", 16, 48),
        _llama4("llama-4-maverick", 128, 24),
        _glm(),
        _minimax(),
    )
}
