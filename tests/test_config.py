"""The configs: what they refuse, in words that name the fields and the fix, and that modules are built from them."""

import dataclasses
import math

import pytest
import torch
from helpers import randn

from torch_moe import Experts, ExpertsConfig, MoE, MoEConfig, RouterConfig, SharedExpertsConfig, TopKRouter
from torch_moe.nn import DenseFFN

ROUTER = {"hidden_size": 16, "num_experts": 8, "top_k": 2}
EXPERTS = {"hidden_size": 16, "intermediate_size": 12, "num_experts": 8}


# Routers that are right as they are, and not with one option more.
SINKS = {"num_shared_sinks": 1, "score_function": "sigmoid"}
LATE = {"renormalize_before_drop": False, "capacity": 3}
MIXER = {"selection": "sparsemixer", "renormalize": False}
CHOICE = {"selection": "expert_choice", "causal": False, "renormalize": False}


@pytest.mark.parametrize("options", [SINKS, LATE, MIXER, CHOICE], ids=["sinks", "late", "mixer", "choice"])
def test_accepted_routers(options):
    assert RouterConfig(**ROUTER | options).is_default("force_balanced")


@pytest.mark.parametrize(
    ("config", "sizes"), [(RouterConfig, ROUTER), (SharedExpertsConfig, {"hidden_size": 16, "intermediate_size": 12})]
)
def test_words_are_among_those_of_the_field(config, sizes):
    words = [field.name for field in dataclasses.fields(config) if str(field.type).startswith("Literal")]
    assert len(words) > 3
    for name in words:
        with pytest.raises(ValueError, match=rf"^{config.__name__}: {name} must be in \('.*'\), got 'nonsense'$"):
            config(**sizes, **{name: "nonsense"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_zero_experts": -1}, "num_zero_experts must not be negative, got -1"),
        ({"top_k": 10, "num_zero_experts": 1}, r"top_k must be in \[1, num_experts \+ num_zero_experts = 9\], got 10"),
        ({"input_jitter": 1.0}, r"input_jitter must be in \[0, 1\), got 1.0"),
        ({"hidden_size": 0}, "hidden_size must be at least 1, got 0"),
        ({"num_experts": 0}, "num_experts must be at least 1, got 0"),
        ({"selection": "sinkhorn", "sinkhorn_iterations": 0}, "sinkhorn_iterations must be at least 1, got 0"),
        ({"logit_softcap": 0.0}, "logit_softcap must be positive and finite, or None, got 0.0"),
        ({"num_groups": 4, "topk_groups": 1, "top_k": 3}, r"topk_groups = 1 .*raise topk_groups or lower num_groups"),
        ({"num_groups": 2, "num_zero_experts": 2}, "num_zero_experts=2 belong to no group: set num_groups=1"),
        ({"group_score": "max"}, "group_score='max' does nothing without num_groups"),
        ({"group_mask": "zero"}, "group_mask='zero' does nothing without num_groups"),
        ({"vocab_size": 9}, 'vocab_size=9 does nothing without selection="hash"'),
        ({"selection": "hash"}, 'selection="hash" needs vocab_size >= 1, got None'),
        ({"selection": "hash", "vocab_size": 9, "expert_bias": True}, "expert_bias does nothing with selection"),
        ({"selection": "sinkhorn", "num_groups": 2}, "num_groups does nothing with selection"),
        ({"sinkhorn_iterations": 3}, 'sinkhorn_iterations=3 does nothing without selection="sinkhorn"'),
        ({"selection": "top2_gshard", "top_k": 3}, 'selection="top2_gshard" needs top_k=2, got 3'),
        ({"second_expert_policy": "random"}, "second_expert_policy='random' does nothing without selection"),
        ({"selection": "expert_choice", "renormalize": False}, "leaks the future in a causal model.*causal=False"),
        ({"selection": "expert_choice", "causal": False}, "needs renormalize=False"),
        (
            {"selection": "expert_choice", "causal": False, "renormalize": False, "capacity": 3},
            "capacity=3 contradicts selection",
        ),
        ({"selection": "sinkhorn", "num_zero_experts": 1}, "num_zero_experts=1 needs selection"),
        ({"zero_expert": "zero"}, "zero_expert='zero' does nothing without num_zero_experts"),
        ({"top_k": 1}, "top_k=1 needs renormalize=False .*gets no gradient"),
        ({"renormalize": False, "renormalize_p": 2.0}, "renormalize_p=2.0 does nothing without renormalize"),
        ({"renormalize_p": 0.5}, "renormalize_p must be at least 1 and finite, got 0.5"),
        ({"renormalize_eps": -1.0}, "renormalize_eps must be finite and not negative, got -1.0"),
        ({"routed_scaling_factor": 0.0}, "routed_scaling_factor must be positive and finite, got 0.0"),
        ({"capacity": 0}, "capacity must be at least 1, got 0"),
        ({"capacity": 4, "capacity_factor": 1.0}, "give capacity=4 or capacity_factor=1.0, not both"),
        ({"drop_policy": "probability"}, r"drop_policy='probability' does nothing without .*\(None is dropless\)"),
        ({"capacity_scope": "sequence"}, r"capacity_scope='sequence' does nothing without .*\(None is dropless\)"),
        ({"eval_capacity_factor": 2.0}, "eval_capacity_factor=2.0 does nothing without capacity_factor"),
        ({"projection_size": 4}, "projection_size=4 does nothing without projection"),
        ({"projection_state": True}, "projection_state=True does nothing without projection"),
        ({"projection": "mlp"}, 'projection="mlp" needs projection_size >= 1, got None'),
        ({"projection": "mlp", "projection_size": 4, "noisy": True}, 'noisy=True needs projection="linear"'),
        ({"sparsemixer_tolerance": 0.2}, "sparsemixer_tolerance=0.2 does nothing without selection"),
        ({"selection": "sparsemixer"}, 'selection="sparsemixer" needs renormalize=False'),
        (
            {"selection": "sparsemixer", "renormalize": False, "score_function": "sigmoid"},
            'selection="sparsemixer" weighs by itself: leave score_function',
        ),
        (
            {"selection": "sparsemixer", "renormalize": False, "sparsemixer_tolerance": 0.0},
            "sparsemixer_tolerance must be positive, got 0.0",
        ),
        ({"force_biased": -1.0}, "force_biased must be finite and not negative, got -1.0"),
        ({"force_biased": 1.0, "force_balanced": True}, "give force_balanced=True or force_biased=1.0, not both"),
        ({"num_shared_sinks": -1}, "num_shared_sinks must not be negative, got -1"),
        ({"num_shared_sinks": 1}, 'num_shared_sinks=1 needs score_function="sigmoid"'),
        (
            {"num_shared_sinks": 1, "score_function": "sigmoid", "renormalize": False},
            "num_shared_sinks=1 join a sum: set renormalize=True",
        ),
        (
            {"num_shared_sinks": 1, "score_function": "sigmoid", "num_zero_experts": 1},
            'needs selection="topk" and num_zero_experts=0',
        ),
        ({"renormalize_before_drop": False}, r"renormalize_before_drop=False does nothing without .*dropless"),
        (
            {"renormalize_before_drop": False, "capacity": 3, "renormalize": False},
            "renormalize_before_drop=False needs renormalize=True",
        ),
        (
            {"renormalize_before_drop": False, "capacity": 3, "per_expert_scale": True},
            "would divide by per_expert_scale, too: leave one",
        ),
        ({"input_jitter": -0.1}, r"input_jitter must be in \[0, 1\), got -0.1"),
        ({"num_groups": 4, "topk_groups": 0}, r"topk_groups must be in \[1, num_groups = 4\], got 0"),
        ({"selection": "hash", "vocab_size": 0}, 'selection="hash" needs vocab_size >= 1, got 0'),
        ({"force_biased": math.inf}, "force_biased must be finite and not negative, got inf"),
        ({"routed_scaling_factor": math.inf}, "routed_scaling_factor must be positive and finite, got inf"),
        ({"logit_softcap": math.inf}, "logit_softcap must be positive and finite, or None, got inf"),
        ({"renormalize_p": math.inf}, "renormalize_p must be at least 1 and finite, got inf"),
        ({"renormalize_eps": math.inf}, "renormalize_eps must be finite and not negative, got inf"),
        ({"capacity_factor": 0.0}, "capacity_factor must be positive and finite, or None for no limit, got 0.0"),
        ({"capacity_factor": math.inf}, "capacity_factor must be positive and finite, .*, got inf"),
        ({"capacity": 3, "eval_capacity_factor": 0.0}, "eval_capacity_factor must be positive .*, got 0.0"),
        ({"renormalize": False, "renormalize_eps": 0.1}, "renormalize_eps=0.1 does nothing without renormalize"),
        ({"renormalize": False, "renormalize_eps_mode": "clamp"}, "renormalize_eps_mode='clamp' does nothing without"),
        (SINKS | {"score_order": "topk_then_score"}, "num_shared_sinks=1 needs .*scores that do not depend on each"),
        (SINKS | {"renormalize_p": 2.0}, r"num_shared_sinks=1 join a sum: .*renormalize_p=1\.0"),
        (SINKS | {"selection": "sinkhorn"}, 'needs selection="topk" and num_zero_experts=0'),
        (LATE | {"global_scale": True}, "would divide by global_scale, too: leave one"),
        (LATE | SINKS, "would divide by num_shared_sinks, too: leave one"),
        (LATE | {"renormalize_p": 2.0}, r"renormalize_before_drop=False needs .*renormalize_p=1\.0"),
        (MIXER | {"score_order": "topk_then_score"}, "weighs by itself: leave score_order"),
        (MIXER | {"routed_scaling_factor": 2.0}, "weighs by itself: leave routed_scaling_factor"),
        (CHOICE | {"capacity_scope": "sequence", "capacity_factor": 1.0}, "capacity_scope='sequence' contradicts"),
        (CHOICE | {"drop_policy": "probability", "capacity_factor": 1.0}, "drop_policy='probability' contradicts"),
        ({"projection_dtype": "bf16"}, r"projection_dtype must be in \('float32', 'input'\), got 'bf16'"),
    ],
)
def test_refused_routers(change, message):
    with pytest.raises(ValueError, match=f"^RouterConfig: .*{message}"):
        RouterConfig(**ROUTER | change)


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (ExpertsConfig, {"weight_position": "middle"}, r"ExpertsConfig: weight_position must be in \('output', 'inp"),
        (ExpertsConfig, {"hidden_size": 0}, "ExpertsConfig: hidden_size must be at least 1, got 0"),
        (ExpertsConfig, {"intermediate_size": 0}, "ExpertsConfig: intermediate_size must be at least 1, got 0"),
        (ExpertsConfig, {"num_experts": 0}, "ExpertsConfig: num_experts must be at least 1, got 0"),
        (ExpertsConfig, {"activation": "tanh"}, r"activation must be in \('swiglu', .*'relu2'\), got 'tanh'"),
        (ExpertsConfig, {"limit": 0.0}, "limit must be positive and finite, or None, got 0.0"),
        (ExpertsConfig, {"activation": "relu", "alpha": 2.0}, "alpha, limit and up_offset shape swiglu, not relu"),
        (ExpertsConfig, {"limit": math.inf}, "limit must be positive and finite, or None, got inf"),
        (ExpertsConfig, {"alpha": math.nan}, "alpha must be finite, got nan"),
        (ExpertsConfig, {"up_offset": math.inf}, "up_offset must be finite, got inf"),
        (ExpertsConfig, {"activation": "relu", "limit": 2.0}, "alpha, limit and up_offset shape swiglu, not relu"),
        (ExpertsConfig, {"activation": "relu", "up_offset": 2.0}, "alpha, limit and up_offset shape swiglu, not relu"),
        (
            ExpertsConfig,
            {"expert_dropout": 0.5, "weight_position": "input"},
            'expert_dropout=0.5 scales the weights, .*set weight_position="output"',
        ),
        (
            ExpertsConfig,
            {"limit_position": "after", "limit": 1.0, "up_offset": 2.0},
            'limit_position="after" needs alpha=1.0, up_offset=0.0',
        ),
        (
            ExpertsConfig,
            {"limit_position": "after", "limit": 1.0, "recompute": True},
            'limit_position="after" needs .*recompute=False',
        ),
        (SharedExpertsConfig, {"num_experts": 2}, "SharedExpertsConfig: num_experts=2 is for routed experts"),
        (SharedExpertsConfig, {"weight_layout": "in_out"}, "weight_layout='in_out' is for routed experts: leave"),
        (SharedExpertsConfig, {"weight_position": "input"}, "weight_position='input' is for routed experts: leave"),
        (SharedExpertsConfig, {"accumulate": True}, "accumulate=True is for routed experts: leave accumulate"),
        (SharedExpertsConfig, {"dropout": 0.5}, "dropout=0.5 is for routed experts: leave dropout"),
        (SharedExpertsConfig, {"expert_dropout": 0.5}, "expert_dropout=0.5 is for routed experts: leave"),
        (ExpertsConfig, {"dropout": 1.0}, r"ExpertsConfig: dropout must be in \[0, 1\), got 1.0"),
        (ExpertsConfig, {"expert_dropout": -0.1}, r"expert_dropout must be in \[0, 1\), got -0.1"),
        (ExpertsConfig, {"dropout": 0.5, "recompute": True}, "dropout=0.5 keeps what recompute=True would not"),
        (ExpertsConfig, {"limit_position": "after"}, "limit_position='after' does nothing without limit"),
        (
            ExpertsConfig,
            {"limit_position": "after", "limit": 1.0, "alpha": 2.0},
            'limit_position="after" needs alpha=1',
        ),
        (SharedExpertsConfig, {"recompute": True}, "SharedExpertsConfig: recompute=True is for routed experts"),
        (SharedExpertsConfig, {"gate": "tanh", "num_experts": 1}, "SharedExpertsConfig: gate must be in .*got 'tanh'"),
    ],
)
def test_refused_experts(config, change, message):
    with pytest.raises(ValueError, match=message):
        config(**EXPERTS | {"num_experts": 1} | change)


def test_refused_layers():
    def refused(message, router=ROUTER, experts=EXPERTS, **layer):
        with pytest.raises(ValueError, match=message):
            MoEConfig(router=RouterConfig(**router), experts=ExpertsConfig(**experts), **layer)

    sinks = ROUTER | {"score_function": "sigmoid", "num_shared_sinks": 3}
    weighed = SharedExpertsConfig(hidden_size=16, intermediate_size=8, gate="router")
    refused(r"latent_size = 8 must equal experts\.hidden_size = 16", latent_size=8)
    refused("latent_size must be at least 1", latent_size=0)
    refused("combine='average' does nothing without shared_experts", combine="average")
    refused(r'router\.num_shared_sinks = 3 and gate="router" .*belong together', router=sinks)
    refused(r'router\.num_shared_sinks = 0 and gate="router" .*belong together', shared_experts=weighed)
    refused(
        r"num_shared_sinks = 3 must divide shared_experts\.intermediate_size = 8", router=sinks, shared_experts=weighed
    )
    for change in ({"num_experts": 4}, {"hidden_size": 8}):
        with pytest.raises(ValueError, match=f"MoEConfig: router.{next(iter(change))} = .* must equal experts"):
            MoEConfig(router=RouterConfig(**ROUTER), experts=ExpertsConfig(**EXPERTS | change))
    shared = SharedExpertsConfig(hidden_size=8, intermediate_size=4)
    with pytest.raises(ValueError, match=r"router\.hidden_size = 16 must equal shared_experts\.hidden_size = 8"):
        MoEConfig(router=RouterConfig(**ROUTER), experts=ExpertsConfig(**EXPERTS), shared_experts=shared)


def test_unknown_options_are_named():
    with pytest.raises(TypeError, match="score_fn"):
        MoE(16, 12, 8, 2, score_fn="sigmoid")
    with pytest.raises(TypeError, match="activation"):
        TopKRouter(16, 8, 2, activation="silu")


def test_configs_are_frozen_and_keyword_only():
    config = RouterConfig(**ROUTER)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.top_k = 3
    with pytest.raises(TypeError):
        RouterConfig(16, 8, 2)
    with pytest.raises(ValueError, match="top_k must be in"):
        dataclasses.replace(config, top_k=9)


def test_keywords_and_configs_build_the_same(device):
    config = MoEConfig(
        router=RouterConfig(**ROUTER, score_function="sigmoid", expert_bias=True, capacity_factor=1.5),
        experts=ExpertsConfig(**EXPERTS, activation="geglu", bias=True, weight_layout="in_out"),
        shared_experts=SharedExpertsConfig(hidden_size=16, intermediate_size=24, activation="geglu", bias=True),
    )
    torch.manual_seed(0)
    ours = MoE.from_config(config, device=device)
    torch.manual_seed(0)
    theirs = MoE(
        16, 12, 8, 2, score_function="sigmoid", expert_bias=True, capacity_factor=1.5, activation="geglu", bias=True,
        weight_layout="in_out", num_shared_experts=2, device=device,
    )  # fmt: skip
    assert theirs.config == config
    assert repr(ours) == repr(theirs)
    x = randn(7, 16, device=device)
    assert torch.equal(ours(x), theirs(x))
    assert TopKRouter.from_config(config.router).config == config.router
    assert Experts.from_config(config.experts, dtype=torch.float64).down_proj.dtype == torch.float64


def test_shared_gate(device):
    shared = SharedExpertsConfig(hidden_size=16, intermediate_size=24, gate="sigmoid")
    layer = MoE.from_config(
        MoEConfig(router=RouterConfig(**ROUTER), experts=ExpertsConfig(**EXPERTS), shared_experts=shared), device=device
    )
    x = randn(3, 16, device=device)
    part, gate = layer.shared_experts, layer.shared_experts.gate
    plain = super(type(part), part).forward(x)
    torch.testing.assert_close(part(x), plain * torch.sigmoid(x @ gate.weight.T))
    before = gate.weight.detach().clone()
    layer.reset_parameters()
    assert not torch.equal(gate.weight, before)


@pytest.mark.parametrize("change", [{"activation": "tanh"}, {"limit_position": "after"}, {"alpha": math.nan}])
def test_a_dense_network_refuses_what_experts_refuse(change):
    with pytest.raises(ValueError, match=f"ExpertsConfig: {next(iter(change))}"):
        DenseFFN(16, 12, **change)
