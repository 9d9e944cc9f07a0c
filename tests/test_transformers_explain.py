"""explain: which experts of a model run on torch-moe, how, and what to do about those that do not."""

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed (pip install 'torch-moe[transformers]')")

from test_transformers_gate import strange_gate
from transformers import GptOssForCausalLM, Llama4ForCausalLM, MixtralForCausalLM
from transformers_experts import make_experts
from transformers_models import tiny_model

import torch_moe
from torch_moe.integrations import transformers as engine

pytestmark = pytest.mark.usefixtures("enabled_engine")


def test_fused_and_not():
    model = tiny_model(GptOssForCausalLM)
    assert "runs on transformers' 'grouped_mm'" in engine.explain(model)
    model.set_experts_implementation("torch_moe")
    (line,) = engine.explain(model).splitlines()
    assert line.startswith("2 x model.layers.*.mlp.experts (GptOssExperts): torch_moe, one fused operator: swiglu, ")
    assert "limit=7.0" in line
    assert "alpha=1.702" in line
    assert line.endswith("weights in_out")
    assert torch_moe.explain(model=model).endswith(line)

    strange = make_experts(apply_gate=strange_gate)
    assert "not fused: its own activation between two grouped GEMMs (0 known activations" in engine.explain(strange)


def test_default_and_disabled():
    model = tiny_model(MixtralForCausalLM)
    engine.enable(as_default=True)
    assert "one fused operator: swiglu" in engine.explain(model)
    model.set_experts_implementation("torch_moe")
    engine.disable()
    assert "not registered: the next call raises KeyError (call enable())" in engine.explain(model)
    with pytest.raises(KeyError, match="torch_moe"):
        model(torch.tensor([[3, 4]]))


def test_undecorated_and_none():
    model = tiny_model(Llama4ForCausalLM)
    assert "ignores experts_implementation (swap(model) changes that)" in engine.explain(model)
    engine.swap(model)
    assert "by a change of class" in engine.explain(model)
    assert engine.explain(torch.nn.Linear(2, 2)) == "no experts module of transformers"


def test_weights_on_no_device():
    with torch.device("meta"):
        module = make_experts()
    module.act_fn = torch.nn.SiLU()
    assert "one fused operator: swiglu" in engine.explain(module)
