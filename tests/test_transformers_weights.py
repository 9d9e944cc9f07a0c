"""Per-expert checkpoints to stacked weights and back: the same bits, by transformers' tables and by our short rules."""

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed (pip install 'torch-moe[transformers]')")

from safetensors.torch import load_file
from transformers import DeepseekV3ForCausalLM, MixtralForCausalLM, NemotronHForCausalLM, Qwen3MoeForCausalLM
from transformers_models import tiny_model

import torch_moe
from torch_moe.integrations import transformers as engine

PER_EXPERT = [(MixtralForCausalLM, "mixtral"), (Qwen3MoeForCausalLM, "proj"), (DeepseekV3ForCausalLM, "proj")]


def saved(cls, tmp_path):
    """Return a model with 12 experts, more than digits sort by, and the tensors of its checkpoint."""
    model = tiny_model(cls, num_experts=12, num_local_experts=12, n_routed_experts=12)
    model.save_pretrained(tmp_path)
    return model, load_file(tmp_path / "model.safetensors")


def assert_identical(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


@pytest.mark.parametrize(("cls", "form"), PER_EXPERT)
def test_by_our_rules(cls, form, tmp_path):
    model, checkpoint = saved(cls, tmp_path)
    assert any(".experts.11." in name for name in checkpoint)
    stacked = engine.stack_experts(checkpoint)
    assert_identical(stacked, model.state_dict())
    assert_identical(engine.unstack_experts(stacked, form), checkpoint)


@pytest.mark.parametrize("cls", [*(cls for cls, _ in PER_EXPERT), NemotronHForCausalLM])
def test_by_transformers_tables(cls, tmp_path):
    model, checkpoint = saved(cls, tmp_path)
    converted = engine.convert_checkpoint(checkpoint, model.config)
    assert_identical(converted, model.state_dict())
    assert_identical(engine.convert_checkpoint(converted, model.config, reverse=True), checkpoint)


def test_stacked_experts_are_those_of_our_layer(tmp_path):
    model, checkpoint = saved(MixtralForCausalLM, tmp_path)
    stacked = engine.stack_experts(checkpoint)
    block = "model.layers.0.mlp."
    layer = torch_moe.MoE(32, 24, 12, 2)
    layer.experts.load_state_dict({name: stacked[f"{block}experts.{name}"] for name in ("gate_up_proj", "down_proj")})
    with torch.no_grad():
        layer.router.weight.copy_(stacked[f"{block}gate.weight"])
        hidden = torch.randn(2, 5, 32)
        expected = model.get_submodule(block[:-1])(hidden)
        torch.testing.assert_close(layer(hidden), expected[0] if isinstance(expected, tuple) else expected)


def test_a_missing_expert_is_named(tmp_path):
    model, checkpoint = saved(MixtralForCausalLM, tmp_path)
    name = next(name for name in checkpoint if ".experts.3.w2" in name)
    del checkpoint[name]
    for convert in (engine.stack_experts, lambda tensors: engine.convert_checkpoint(tensors, model.config)):
        with pytest.raises(ValueError, match=r"experts: w2 of experts \[3\] is missing"):
            convert(checkpoint)


def test_a_missing_projection_and_an_unknown_form_are_named(tmp_path):
    _, checkpoint = saved(MixtralForCausalLM, tmp_path)
    without = {name: tensor for name, tensor in checkpoint.items() if ".w3." not in name}
    with pytest.raises(ValueError, match=r"experts: projections must be one of .* got \['w1', 'w2'\]"):
        engine.stack_experts(without)
    with pytest.raises(ValueError, match="form must be in"):
        engine.unstack_experts({}, "w123")
