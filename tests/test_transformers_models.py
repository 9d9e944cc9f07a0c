"""What one does with a model: generate, save and load, train with padding, checkpointing and adapters, compile."""

import copy

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed (pip install 'torch-moe[transformers]')")

from transformers import DeepseekV3ForCausalLM, GptOssForCausalLM, Llama4ForCausalLM, MixtralForCausalLM
from transformers import Qwen3MoeForCausalLM as Qwen3Moe
from transformers_models import TINY, tiny_inputs, tiny_model, token_ids

from torch_moe.integrations import transformers as engine

DECORATED = [MixtralForCausalLM, Qwen3Moe, DeepseekV3ForCausalLM, GptOssForCausalLM]
BOUND = 1e-4  # of whole models in fp32, relative to the largest entry


pytestmark = pytest.mark.usefixtures("enabled_engine")


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()


def engine_model(cls, implementation="torch_moe", **options):
    """Return a tiny model on torch-moe: by the experts interface, or by a swap of classes where there is none."""
    model = tiny_model(cls, **options)
    if cls in DECORATED:
        model.set_experts_implementation(implementation)
    elif implementation == "torch_moe":
        assert engine.swap(model)
    return model


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=BOUND * expected.abs().max().item())


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def loss_and_gradients(model, **inputs):
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return {"loss": loss.detach(), **gradients(model)}


def assert_all_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert_same(actual[name], value)


@pytest.mark.parametrize("cls", [MixtralForCausalLM, Qwen3Moe])
def test_bf16_gradients(cls):
    """With every expert chosen no rounding can turn a choice, so that the whole model can be held to fp64."""
    model = engine_model(cls, dtype=torch.bfloat16, num_experts_per_tok=TINY["num_experts"])
    inputs = {"input_ids": token_ids(4, 16), "labels": token_ids(4, 16)}
    actual = loss_and_gradients(model, **inputs)
    model.set_experts_implementation("eager")
    stock, exact = loss_and_gradients(model, **inputs), loss_and_gradients(copy.deepcopy(model).double(), **inputs)
    assert actual.keys() == stock.keys() == exact.keys()
    for name, value in exact.items():
        error, stock_error = ((tensor.double() - value).norm() / value.norm() for tensor in (actual[name], stock[name]))
        assert error <= 1.1 * stock_error + torch.finfo(torch.bfloat16).eps, name


@pytest.mark.parametrize("cls", [*DECORATED, Llama4ForCausalLM])
def test_generate(cls):
    stock, ours = (engine_model(cls, i, use_cache=True) for i in ("eager", "torch_moe"))
    prompt = token_ids(2, 6)
    options = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    expected = stock.generate(prompt, pad_token_id=0, **options)
    actual = ours.generate(prompt, pad_token_id=0, **options)
    assert torch.equal(actual.sequences, expected.sequences)
    for mine, theirs in zip(actual.logits, expected.logits, strict=True):
        assert_same(mine, theirs)


@pytest.mark.parametrize("cls", [*DECORATED, Llama4ForCausalLM])
def test_save_and_load(cls, tmp_path):
    """What torch-moe computed is saved as any model, one file per form, and gives the same bits when it is back."""
    model = engine_model(cls)
    inputs = tiny_inputs(model)
    expected = model(**inputs).logits
    model.save_pretrained(tmp_path)
    options = {"experts_implementation": "torch_moe"} if cls in DECORATED else {}
    loaded = cls.from_pretrained(tmp_path, **options).eval()
    for (name, mine), theirs in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name
    if cls not in DECORATED:
        engine.swap(loaded)
    assert torch.equal(loaded(**inputs).logits, expected)


@pytest.mark.parametrize("cls", [*DECORATED, Llama4ForCausalLM])
def test_loss_with_labels_and_padding(cls):
    stock, ours = (engine_model(cls, i) for i in ("eager", "torch_moe"))
    ids = token_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    assert_all_same(loss_and_gradients(ours, **inputs), loss_and_gradients(stock, **inputs))


def test_router_logits_and_their_loss():
    stock, ours = (engine_model(MixtralForCausalLM, i) for i in ("eager", "torch_moe"))
    inputs = {**tiny_inputs(stock), "output_router_logits": True}
    expected, actual = stock(**inputs, labels=inputs["input_ids"]), ours(**inputs, labels=inputs["input_ids"])
    assert len(actual.router_logits) == TINY["num_hidden_layers"]
    for mine, theirs in zip(actual.router_logits, expected.router_logits, strict=True):
        assert_same(mine, theirs)
    assert_same(actual.aux_loss, expected.aux_loss)
    assert_same(actual.loss, expected.loss)


def test_gradient_checkpointing():
    model = engine_model(MixtralForCausalLM).train()
    inputs = {**tiny_inputs(model), "labels": token_ids(2, 7)}
    expected = loss_and_gradients(model, **inputs)
    model.gradient_checkpointing_enable()
    actual = loss_and_gradients(model, **inputs)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


def test_autocast():
    stock, ours = (engine_model(MixtralForCausalLM, i) for i in ("eager", "torch_moe"))
    inputs = tiny_inputs(stock)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, actual = stock(**inputs).logits, ours(**inputs).logits
    exact = copy.deepcopy(stock).double()(**inputs).logits
    assert actual.dtype == expected.dtype
    assert (actual.double() - exact).abs().max() <= 1.5 * (expected.double() - exact).abs().max()
    loss = ours(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in ours.parameters())


@pytest.mark.parametrize("where", ["attention", "experts"])
def test_peft(where):
    peft = pytest.importorskip("peft", reason="peft is not installed (pip install 'torch-moe[transformers]')")
    model = engine_model(MixtralForCausalLM)
    inputs = {**tiny_inputs(model), "labels": token_ids(2, 7)}
    torch.manual_seed(0)
    if where == "attention":
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    else:
        parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        config = peft.LoraConfig(r=4, target_modules=[], target_parameters=parameters, init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    results = {}
    for implementation in ("eager", "torch_moe"):
        model.set_experts_implementation(implementation)
        results[implementation] = loss_and_gradients(adapted, **inputs)
    assert sum("lora" in name for name in results["eager"]) >= 4
    assert_all_same(results["torch_moe"], results["eager"])


COMPILED = [
    MixtralForCausalLM,
    *(pytest.param(cls, marks=pytest.mark.slow) for cls in (Qwen3Moe, DeepseekV3ForCausalLM, GptOssForCausalLM)),
    pytest.param(Llama4ForCausalLM, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("cls", COMPILED)
def test_compile(cls):
    model = engine.prepare(engine_model(cls))
    inputs = tiny_inputs(model)
    expected = model(**inputs).logits
    expected.square().sum().backward()
    expected_grads = gradients(model)
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    actual = compiled(**inputs).logits
    actual.square().sum().backward()
    assert_same(actual, expected)
    assert_all_same(gradients(model), expected_grads)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised by inductor about torch.jit
def test_inductor():
    """The default backend, which also generates code, once for a model."""
    model = engine.prepare(engine_model(MixtralForCausalLM, num_hidden_layers=1))
    inputs = {**tiny_inputs(model), "labels": token_ids(2, 7)}
    expected = loss_and_gradients(model, **inputs)
    model.zero_grad()
    loss = torch.compile(model, fullgraph=True)(**inputs).loss
    loss.backward()
    assert_all_same({"loss": loss.detach(), **gradients(model)}, expected)
