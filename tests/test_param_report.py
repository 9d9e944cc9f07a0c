"""param_report: counts of published models, exact, and the arithmetic of memory and operations."""

import dataclasses

import pytest
import torch

from torch_moe import ExpertsConfig, MoE, MoEConfig, RouterConfig, param_report
from torch_moe.presets import PRESETS

# Totals: the parameters of transformers 5.18's models, built on the meta device from the published config.json.
TOTALS = {
    "switch-base-64": 3_790_748_928,
    "mixtral-8x7b": 46_702_792_704,
    "deepseek-v3": 671_026_404_352,
    "kimi-k2": 1_026_408_209_408,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-next-80b-a3b": 79_674_391_296,
    "gpt-oss-20b": 20_914_757_184,
    "gpt-oss-120b": 116_829_156_672,
    "olmoe-1b-7b": 6_919_161_856,
    "llama-4-scout": 107_769_861_120,
    "llama-4-maverick": 400_711_848_960,
    "glm-4.5": 352_797_814_784,
    "minimax-m2": 228_689_748_992,
}
# What the models' authors say, in billions: "37B activated" and the like. Some count no embeddings.
ACTIVE_BILLIONS = {
    "mixtral-8x7b": 12.9, "deepseek-v3": 37, "kimi-k2": 32, "qwen3-30b-a3b": 3.3, "olmoe-1b-7b": 1.3,
    "llama-4-scout": 17, "llama-4-maverick": 17, "glm-4.5": 32, "minimax-m2": 10,
}  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
def test_totals(name):
    assert param_report(name).total == TOTALS[name]


@pytest.mark.parametrize("name", ACTIVE_BILLIONS)
def test_active_as_published(name):
    report, published = param_report(name), ACTIVE_BILLIONS[name] * 1e9
    rounding = 0.03
    assert (report.active - report.embeddings - report.unembedding) * (1 - rounding) <= published
    assert published <= report.active * (1 + rounding)


def test_counts_by_hand():
    """Mixtral and gpt-oss from their sizes alone."""
    mixtral = param_report("mixtral-8x7b")
    assert mixtral.active == 12_879_925_248
    assert mixtral.routed_experts == 32 * 8 * 3 * 4096 * 14336
    assert mixtral.attention == 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024)
    assert mixtral.embeddings == mixtral.unembedding == 32000 * 4096
    assert mixtral.other == 65 * 4096
    assert mixtral.flops_per_token == 2 * (mixtral.active - mixtral.embeddings - mixtral.other)
    gpt_oss = [param_report(name) for name in ("gpt-oss-20b", "gpt-oss-120b")]
    assert [round((r.active - r.embeddings) / 1e9, 2) for r in gpt_oss] == [3.61, 5.13]  # the model card's
    router = (2880 + 1) * 128
    assert gpt_oss[1].routers == 36 * router


def test_textbook_layer():
    """4096 x 16384, two matrices: 8 experts 1,073,741,824, 2 active 268,435,456, and the router they leave out."""
    config = MoEConfig(
        router=RouterConfig(hidden_size=4096, num_experts=8, top_k=2),
        experts=ExpertsConfig(hidden_size=4096, intermediate_size=16384, num_experts=8, activation="relu"),
    )
    report = param_report(config)
    assert (report.routed_experts, report.active_routed_experts) == (1_073_741_824, 268_435_456)
    assert report.routers == 32_768
    assert report.total == sum(p.numel() for p in MoE.from_config(config, device="meta").parameters())
    attention = 4 * 4096**2
    dense = 134_217_728 + attention
    ratios = [(experts + attention) / dense for experts in (report.routed_experts, report.active_routed_experts)]
    assert [round(ratio, 2) for ratio in ratios] == [5.67, 1.67]


def test_memory():
    report = param_report("olmoe-1b-7b")
    assert report.weight_bytes() == 2 * report.total
    assert report.weight_bytes(torch.float32) == 4 * report.total
    # Weights, gradients, master copy, two moments; in fp32 the weights are the master copy.
    assert report.training_bytes() == (2 + 2 + 4 + 8) * report.total
    assert report.training_bytes(torch.float32) == (4 + 4 + 8) * report.total


def test_unknown_preset():
    with pytest.raises(ValueError, match=r"param_report: model must be one of .*mixtral-8x7b.*got 'gpt-4'"):
        param_report("gpt-4")


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_runs_small(name):
    """The layer as data is a layer: the same options at small sizes, forward and backward."""
    moe = PRESETS[name].moe
    sizes = {"hidden_size": 16, "num_experts": 32}
    shared = moe.shared_experts
    small = MoEConfig(
        router=dataclasses.replace(moe.router, **sizes),
        experts=dataclasses.replace(moe.experts, intermediate_size=8, **sizes),
        shared_experts=shared and dataclasses.replace(shared, hidden_size=16, intermediate_size=8),
    )
    layer = MoE.from_config(small)
    layer(torch.randn(2, 5, 16)).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())
    assert layer.router.weight.grad.abs().sum() > 0
