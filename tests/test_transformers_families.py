"""Every decorated family of transformers: the logits and gradients of its own implementation.

The list is read from the installed sources, so that a family cannot be forgotten. In fp32 the whole model is compared.
In bf16 a rounding may turn a router's choice, after which two right results differ: there each experts module is held
to fp64 on the inputs it has in the model, and the logits are compared with the last experts alone on torch-moe.
"""

import copy

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed (pip install 'torch-moe[transformers]')")

from helpers import randn
from transformers_models import find_decorated, model_class, tiny_inputs, tiny_model

from torch_moe.integrations.transformers import gate
from torch_moe.testing import assert_close, tolerance

FAMILIES = find_decorated()
# Those with something of their own in the gate; all others are silu(g) u.
GATES = {
    "deepseek_v4": gate.Gate("swiglu", limit=10.0),
    "diffusion_gemma": gate.Gate("geglu_tanh"),
    "gemma4": gate.Gate("geglu_tanh"),
    "glm5_next": gate.Gate("swiglu", limit=10.0),
    "gpt_oss": gate.Gate("swiglu", "interleaved", 1.702, 7.0, 1.0),
    "hy_v4": gate.Gate("swiglu", limit=10.0),
    "minimax_m3_vl": gate.Gate("swiglu", "concat", 1.702, 7.0, 1.0),
    "nemotron_h": gate.Gate("relu2"),
    "openai_privacy_filter": gate.Gate("swiglu", "concat", 1.702, 7.0, 1.0),
}
# The bound for whole models in fp32, relative to the largest entry of a tensor.
FP32 = 1e-4


pytestmark = pytest.mark.usefixtures("enabled_engine")


def experts_modules(model, name):
    found = [module for module in model.modules() if type(module).__name__ == name]
    assert found
    return found


def run_model(model, inputs, implementation):
    model.set_experts_implementation(implementation)
    model.zero_grad()
    output = model(**inputs)[0]
    output.backward(randn(*output.shape, dtype=output.dtype, seed=5))
    return output.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_every_decorated_class_is_here():
    assert len(FAMILIES) >= 56
    assert {"mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", *GATES} <= {family for family, _ in FAMILIES}


@pytest.mark.parametrize(("family", "name"), FAMILIES)
def test_fp32_logits_and_gradients(family, name):
    model = tiny_model(model_class(family, name))
    inputs = tiny_inputs(model)
    expected, expected_grads = run_model(model, inputs, "eager")
    actual, actual_grads = run_model(model, inputs, "torch_moe")

    kept = {module.__dict__[gate.CACHE].gate for module in experts_modules(model, name)}  # each did run on torch-moe
    assert kept == {GATES.get(family, gate.Gate("swiglu"))}
    assert (actual - expected).abs().max() <= FP32 * expected.abs().max()
    assert actual_grads.keys() == expected_grads.keys()
    largest = max(grad.abs().max() for grad in expected_grads.values())
    for parameter, grad in expected_grads.items():
        scale = max(grad.abs().max(), FP32 * largest)  # below that a gradient is what cancellation left of larger ones
        assert (actual_grads[parameter] - grad).abs().max() <= FP32 * scale, parameter


@pytest.mark.parametrize(("family", "name"), FAMILIES)
def test_bf16(family, name):
    model = tiny_model(model_class(family, name), dtype=torch.bfloat16)
    model.set_experts_implementation("eager")
    inputs, modules, calls = tiny_inputs(model), experts_modules(model, name), []
    hooks = [m.register_forward_pre_hook(lambda m, args: calls.append((m, *args))) for m in modules]
    with torch.no_grad():
        expected = model(**inputs)[0]
    for hook in hooks:
        hook.remove()
    assert {id(module) for module, *_ in calls} == {id(module) for module in modules}
    for call in calls:
        check_experts(*call)

    last, _, ids, _ = calls[-1]
    last.config = copy.copy(last.config)
    last.config._experts_implementation = "torch_moe"
    with torch.no_grad():
        actual = model(**inputs)[0]
    # The two GEMMs and the sum; then residual, norm and head. Both sides round.
    allowed = 2 * tolerance(torch.bfloat16, *last.down_proj.shape[1:], ids.shape[1], 1, 1, last.down_proj.shape[1])
    assert (actual.double() - expected.double()).abs().max() <= allowed * expected.double().abs().max()


def check_experts(module, hidden, ids, weights):
    """Hold one experts module to its own implementation in fp64, on the inputs that it has in the model."""
    exact = copy.deepcopy(module).double()
    exact.config, ours = copy.copy(module.config), copy.copy(module)
    ours.config = copy.copy(module.config)
    ours.config._experts_implementation = "torch_moe"
    expected = run_module(exact, hidden.double(), ids, weights.double())
    actual = run_module(ours, hidden, ids, weights)
    sizes = (hidden.shape[1], module.down_proj.shape[1 if module.is_transposed else 2], ids.shape[1])
    for key, value in expected.items():
        # The gradient of a weight sums over tokens, that of a token over its experts; each step of the way back rounds.
        steps = sizes if key == "output" else (*sizes, *sizes, len(hidden))
        assert_close(actual[key], value, *steps, dtype=torch.bfloat16)


def run_module(module, hidden, ids, weights):
    module.zero_grad()
    hidden, weights = (tensor.detach().clone().requires_grad_() for tensor in (hidden, weights))
    output = module(hidden, ids, weights)
    output.backward(randn(*output.shape, dtype=torch.bfloat16, seed=7).to(output.dtype))
    grads = {name: p.grad for name, p in module.named_parameters()}
    return {"output": output.detach(), "hidden_states": hidden.grad, "top_k_weights": weights.grad, **grads}
