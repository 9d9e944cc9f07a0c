"""attach_balancer on routers that return no logits, weights and ids: each family by a formula of its own."""

import copy
import pickle

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed (pip install 'torch-moe[transformers]')")

from helpers import randn
from test_transformers_swap import inputs_of
from transformers import (
    DbrxForCausalLM,
    JambaForCausalLM,
    JetMoeForCausalLM,
    Llama4ForCausalLM,
    NllbMoeForConditionalGeneration,
    PhimoeForCausalLM,
    SwitchTransformersForConditionalGeneration,
)
from transformers_models import SPECIAL, tiny_model

from torch_moe.integrations import transformers as engine
from torch_moe.integrations.transformers.families import FAMILIES, OWN_BIAS, family_of
from torch_moe.integrations.transformers.layers import find_layers
from torch_moe.testing import assert_close

E = 8
DBRX = SPECIAL["dbrx"]["ffn_config"] | {"moe_num_experts": E, "moe_jitter_eps": 0.1}
EIGHT = {"num_experts": E, "num_local_experts": E}
NLLB = EIGHT | {"expert_capacity": 1000, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0}
# Every family, and those of its settings that change what is chosen.
CASES = {
    "jamba": (JambaForCausalLM, EIGHT),
    "dbrx": (DbrxForCausalLM, {"ffn_config": DBRX | {"moe_normalize_expert_weights": 1.0}}),
    "dbrx norm 2": (DbrxForCausalLM, {"ffn_config": DBRX | {"moe_normalize_expert_weights": 2.0}}),
    "dbrx no norm": (DbrxForCausalLM, {"ffn_config": DBRX | {"moe_normalize_expert_weights": None}}),
    "llama4": (Llama4ForCausalLM, EIGHT),
    "llama4 top-2": (Llama4ForCausalLM, EIGHT | {"num_experts_per_tok": 2}),
    "jetmoe": (JetMoeForCausalLM, EIGHT),
    "switch": (SwitchTransformersForConditionalGeneration, EIGHT | {"router_jitter_noise": 0.1}),
    "switch capacity": (SwitchTransformersForConditionalGeneration, EIGHT | {"expert_capacity": 3}),
    "phimoe": (PhimoeForCausalLM, EIGHT | {"router_jitter_noise": 0.3, "input_jitter_noise": 0.1}),
    "nllb": (NllbMoeForConditionalGeneration, NLLB),
    "nllb capacity": (NllbMoeForConditionalGeneration, NLLB | {"expert_capacity": 3}),
    "nllb no capacity": (NllbMoeForConditionalGeneration, NLLB | {"moe_eval_capacity_token_fraction": 0.0}),
    "nllb random": (NllbMoeForConditionalGeneration, NLLB | {"second_expert_policy": "random"}),
    "nllb sampling": (NllbMoeForConditionalGeneration, NLLB | {"second_expert_policy": "sampling"}),
    "nllb best first": (
        NllbMoeForConditionalGeneration,
        NLLB | {"expert_capacity": 3, "batch_prioritized_routing": True},
    ),
    "nllb norm before": (
        NllbMoeForConditionalGeneration,
        NLLB | {"expert_capacity": 3, "normalize_router_prob_before_dropping": True},
    ),
    "nllb random norm before": (
        NllbMoeForConditionalGeneration,
        NLLB | {"second_expert_policy": "random", "normalize_router_prob_before_dropping": True},
    ),
}


pytestmark = pytest.mark.usefixtures("enabled_engine")


def tiny(case, dtype=torch.float32, swapped=False):
    cls, options = CASES[case]
    model = tiny_model(cls, dtype, **options)
    if case == "nllb no capacity":  # which the config cannot say
        for layer in find_layers(model):
            layer.watched.expert_capacity = None
    if swapped:
        engine.swap(model)
    return model


def run(model, inputs):
    """Return the output and all gradients, random numbers from one seed."""
    torch.manual_seed(0)
    model.zero_grad()
    output = model(**inputs)[0]
    output.float().square().mean().backward()
    return {"output": output.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


def same_bits(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def test_every_family_of_the_table_is_tried():
    tried = {type(module).__name__ for case in CASES for module in tiny(case).modules() if family_of(module)}
    assert set(FAMILIES) - tried == {"ZayaSparseMoeBlock"}  # which has a bias of its own


FP32, BF16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize(
    ("dtype", "training", "swapped"),
    [(FP32, False, False), (FP32, True, True), (BF16, True, False)],
    ids=["fp32-eval-stock", "fp32-train-swapped", "bf16-train-stock"],
)
@pytest.mark.parametrize("case", CASES)
def test_zero_bias_is_the_stock_model_bit_for_bit(case, dtype, training, swapped):
    model = tiny(case, dtype, swapped).train(training)
    inputs = inputs_of(model)
    expected = run(copy.deepcopy(model), inputs)
    balancer = engine.attach_balancer(model)
    assert balancer.layers
    assert all(layer.bias.eq(0).all() and layer.bias.numel() == E for layer in balancer.layers)
    same_bits(run(model, inputs), expected)


def weights_of(case, layer, hidden_states):
    """Return what each token weighs each expert (num_tokens, num_experts), from what the experts are given."""
    output = layer.watched(hidden_states)
    family, block = case.split()[0], layer.block
    if family in ("jamba", "dbrx"):
        chosen = block.route_tokens_to_experts(*((hidden_states, output) if family == "jamba" else (output,)))
        ids, weights = chosen if family == "jamba" else chosen[::-1]
    elif family == "llama4":
        return output[0]
    elif family == "jetmoe":
        _, tokens, weights, counts, _ = output
        experts = torch.tensor([expert for expert, count in enumerate(counts) for _ in range(count)])
        return torch.zeros(hidden_states.shape[0], E).index_put((tokens, experts), weights)
    elif family == "switch":
        return output[0] * output[1]
    elif family == "nllb":
        return output[1]
    else:
        _, weights, ids = output
    return torch.zeros(hidden_states.shape[0], E).scatter(1, ids, weights)


def expected_weights(case, model, logits, bias):
    """Return the same by the family's formula, token by token, in fp64."""
    family, tokens = case.split()[0], []
    load = [0] * E
    limit = getattr(model.config, "expert_capacity", None) or 64
    for z in logits:
        p = z.softmax(dim=0)
        row = torch.zeros(E, dtype=torch.float64)
        if family == "phimoe":
            c, left = z + bias, set(range(E))
            for _ in range(2):
                best = max(left, key=lambda expert: c[expert])
                near = [i for i in sorted(left) if (c[best] - c[i]) / max(c[i].abs(), c[best]) <= 2 * 0.3]
                row = row.index_put((torch.tensor(best),), z[near].softmax(dim=0)[near.index(best)])
                left.remove(best)
            tokens.append(row)
            continue
        score = z.sigmoid() if family == "llama4" else p
        number = model.config.num_experts_per_tok if family in ("jamba", "llama4", "jetmoe") else 2
        number = 1 if family == "switch" else number
        ids = (score + bias).topk(number).indices
        weights = score[ids]
        if family == "jetmoe":
            weights = z[ids].softmax(dim=0)
        elif case == "dbrx norm 2":
            weights = weights / weights.square().sum().sqrt()
        elif case in ("dbrx", "nllb"):
            weights = weights / weights.sum()
        if case == "switch capacity":  # 3 per expert, the first tokens first
            load[ids] += 1
            weights = weights * (load[ids] <= limit)
        tokens.append(row.scatter(0, ids, weights))
    return torch.stack(tokens)


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("nllb ")])
def test_chosen_with_the_bias_and_weighed_without(case):
    model = tiny(case)
    layer = engine.attach_balancer(model).layers[0]
    router = layer.watched
    (weight,) = router.parameters()
    hidden_states = randn(40, 32, seed=2).requires_grad_()
    plain = weights_of(case, layer, hidden_states)
    layer.bias.copy_(randn(E, seed=1) / (4 if case in ("phimoe", "llama4 top-2", "llama4") else 10))
    actual = weights_of(case, layer, hidden_states)
    changed = ((actual != 0) != (plain != 0)).any(dim=1).sum()
    assert 5 < changed < 38
    wide, wide_weight = (tensor.detach().double().requires_grad_() for tensor in (hidden_states, weight))
    expected = expected_weights(case, model, wide @ wide_weight.T, layer.bias.double())
    assert torch.equal(actual != 0, expected != 0)
    assert_close(actual, expected, 32, E, 2)
    coefficients = randn(40, E, seed=3)
    actual_gradients = torch.autograd.grad((actual * coefficients).sum(), [hidden_states, weight])
    expected_gradients = torch.autograd.grad((expected * coefficients).sum(), [wide, wide_weight])
    for mine, theirs in zip(actual_gradients, expected_gradients, strict=True):
        assert_close(mine, theirs, 32, E, 2, 8, 40)


@pytest.mark.parametrize("swapped", [False, True], ids=["stock", "swapped"])
@pytest.mark.parametrize("case", CASES)
def test_the_experts_obey_and_are_counted(case, swapped):
    """A bias that rules out all experts but two leaves the others without a token, and without a gradient."""
    model = tiny(case, swapped=swapped)
    balancer = engine.attach_balancer(model)
    if "nllb" in case and not swapped:
        return  # transformers runs experts 0 and 1, whatever the router says
    for layer in balancer.layers:
        layer.bias.fill_(-50.0)[3:5] = 50.0
    results = run(model, inputs_of(model))
    for number, layer in enumerate(balancer.layers):
        counts = balancer.stats.tokens_per_expert(number)
        assert counts.sum() == counts[3:5].sum() > 0, layer.name
    experts = {n: g for n, g in results.items() if "experts" in n or "input_linear" in n or "output_linear" in n}
    assert experts
    for name, gradient in experts.items():
        if "expert_" in name:
            assert any(f"expert_{number}." in name for number in (3, 4)) or not gradient.any(), name
        elif "shared" not in name and "router" not in name and gradient.dim() > 1:
            each = gradient.view(E, -1)
            assert not each[[0, 1, 2, 5, 6, 7]].any(), name


@pytest.mark.parametrize("case", ["jamba", "dbrx", "llama4", "jetmoe", "switch", "phimoe", "nllb"])
def test_a_skewed_router_evens_out(case):
    model = tiny(case, swapped=case == "nllb").train()
    layers = list(find_layers(model))
    common = torch.ones(32) / 32**0.5
    for layer in layers:
        (weight,) = layer.watched.parameters()
        with torch.no_grad():  # all tokens prefer the same experts
            weight += torch.linspace(0.3, -0.3, E).unsqueeze(1) * common
        shift = 0.2 if case == "nllb" else 1.0  # its tokens differ less
        layer.watched.register_forward_pre_hook(lambda m, args, shift=shift: (args[0] + shift, *args[1:]))
    balancer = engine.attach_balancer(model, method="proportional", rate=0.1 if case == "phimoe" else 0.02)
    max_vio = []
    for step in range(60):
        torch.manual_seed(step)
        balancer.stats.reset()
        with torch.no_grad():
            model(**inputs_of(model, num_tokens=64, seed=step))
        max_vio.append(balancer.stats.metrics()["max_vio"].mean().item())
        balancer.step()
    assert max_vio[0] > 1
    assert sum(max_vio[-5:]) / 5 < 0.6 * max_vio[0]


@pytest.mark.parametrize("case", CASES)
def test_undone_copied_and_pickled(case):
    model = tiny(case)
    inputs = inputs_of(model)
    keys, hooks = list(model.state_dict()), [len(module._forward_hooks) for module in model.modules()]
    expected = run(model, inputs)
    names = [set(vars(module)) for module in model.modules()]  # after a run, in which routers note some
    balancer = engine.attach_balancer(model)
    assert list(model.state_dict()) == keys
    for layer in balancer.layers:
        layer.bias.copy_(torch.linspace(-1, 1, E))
    steered = run(model, inputs)
    assert not torch.equal(steered["output"], expected["output"])
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    with pytest.raises(ValueError, match="has a balancer already"):
        engine.attach_balancer(model)
    balancer.detach()
    same_bits(run(model, inputs), expected)
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert [set(vars(module)) for module in model.modules()] == names
    assert not any(OWN_BIAS in name for name, _ in model.named_buffers())
    for twin in twins:  # with a bias of its own
        same_bits(run(twin, inputs), steered)
    engine.attach_balancer(model).detach()


@pytest.mark.parametrize("case", ["dbrx", "llama4", "phimoe", "jamba"])
def test_a_block_compiles_whole(case):
    """Not JetMoE, Switch and NLLB, whose own code reads the experts' loads."""
    model = tiny(case, swapped=True)
    if case in ("phimoe", "jamba"):
        model.set_experts_implementation("torch_moe")
    engine.prepare(model)
    balancer = engine.attach_balancer(model)
    layer = balancer.layers[0]
    layer.bias.copy_(torch.linspace(-0.3, 0.3, E))
    hidden_states = randn(2, 7, 32)
    compiled = torch.compile(layer.block, fullgraph=True, backend="aot_eager")
    results = []
    for block in (layer.block, compiled):
        model.zero_grad()
        output = block(hidden_states)
        output = output[0] if isinstance(output, tuple) else output
        output.square().mean().backward()
        results.append(
            (output.detach(), balancer.stats.tokens_per_expert(0), next(layer.watched.parameters()).grad.clone())
        )
    assert_close(results[1][0], results[0][0].double(), 32, 24, 2)
    assert torch.equal(results[1][1], 2 * results[0][1])
    assert_close(results[1][2], results[0][2].double(), 32, 24, 2, 14)


def test_a_class_of_the_same_name_is_no_member():
    class DbrxFFN(torch.nn.Module):
        pass

    assert family_of(DbrxFFN()) is None
    assert all(family_of(module) is None for module in tiny("llama4").modules() if "Moe" not in type(module).__name__)
