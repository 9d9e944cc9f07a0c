"""The change of class for the experts that transformers' interface does not serve: equal to stock, and undone."""

import copy
import importlib
import pickle

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed (pip install 'torch-moe[transformers]')")

from helpers import randn
from transformers import (
    DbrxForCausalLM,
    JetMoeForCausalLM,
    Llama4ForCausalLM,
    LongcatFlashForCausalLM,
    MixtralForCausalLM,
    NllbMoeConfig,
    NllbMoeForConditionalGeneration,
    SwitchTransformersForConditionalGeneration,
)
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeSparseMLP
from transformers.models.step3p7.modeling_step3p7 import Step3p7TextModel
from transformers_models import MODELS, randomise, tiny_inputs, tiny_model, token_ids

from torch_moe.integrations import transformers as engine
from torch_moe.integrations.transformers import swapped
from torch_moe.integrations.transformers.swap import SWAPS

CLASSES = [
    DbrxForCausalLM,
    JetMoeForCausalLM,
    Llama4ForCausalLM,
    LongcatFlashForCausalLM,
    Step3p7TextModel,
    SwitchTransformersForConditionalGeneration,
]
BOUND = 1e-4  # of whole models in fp32, relative to the largest entry


pytestmark = pytest.mark.usefixtures("one_thread")


def inputs_of(model, num_tokens=7, seed=0):
    inputs = tiny_inputs(model, num_tokens, seed)
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = token_ids(2, num_tokens - 2, seed=seed + 1)
    return inputs


def run(model, inputs):
    model.zero_grad()
    output = model(**inputs)[0]
    output.backward(randn(*output.shape, dtype=output.dtype, seed=5))
    return {"output": output.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        scale = max(value.abs().max().item(), BOUND)
        torch.testing.assert_close(actual[name], value, rtol=0, atol=BOUND * scale, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_logits_and_gradients_and_undo(cls):
    model = tiny_model(cls)
    inputs = inputs_of(model)
    classes, names = [type(m) for m in model.modules()], list(model.state_dict())
    expected = run(model, inputs)

    changed = engine.swap(model)
    assert changed
    assert engine.swap(model) == []
    assert list(model.state_dict()) == names
    assert "by a change of class" in engine.explain(model)
    assert_same(run(model, inputs), expected)

    assert engine.unswap(model) == changed
    assert [type(m) for m in model.modules()] == classes
    assert "swap(model) changes that" in engine.explain(model)
    assert all(torch.equal(value, expected[name]) for name, value in run(model, inputs).items())


def test_every_class_is_tried():
    """A class of the table that no model above has would be untested."""
    tried = {type(m).__name__ for cls in CLASSES for m in tiny_model(cls).modules()}
    assert set(SWAPS) - tried == {"NllbMoeSparseMLP"}
    for name, known in SWAPS.items():
        text = (MODELS / known.module / f"modeling_{known.module}.py").read_text(encoding="utf-8")
        assert f"class {name}(" in text


def test_only_exactly_these_classes():
    model = tiny_model(Llama4ForCausalLM)
    moe = next(m for m in model.modules() if type(m).__name__ == "Llama4TextMoe")

    class Llama4TextMoe(type(moe)):  # somebody else's, of the same name
        pass

    moe.__class__ = Llama4TextMoe
    assert not any(name.endswith("feed_forward") and model.get_submodule(name) is moe for name in engine.swap(model))
    assert type(moe) is Llama4TextMoe
    assert engine.swap(tiny_model(MixtralForCausalLM)) == []


def test_copies_and_pickles():
    model = tiny_model(Llama4ForCausalLM)
    inputs = inputs_of(model)
    engine.swap(model)
    expected = model(**inputs)[0]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(**inputs)[0], expected)
        assert engine.unswap(other)
    with pytest.raises(
        AttributeError, match=r"'torch_moe\.integrations\.transformers\.swap' has no attribute 'Missing'"
    ):
        importlib.import_module("torch_moe.integrations.transformers.swap").Missing  # noqa: B018


def test_llama4_computes_the_chosen_experts_only(monkeypatch):
    model = tiny_model(Llama4ForCausalLM)
    engine.swap(model)
    rows = []
    original = swapped.experts_forward
    monkeypatch.setattr(swapped, "experts_forward", lambda *args: rows.append(args[1].shape[0]) or original(*args))
    model(**inputs_of(model))
    assert set(rows) == {2 * 7 * model.config.num_experts_per_tok}


def test_llama4_with_several_experts_per_token():
    model = tiny_model(Llama4ForCausalLM, num_experts_per_tok=3)
    inputs = inputs_of(model)
    expected = run(model, inputs)
    moe = next(m for m in model.modules() if type(m).__name__ == "Llama4TextMoe")
    hidden = randn(2, 5, 32)
    _, router_logits = moe(hidden)
    engine.swap(model)
    assert_same(run(model, inputs), expected)
    assert torch.equal(moe(hidden)[1], router_logits)


def test_longcat_s_identity_experts_are_used():
    model = tiny_model(LongcatFlashForCausalLM)
    seen = []
    experts = [module for module in model.modules() if type(module).__name__ == "LongcatFlashExperts"]
    for module in experts:
        module.register_forward_pre_hook(lambda m, args: seen.append((args[1] >= m.num_routed_experts).float().mean()))
    model(**inputs_of(model))
    assert 0 < torch.stack(seen).mean() < 1


def test_switch_drops_by_capacity():
    model = tiny_model(SwitchTransformersForConditionalGeneration, expert_capacity=1)
    inputs = inputs_of(model)
    expected = run(model, inputs)
    engine.swap(model)
    assert_same(run(model, inputs), expected)


def test_switch_with_dropout_between_the_layers():
    """In training another activation runs than in eval; with all dropped, the experts add nothing."""
    model = tiny_model(SwitchTransformersForConditionalGeneration)
    engine.swap(model)
    experts = next(m for m in model.modules() if type(m).__name__ == "TorchMoeSwitchTransformersExperts")
    hidden, one_hot = randn(5, 32), torch.nn.functional.one_hot(torch.tensor([0, 1, 2, 3, 0]), 4).unsqueeze(1)
    for expert in experts.values():
        expert.dropout.p = 1.0
    weights = torch.ones(5, 1)
    assert experts.eval()(hidden, one_hot, weights).any()
    assert not experts.train()(hidden, one_hot, weights).any()


@pytest.mark.parametrize("token_dropout", [0.0, 0.2])
def test_nllb_computes_its_formula(token_dropout):
    """Not what transformers 5.18 does, which runs experts 0 and 1 only."""
    config = NllbMoeConfig(
        d_model=32, encoder_ffn_dim=24, num_experts=6, expert_capacity=64, moe_token_dropout=token_dropout
    )
    module = NllbMoeSparseMLP(config, 24).eval()
    randomise(module)
    hidden = randn(2, 9, 32)
    stock = module(hidden)
    _, probabilities, _ = module.router(hidden.view(-1, 32), None)
    tokens = hidden.view(-1, 32)
    formula = sum(probabilities[:, [e]] * module.experts[f"expert_{e}"](tokens) for e in range(6))
    formula = (1 - token_dropout) * formula.view_as(hidden)
    assert len(probabilities.argmax(dim=1).unique()) > 2

    assert engine.swap(module) == [""]
    assert_same({"output": module(hidden)}, {"output": formula})
    assert (stock - formula).abs().max() > 0.1 * formula.abs().max()


def test_nllb_training_drops_whole_values_of_tokens():
    config = NllbMoeConfig(d_model=32, encoder_ffn_dim=24, num_experts=6, expert_capacity=64, moe_token_dropout=1.0)
    module = NllbMoeSparseMLP(config, 24).train()
    randomise(module)
    engine.swap(module)
    hidden = randn(2, 9, 32).requires_grad_()
    output = module(hidden)
    assert not output.any()
    output.sum().backward()


def test_nllb_model_runs():
    model = tiny_model(NllbMoeForConditionalGeneration)
    engine.swap(model)
    results = run(model, inputs_of(model))
    assert all(value.isfinite().all() for value in results.values())
