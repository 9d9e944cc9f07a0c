"""attach_balancer on routers without a selection bias: stock at zero, weighed by the family's rule, and undone."""

import copy

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed (pip install 'torch-moe[transformers]')")

from test_transformers_balancer import WITH_TABLE
from transformers import (
    AXK2ForCausalLM,
    DeepseekV3ForCausalLM,
    GptOssForCausalLM,
    GraniteMoeForCausalLM,
    MixtralForCausalLM,
    OlmoeForCausalLM,
)
from transformers import Qwen3MoeForCausalLM as Qwen3Moe
from transformers_models import find_decorated, model_class, tiny_inputs, tiny_model, token_ids

from torch_moe.integrations import transformers as engine
from torch_moe.integrations.transformers.layers import OWN_BIAS, find_layers
from torch_moe.integrations.transformers.router import find_rule
from torch_moe.testing import assert_close

FIVE = (MixtralForCausalLM, Qwen3Moe, OlmoeForCausalLM, GptOssForCausalLM, GraniteMoeForCausalLM)
EIGHT = {"num_experts": 8, "num_local_experts": 8}


pytestmark = pytest.mark.usefixtures("enabled_engine")


def tiny(cls):
    return tiny_model(cls, **EIGHT)


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def run(model, **inputs):
    """Return the output, after a backward from all of it."""
    model.zero_grad()
    output = model(**tiny_inputs(model, **inputs))[0]
    output.float().square().mean().backward()
    return output.detach()


# A rule of each kind is also tried where scores are rounded to ties: softmax in bf16, after the choice, of groups, ..
IN_16_BITS = ("mixtral", "olmoe", "gpt_oss", "granitemoe", "mistral4", "gemma4", "deepseek_v2")
CASES = [(torch.float32, *case) for case in find_decorated()]
CASES += [(torch.bfloat16, *case) for case in find_decorated() if case[0] in IN_16_BITS]


@pytest.mark.parametrize(("dtype", "family", "name"), CASES)
def test_zero_bias_is_the_stock_model_bit_for_bit(dtype, family, name):
    model = tiny_model(model_class(family, name), dtype)
    unbiased = [layer for layer in find_layers(model) if layer.bias is None]
    if not unbiased or family == WITH_TABLE:
        return  # nothing is added to it
    expected, expected_gradients = run(model, num_tokens=40), copy.deepcopy(gradients(model))
    balancer = engine.attach_balancer(model)
    assert len(balancer.layers) == len(unbiased)
    assert all(layer.bias.eq(0).all() for layer in balancer.layers)
    assert torch.equal(run(model, num_tokens=40), expected)
    for key, actual in gradients(model).items():
        assert torch.equal(actual, expected_gradients[key]), key


@pytest.mark.parametrize(
    ("cls", "weigh"),
    [
        (MixtralForCausalLM, lambda p, z: p / p.sum(dim=-1, keepdim=True)),
        (Qwen3Moe, lambda p, z: p),
        (OlmoeForCausalLM, lambda p, z: p),
        (GptOssForCausalLM, lambda p, z: z.softmax(dim=-1)),
        (GraniteMoeForCausalLM, lambda p, z: z.softmax(dim=-1)),
    ],
)
def test_chosen_with_the_bias_and_weighed_without(cls, weigh):
    model = tiny(cls)
    layer = engine.attach_balancer(model).layers[0]
    router, bias = layer.watched, torch.randn(8, generator=torch.Generator().manual_seed(1)) / 10
    layer.bias.copy_(bias)
    weight = router.weight
    hidden_states = torch.randn(50, 32, generator=torch.Generator().manual_seed(2), requires_grad=True)
    output = router(hidden_states)
    actual, ids = output[1], next(part for part in output if not part.is_floating_point())
    wide, wide_weight = (tensor.detach().double().requires_grad_() for tensor in (hidden_states, weight))
    offset = getattr(router, "bias", None)
    logits = torch.nn.functional.linear(wide, wide_weight, offset if offset is None else offset.detach().double())
    expected_ids = (logits.softmax(dim=-1) + bias).topk(2, dim=-1).indices.sort(dim=-1).values
    changed = (logits.topk(2, dim=-1).indices.sort(dim=-1).values != expected_ids).any(dim=-1)
    assert 10 < changed.sum() < 45
    assert torch.equal(ids.sort(dim=-1).values, expected_ids)
    expected = weigh(logits.softmax(dim=-1).gather(1, ids), logits.gather(1, ids))
    assert_close(actual, expected, 32, 8, 2)
    coefficients = torch.randn(50, 2, generator=torch.Generator().manual_seed(3))
    actual_gradients = torch.autograd.grad((actual * coefficients).sum(), [hidden_states, weight])
    expected_gradients = torch.autograd.grad((expected * coefficients).sum(), [wide, wide_weight])
    for mine, theirs in zip(actual_gradients, expected_gradients, strict=True):
        assert_close(mine, theirs, 32, 8, 2, 8, 50)


@pytest.mark.parametrize(
    ("cls", "method", "rate"), [*((cls, "proportional", 0.008) for cls in FIVE), (GptOssForCausalLM, "quantile", 0.5)]
)
def test_a_skewed_router_evens_out(cls, method, rate):
    model = tiny(cls).train()
    for layer in find_layers(model):
        with torch.no_grad():  # all tokens prefer the same experts
            common = torch.nn.functional.normalize(torch.ones(32), dim=0)
            layer.watched.weight += torch.linspace(0.3, -0.3, 8).unsqueeze(1) * common
    for module in model.modules():
        if hasattr(module, "experts"):
            module.register_forward_pre_hook(lambda m, args: (args[0] + 1.0, *args[1:]))
    balancer = engine.attach_balancer(model, method=method, rate=rate)
    max_vio = []
    for step in range(60):
        balancer.stats.reset()
        with torch.no_grad():
            model(token_ids(8, 32, seed=step))
        max_vio.append(balancer.stats.metrics()["max_vio"].mean().item())
        balancer.step()
    assert max_vio[0] > 1
    assert sum(max_vio[-5:]) / 5 < 0.3 * max_vio[0]


@pytest.mark.parametrize("cls", FIVE)
def test_undone(cls):
    model = tiny(cls)
    keys, hooks = list(model.state_dict()), [len(module._forward_hooks) for module in model.modules()]
    expected = run(model)
    balancer = engine.attach_balancer(model)
    assert list(model.state_dict()) == keys
    balancer.layers[0].bias.copy_(torch.linspace(-1, 1, 8))
    assert not torch.equal(run(model), expected)
    with pytest.raises(ValueError, match="has a balancer already"):
        engine.attach_balancer(model)
    balancer.detach()
    assert torch.equal(run(model), expected)
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert not any(OWN_BIAS in name for name, _ in model.named_buffers())
    engine.attach_balancer(model).detach()


def test_saved_and_loaded_beside_the_model(tmp_path):
    model = tiny(MixtralForCausalLM).train()
    balancer = engine.attach_balancer(model, rate=0.05)
    for step in range(3):
        model(token_ids(4, 16, seed=step))
        balancer.step()
    model(token_ids(4, 16, seed=4))  # in the middle of a step
    model.save_pretrained(tmp_path)
    torch.save(balancer.state_dict(), tmp_path / "balancer.pt")
    again = MixtralForCausalLM.from_pretrained(tmp_path).train()
    plain = again(token_ids(2, 9)).logits
    other = engine.attach_balancer(again, rate=0.05)
    other.load_state_dict(torch.load(tmp_path / "balancer.pt"))
    assert torch.equal(again(token_ids(2, 9)).logits, model(token_ids(2, 9)).logits)
    assert not torch.equal(plain, again(token_ids(2, 9)).logits)
    model(token_ids(2, 9))
    balancer.step()
    other.step()
    assert torch.equal(balancer.state_dict()["biases"], other.state_dict()["biases"])
    with pytest.raises(ValueError, match=r"biases of shape \[2, 8\], got \[1, 8\]"):
        other.load_state_dict({**balancer.state_dict(), "biases": torch.zeros(1, 8)})


def test_recomputation_autocast_and_recorded_outputs():
    model = tiny(Qwen3Moe).train()
    balancer = engine.attach_balancer(model)
    for layer in balancer.layers:
        layer.bias.copy_(torch.linspace(-0.3, 0.3, 8))
    expected, expected_gradients = run(model), copy.deepcopy(gradients(model))
    balancer.stats.reset()
    model.gradient_checkpointing_enable()
    assert torch.equal(run(model), expected)
    for key, actual in gradients(model).items():
        assert torch.equal(actual, expected_gradients[key]), key
    assert balancer.stats.tokens_per_expert(0).sum() == 2 * 7 * 2
    with torch.autocast("cpu", torch.bfloat16):
        output = model(token_ids(2, 7), labels=token_ids(2, 7), output_router_logits=True)
    output.loss.backward()
    assert [tuple(logits.shape) for logits in output.router_logits] == [(14, 8)] * 2
    torch.testing.assert_close(output.logits.float(), expected, atol=0.1, rtol=0.1)


def test_compiles_whole():
    model = tiny(GptOssForCausalLM)
    model.set_experts_implementation("torch_moe")
    balancer = engine.attach_balancer(model)
    for layer in balancer.layers:
        layer.bias.copy_(torch.linspace(-0.3, 0.3, 8))
    with torch.no_grad():
        expected = model(token_ids(2, 7)).logits
        counts = balancer.stats.tokens_per_expert(1)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for number in (2, 3):
            assert_close(compiled(token_ids(2, 7)).logits, expected.double(), *[32] * 20)
            assert torch.equal(balancer.stats.tokens_per_expert(1), number * counts)


def test_moves_with_the_model_and_is_copied_with_it():
    model = tiny(MixtralForCausalLM).train()
    balancer = engine.attach_balancer(model, rate=1e-3, center=False)
    balancer.layers[0].bias.fill_(1.0)
    model.to(torch.bfloat16)
    for _ in range(40):  # each less than half a rounding of 1 in bf16
        with torch.no_grad():
            model(token_ids(1, 5))
        balancer.step()
    assert (balancer.layers[0].bias.float() - 1).abs().max() > 0.02
    twin = copy.deepcopy(model)
    assert torch.equal(twin(token_ids(2, 5)).logits, model(token_ids(2, 5)).logits)
    balancer.layers[0].bias.copy_(torch.linspace(-1, 1, 8))
    assert not torch.equal(twin(token_ids(2, 5)).logits, model(token_ids(2, 5)).logits)


class Strange(torch.nn.Module):
    """A router whose weights follow from its logits as ``weigh`` says."""

    def __init__(self, weigh, in_training=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(8, 32))
        self.weigh, self.in_training = weigh, in_training

    def forward(self, hidden_states):
        logits = hidden_states @ self.weight.T
        weigh = self.in_training if self.training and self.in_training else self.weigh
        values, ids = weigh(logits).topk(3, dim=-1)
        return logits, values, ids


def test_masks_of_groups_are_told_apart():
    for cls, mask in ((DeepseekV3ForCausalLM, "-inf"), (AXK2ForCausalLM, "zero")):
        options = next(find_layers(tiny_model(cls))).rule.options
        assert options["num_groups"] == 2
        assert options.get("group_mask", "-inf") == mask


def test_what_has_no_rule_is_refused_with_the_reason():
    linear, before = torch.nn.Linear(32, 8), torch.random.get_rng_state()
    rule = find_rule(Strange(lambda z: 0.75 * z.sigmoid()), 8, None)
    assert rule.options == {"score_function": "sigmoid", "renormalize": False, "routed_scaling_factor": 0.75}
    assert "no rule" in find_rule(Strange(lambda z: z.sigmoid() ** 1.001), 8, None)
    assert "no rule" in find_rule(Strange(lambda z: (z + z.roll(1, 0) / 1000).softmax(dim=-1)), 8, None)
    drop = torch.nn.functional.dropout
    assert "in training" in find_rule(Strange(torch.sigmoid, lambda z: drop(z.sigmoid(), 0.2)), 8, None)
    assert "does not return" in find_rule(linear, 8, None)
    assert torch.equal(before, torch.random.get_rng_state())
    several = torch.nn.Bilinear(32, 32, 8)
    assert "ValueError: it needs input1, input2" in find_rule(several, 8, None)
    hidden = Strange(torch.sigmoid).to("meta")
    assert "NotImplementedError" in find_rule(hidden, 8, None)
