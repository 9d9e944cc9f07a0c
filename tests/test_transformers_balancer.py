"""attach_balancer and attach_stats: counts, the bias that moves, and a collapsed model that evens out."""

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed (pip install 'torch-moe[transformers]')")

from test_transformers_swap import CLASSES, inputs_of
from transformers import (
    DeepseekV3ForCausalLM,
    InklingForCausalLM,
    LongcatFlashForCausalLM,
    MixtralForCausalLM,
    PhimoeForCausalLM,
    ZayaForCausalLM,
)
from transformers_models import find_decorated, model_class, tiny_inputs, tiny_model, token_ids

from torch_moe.integrations import transformers as engine
from torch_moe.integrations.transformers.layers import find_layers
from torch_moe.integrations.transformers.router import BIAS_NAMES, Rule

pytestmark = pytest.mark.usefixtures("enabled_engine")


def biases_of(model):
    tensors = (*model.named_buffers(), *model.named_parameters())
    return {name: tensor for name, tensor in tensors if name.rpartition(".")[2] in BIAS_NAMES}


# The family with a layer whose router cannot be given a bias, because it looks experts up in a table.
WITH_TABLE = "deepseek_v4"
# Those whose choice no options of ops.route give; the choice of the last is drawn.
OWN_DESIGN = ("inkling", "zaya", "phimoe")


@pytest.mark.parametrize(("family", "name"), find_decorated())
def test_every_family_is_counted_and_its_biases_move(family, name):
    model = tiny_model(model_class(family, name)).train()
    experts = [module for module in model.modules() if type(module).__name__ == name]
    layers = list(find_layers(model))
    ruled = [isinstance(layer.rule, Rule) for layer in layers]
    assert len(layers) == len(experts)
    assert all(ruled) == (family not in (WITH_TABLE, *OWN_DESIGN))
    stats = engine.attach_stats(model)
    calls = []
    for module in experts:
        module.register_forward_pre_hook(lambda m, args: calls.append(args[1].numel()))
    biases = biases_of(model)
    balancer = engine.attach_balancer(model, rate=0.5)
    biases = biases or {layer.name: layer.bias for layer in balancer.layers}
    assert len(biases) == sum(rule or family in OWN_DESIGN for rule in ruled)
    assert {layer.bias.data_ptr() for layer in balancer.layers} == {bias.data_ptr() for bias in biases.values()}
    with torch.no_grad():
        for bias in biases.values():
            bias.view(-1)[0] = 5.0  # every token wants expert 0
        model(**tiny_inputs(model))
    counted = torch.stack([stats.tokens_per_expert(layer) for layer in range(len(experts))])
    assert counted.sum() == sum(calls)
    entropies = stats.metrics()["entropy"].isfinite()
    assert entropies.tolist() == [rule or family in ("zaya", "phimoe") for rule in ruled]
    top_k = counted.sum(dim=1) // (14 if family != "ernie4_5_vl_moe" else counted[:, 0])
    steered = [number for number, layer in enumerate(layers) if layer.bias is not None]
    assert all(counted[number, 0] == counted[number].sum() // top_k[number] for number in steered)
    before = {key: bias.clone() for key, bias in biases.items()}
    balancer.step()
    assert all((bias != before[key]).any() for key, bias in biases.items())


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("swapped", [False, True])
def test_undecorated_families_are_counted(cls, swapped):
    model = tiny_model(cls)
    if swapped:
        engine.swap(model)
    stats = engine.attach_stats(model)
    with torch.no_grad():
        model(**inputs_of(model))
    layers = list(find_layers(model))
    assert len(layers) >= 2
    assert all(stats.tokens_per_expert(number).sum() > 0 for number in range(len(layers)))
    balancer = engine.attach_balancer(model)
    assert len(balancer.layers) == len(layers)
    balancer.detach()


def test_moves_by_the_rule():
    model = tiny_model(DeepseekV3ForCausalLM).train()
    balancer = engine.attach_balancer(model, rate=0.25, center=False)
    (bias,) = biases_of(model).values()
    bias.zero_()
    seen = []
    (layer,) = balancer.layers
    experts = model.get_submodule(layer.name)
    experts.register_forward_pre_hook(lambda m, args: seen.append(args[1].flatten().bincount(minlength=4)))
    for length in (7, 5):  # two micro-batches of one step
        model(token_ids(2, length))
    balancer.step()
    counts = torch.stack(seen).sum(dim=0)
    assert torch.equal(bias, 0.25 * (counts.float().mean() - counts).sign())
    model.eval()
    model(token_ids(2, 9))  # evaluation is not counted
    before = bias.clone()
    balancer.step()
    assert torch.equal(bias, before)
    balancer.detach()
    model.train()(token_ids(2, 9))
    balancer.step()
    assert torch.equal(bias, before)


def test_recomputed_activations_are_counted_once():
    model = tiny_model(DeepseekV3ForCausalLM).train()
    balancer = engine.attach_balancer(model)
    model.gradient_checkpointing_enable()
    model(token_ids(2, 7), labels=token_ids(2, 7)).loss.backward()
    assert balancer.balancer.state_dict()["tokens_per_expert"].sum() == 2 * 7 * 2
    assert balancer.stats.tokens_per_expert(0).sum() == 2 * 7 * 2


def test_a_bias_in_16_bits_does_not_lose_small_steps():
    model = tiny_model(DeepseekV3ForCausalLM).to(torch.bfloat16).train()
    (bias,) = biases_of(model).values()
    bias.fill_(1.0)
    balancer = engine.attach_balancer(model, rate=1e-3, center=False)
    for _ in range(40):  # each less than half a rounding of 1 in bf16
        with torch.no_grad():
            model(token_ids(1, 5))
        balancer.step()
    assert (bias.float() - 1).abs().max() > 0.02
    bias.fill_(0.5)  # a checkpoint is loaded
    balancer.step()
    assert torch.equal(bias, torch.full_like(bias, 0.5))


def test_a_collapsed_model_evens_out():
    """Four layers trained on one domain from routers that send nearly every token to the same experts."""
    model = tiny_model(DeepseekV3ForCausalLM, num_hidden_layers=5).train()
    model.set_experts_implementation("torch_moe")
    for bias in biases_of(model).values():
        bias.copy_(torch.tensor([0.6, 0.3, 0.0, -0.3]))
    balancer = engine.attach_balancer(model, method="sign", rate=0.05)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    max_vio = []
    for step in range(60):
        ids = token_ids(4, 16, seed=step % 4) % 20 + 3  # one domain: few different tokens
        balancer.stats.reset()
        model(ids, labels=ids).loss.backward()
        max_vio.append(balancer.stats.metrics()["max_vio"].mean().item())
        optimizer.step()
        optimizer.zero_grad()
        balancer.step()
    assert len(balancer.layers) == 4
    assert sum(max_vio[-10:]) < 0.5 * sum(max_vio[:3]) / 3 * 10


def test_longcat_s_bias_covers_its_identity_experts():
    model = tiny_model(LongcatFlashForCausalLM).train()
    balancer = engine.attach_balancer(model)
    assert {layer.num_experts for layer in balancer.layers} == {6}
    with torch.no_grad():
        model(token_ids(2, 9))
    assert balancer.stats.tokens_per_expert(0).sum() == 2 * 9 * model.config.num_experts_per_tok


def test_zaya_s_bias_covers_the_class_without_an_expert():
    model = tiny_model(ZayaForCausalLM).train()
    balancer = engine.attach_balancer(model, rate=0.25, center=False)
    before = [layer.bias.clone() for layer in balancer.layers]
    for layer in balancer.layers:
        layer.bias[-1] = 5.0  # every token skips the experts
    with torch.no_grad():
        model(token_ids(2, 9))
    assert balancer.stats.tokens_per_expert(1).tolist() == [0, 0, 0, 0, 18]
    balancer.step()
    steps = torch.tensor([0.25, 0.25, 0.25, 0.25, 5.75])
    assert all(torch.equal(layer.bias, old + steps) for layer, old in zip(balancer.layers, before, strict=True))


def test_bad_calls():
    model = tiny_model(MixtralForCausalLM)
    for module in model.modules():
        if hasattr(module, "gate"):
            module.gate = torch.nn.Linear(32, 4)  # somebody's router that gives logits only
    with pytest.raises(ValueError, match=r"MixtralForCausalLM has no selection bias, .*does not return.*attach_stats"):
        engine.attach_balancer(model)
    with pytest.raises(ValueError, match="draws its choice"):
        engine.attach_balancer(tiny_model(PhimoeForCausalLM), method="quantile")
    with pytest.raises(ValueError, match="without groups"):
        engine.attach_balancer(tiny_model(DeepseekV3ForCausalLM), method="quantile")
    with pytest.raises(ValueError, match="needs logits"):
        engine.attach_balancer(tiny_model(InklingForCausalLM), method="quantile")
    larger = tiny_model(MixtralForCausalLM, num_experts=6, num_local_experts=6)
    with pytest.raises(ValueError, match=r"all layers must have as many experts, got \[4, 6\]"):
        engine.attach_balancer(torch.nn.ModuleList([tiny_model(MixtralForCausalLM), larger]))
    with pytest.raises(ValueError, match="no MoE layer"):
        engine.attach_stats(torch.nn.Linear(2, 2))
