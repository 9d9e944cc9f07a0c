"""The families of transformers as configurations of this library: equal output and gradients, weights copied over."""

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed (pip install 'torch-moe[transformers]')")

import transformers
from helpers import randn
from transformers_models import find_decorated, model_class, tiny_model, token_ids

from torch_moe import ExpertsConfig, MoE, MoEConfig, RouterConfig, SharedExpertsConfig
from torch_moe.integrations import transformers as engine
from torch_moe.integrations.transformers.report import is_decorated
from torch_moe.integrations.transformers.router import bias_of
from torch_moe.testing import assert_close

SIGMOID = {"score_function": "sigmoid"}
BIASED = {**SIGMOID, "expert_bias": True}
PLAIN = {"renormalize": False}
LATE = {"score_order": "topk_then_score", **PLAIN}
GROUPS = {"num_groups": 2, "topk_groups": 1}
OSS = {"alpha": 1.702, "limit": 0.5, "up_offset": 1.0}
TRANSPOSED = {"weight_layout": "in_out"}
# family: options of the model; of our router, experts, shared experts (None for none) and layer.
CASES = {
    "mixtral": ({}, {}, {}, None, {}),
    "qwen2_moe": ({"norm_topk_prob": False}, PLAIN, {}, {"gate": "sigmoid"}, {}),
    "qwen3_moe": ({"norm_topk_prob": True}, {}, {}, None, {}),
    "qwen3_next": ({}, {}, {}, {"gate": "sigmoid"}, {}),
    "olmoe": ({}, PLAIN, {}, None, {}),
    "jamba": ({}, PLAIN, {}, None, {}),
    "phimoe": (
        {"router_jitter_noise": 0.3},
        {**PLAIN, "selection": "sparsemixer", "sparsemixer_tolerance": 0.3},
        {},
        None,
        {},
    ),
    "deepseek_v2": (
        {"topk_method": "group_limited_greedy", "routed_scaling_factor": 1.5},
        {**PLAIN, **GROUPS, "group_score": "max", "group_mask": "zero", "routed_scaling_factor": 1.5},
        {},
        {},
        {},
    ),
    "mistral4": ({"n_group": 1, "topk_group": 1}, {}, {}, {}, {}),
    "gemma4": ({}, {"input_norm": True, "per_expert_scale": True}, {"activation": "geglu_tanh"}, None, {}),
    "ernie4_5_moe": (
        {"moe_num_shared_experts": 1},
        {"expert_bias": True, "renormalize_eps": 1e-12, "renormalize_eps_mode": "clamp"},
        {},
        {},
        {},
    ),
    "longcat_flash": (
        {},
        {**PLAIN, "expert_bias": True, "num_zero_experts": 2, "routed_scaling_factor": 6.0},
        {},
        None,
        {},
    ),
    "zaya": (
        {"router_hidden_size": 12},
        {
            **PLAIN, "expert_bias": True, "num_zero_experts": 1, "zero_expert": "zero", "projection": "mlp",
            "projection_size": 12, "projection_state": True,
        },
        {},
        None,
        {},
    ),
    "dbrx": ({}, {"renormalize_p": 1.0}, {}, None, {}),
    "gpt_oss": (
        {"swiglu_limit": 7.0},
        {**LATE, "projection_bias": True},
        {**OSS, **TRANSPOSED, "limit": 7.0, "bias": True, "gate_layout": "interleaved"},
        None,
        {},
    ),
    "granitemoe": ({}, LATE, {}, None, {}),
    "aria": ({"moe_num_shared_experts": 2}, LATE, TRANSPOSED, {}, {}),
    "cohere2_moe": (
        {"num_shared_experts": 2, "expert_selection_fn": "sigmoid", "norm_topk_prob": True},
        {**SIGMOID, "score_order": "topk_then_score"},
        {},
        {},
        {"combine": "average"},
    ),
    "jetmoe": ({}, LATE, {}, None, {"output_bias": True}),
    "llama4": ({}, {**SIGMOID, **LATE}, {**TRANSPOSED, "weight_position": "input"}, {}, {}),
    "deepseek_v3": ({}, {**BIASED, **GROUPS, "routed_scaling_factor": 2.5}, {}, {}, {}),
    "axk1": ({}, {**BIASED, **GROUPS, "routed_scaling_factor": 2.5}, {}, {}, {"output_norm": True}),
    "axk2": ({}, {**BIASED, **GROUPS, "group_mask": "zero", "routed_scaling_factor": 2.5}, {}, {}, {}),
    "glm5_next": (
        {"swiglu_limit": 0.5, "n_group": 1, "topk_group": 1},
        {**BIASED, "routed_scaling_factor": 2.5},
        {"limit": 0.5},
        {"limit": 0.5},
        {},
    ),
    "nemotron_h": (
        {"moe_latent_size": 20, "layers_block_type": ["moe", "moe"], "moe_shared_expert_intermediate_size": 28}
        | {"n_group": 1, "topk_group": 1},
        BIASED,
        {"activation": "relu2"},
        {"activation": "relu2"},
        {"latent_size": 20},
    ),
    "minimax_m2": ({}, BIASED, {}, None, {}),
    "minimax_m3_vl": (
        {"swiglu_limit": 0.5, "shared_intermediate_size": 24, "mlp_layer_types": ["sparse", "sparse"]},
        {**BIASED, "routed_scaling_factor": 2.0},
        OSS,
        OSS,
        {},
    ),
    "step3p7": (
        {"swiglu_limits": [0.5, 0.5], "swiglu_limits_shared": [0.4, 0.4]},
        BIASED,
        {"limit": 0.5, "limit_position": "after"},
        {"limit": 0.4, "limit_position": "after"},
        {},
    ),
    "afmoe": ({"num_dense_layers": 0}, BIASED, {}, {}, {}),
    "laguna": (
        {"moe_router_logit_softcapping": 2.0, "moe_routed_scaling_factor": 1.5},
        {**BIASED, "logit_softcap": 2.0, "routed_scaling_factor": 1.5},
        {},
        {},
        {},
    ),
    "lfm2_moe": ({"use_expert_bias": True}, {**BIASED, "renormalize_eps": 1e-6}, {}, None, {}),
    "deepseek_v4": (
        {"swiglu_limit": 0.5, "mlp_layer_types": ["hash_moe", "moe"]},
        {"score_function": "sqrtsoftplus", "routed_scaling_factor": 1.5},
        {"limit": 0.5},
        {"limit": 0.5},
        {},
    ),
    "inkling": (
        {"n_shared_experts": 2},
        {**BIASED, "num_shared_sinks": 2, "global_scale": True, "routed_scaling_factor": 8.0},
        {},
        {"gate": "router"},
        {},
    ),
    "switch_transformers": (
        {"expert_capacity": 2},
        {**PLAIN, "capacity": 2, "capacity_scope": "sequence"},
        {"activation": "relu"},
        None,
        {},
    ),
    "nllb_moe": (
        {"moe_eval_capacity_token_fraction": 0.3, "expert_capacity": 64, "moe_token_dropout": 0.0},
        {
            "selection": "top2_gshard", "capacity": 64, "eval_capacity_factor": 0.6, "renormalize_before_drop": False,
        },
        {"activation": "relu", "bias": True},
        None,
        {},
    ),
}  # fmt: skip
UNDECORATED = {
    "dbrx": "DbrxForCausalLM",
    "jetmoe": "JetMoeForCausalLM",
    "llama4": "Llama4ForCausalLM",
    "longcat_flash": "LongcatFlashForCausalLM",
    "nllb_moe": "NllbMoeForConditionalGeneration",
    "switch_transformers": "SwitchTransformersForConditionalGeneration",
}


def blocks_of(family, options):
    """Return the MoE blocks of a tiny model: the parents of its experts."""
    if family == "step3p7":
        from transformers.models.step3p7.modeling_step3p7 import Step3p7TextModel as cls
    elif family in UNDECORATED:
        cls = getattr(transformers, UNDECORATED[family])
    else:
        cls = model_class(family, next(name for known, name in find_decorated() if known == family))
    model = tiny_model(cls, **options)
    if family == "nllb_moe":
        engine.swap(model)  # transformers' own runs two experts only
    names = [name for name, module in model.named_modules() if is_experts(module)]
    blocks = {name.rpartition(".")[0]: model.get_submodule(name.rpartition(".")[0]) for name in names}
    if family == "jetmoe":
        return [module for module in model.modules() if type(module).__name__ == "JetMoeMoE"]
    return list(blocks.values())


def is_experts(module):
    kind = type(module).__name__
    return kind.endswith("Experts") and (is_decorated(module) or kind.split("Experts")[0] in OTHERS)


OTHERS = ("Dbrx", "Llama4Text", "LongcatFlash", "Step3p7", "SwitchTransformers", "NllbMoe")


@torch.no_grad()
def randomise_biases(block):
    owner, name = bias_of(block)
    if owner is not None:
        bias = getattr(owner, name)
        bias.copy_(randn(bias.numel(), seed=4).view_as(bias).abs() / 10)


@torch.no_grad()
def build(block, router, experts, shared, layer):
    """Return our layer with the weights of a block, which the shapes and names tell."""
    named = dict(block.named_parameters()) | dict(block.named_buffers())
    gate = next(child for key, child in block.named_children() if key in ("gate", "router"))
    top_k = next((m.top_k for m in (gate, block) if hasattr(m, "top_k")), 1 if "capacity_scope" in router else 2)
    gate_up, down, biases = weights_of(block)
    sizes = {"hidden_size": layer.get("latent_size", 32), "num_experts": 4}
    weights = None if shared is None else shared_weights_of(block)
    config = MoEConfig(
        router=RouterConfig(hidden_size=32, num_experts=4, top_k=top_k, **router),
        experts=ExpertsConfig(intermediate_size=24, **sizes, **experts),
        shared_experts=weights and SharedExpertsConfig(hidden_size=32, intermediate_size=weights[1].shape[1], **shared),
        **layer,
    )
    ours = MoE.from_config(config).eval()
    if ours.router.mlp is not None:
        network, mlp = gate.router_mlp, ours.router.mlp
        mlp.down.load_state_dict(gate.down_proj.state_dict())
        for name in ("norm", "fc1", "fc2"):
            getattr(mlp, name).load_state_dict(getattr(network, name).state_dict())
        ours.router.weight.copy_(network.out_proj.weight)
        if gate.use_eda:
            mlp.state_scale.copy_(gate.router_states_scale)
    else:
        ours.router.weight.copy_(next(p for p in gate.parameters() if p.shape == ours.router.weight.shape))
    for mine, theirs in (("bias", "bias"), ("input_scale", "scale"), ("per_expert_scale", "per_expert_scale"),
                         ("global_scale", "global_scale"), ("hash_table", "tid2eid")):  # fmt: skip
        if getattr(ours.router, mine) is not None:
            getattr(ours.router, mine).copy_(getattr(gate, theirs))
    owner, name = bias_of(block)
    if ours.router.expert_bias is not None:
        ours.router.expert_bias.copy_(getattr(owner, name).view(-1))
    ours.experts.gate_up_proj.copy_(gate_up[:4])
    ours.experts.down_proj.copy_(down)
    for mine, theirs in zip(("gate_up_proj_bias", "down_proj_bias"), biases, strict=True):
        if theirs is not None:
            getattr(ours.experts, mine).copy_(theirs)
    if weights is not None:
        ours.shared_experts.gate_up_proj.weight.copy_(weights[0])
        ours.shared_experts.down_proj.weight.copy_(weights[1])
        if ours.shared_experts.gate is not None:
            ours.shared_experts.gate.weight.copy_(named["shared_expert_gate.weight"])
    ends = {
        "latent_down.weight": "fc1_latent_proj.weight",
        "latent_up.weight": "fc2_latent_proj.weight",
        "output_norm.weight": "post_mlp_layernorm.weight",
        "output_bias": "bias",
    }
    for mine in ends.keys() & dict(ours.named_parameters()).keys():
        ours.get_parameter(mine).copy_(named[ends[mine]])
    return ours


def weights_of(block):
    """Return both weights of the experts as stacks, and their biases."""
    if hasattr(block, "input_linear"):
        return block.input_linear.weight, block.output_linear.weight, (None, None)
    experts = block.experts
    if hasattr(experts, "mlp"):  # flat, gate and up apart, down transposed
        gate, up, down = (getattr(experts.mlp, name).view(4, 24, 32) for name in ("w1", "v1", "w2"))
        return torch.cat([gate, up], dim=1), down.transpose(1, 2), (None, None)
    if isinstance(experts, torch.nn.ModuleDict):
        each = [experts[f"expert_{number}"] for number in range(4)]
        layers = ("wi", "wo") if hasattr(each[0], "wi") else ("fc1", "fc2")
        parts = [[getattr(expert, name) for expert in each] for name in layers]
        gate_up, down = (torch.stack([linear.weight for linear in linears]) for linears in parts)
        has_bias = parts[0][0].bias is not None
        return gate_up, down, [torch.stack([p.bias for p in linears]) if has_bias else None for linears in parts]
    first = "gate_up_proj" if hasattr(experts, "gate_up_proj") else "up_proj"
    biases = tuple(getattr(experts, f"{name}_bias", None) for name in (first, "down_proj"))
    return getattr(experts, first), experts.down_proj, biases


def shared_weights_of(block):
    """Return the weights of the shared experts as one dense network."""
    shared = next(child for key, child in block.named_children() if key in ("shared_expert", "shared_experts"))
    if isinstance(shared.down_proj, torch.nn.Parameter):  # stacked
        gate, up = (getattr(shared, name).flatten(0, 1) for name in ("gate_proj", "up_proj"))
        return torch.cat([gate, up]), shared.down_proj.permute(1, 0, 2).flatten(1)
    if hasattr(shared, "gate_up_proj"):
        return shared.gate_up_proj.weight, shared.down_proj.weight
    gates = [shared.gate_proj.weight] if hasattr(shared, "gate_proj") else []
    return torch.cat([*gates, shared.up_proj.weight]), shared.down_proj.weight


def outputs_of(family, block, ours, x, ids, state):
    """Return both outputs, and the states that ZAYA's hand on."""
    if family == "gemma4":  # the layer norms the tokens for its router and for its experts apart
        normed = x.tanh()
        _, weights, chosen = block.router(x.flatten(0, 1))
        theirs = block.experts(normed.flatten(0, 1), chosen, weights).view_as(x)
        return theirs, ours(normed, router_input=x), None
    if family == "zaya":
        theirs, their_state = block(x, state)
        mine, routing = ours(x, True, router_state=state)
        return theirs, mine, (their_state, routing.router_state.view_as(their_state))
    theirs = block(x, ids) if getattr(block, "is_hash", False) else block(x)
    theirs = theirs[0] if isinstance(theirs, tuple) else theirs
    return theirs.view_as(x), ours(x, token_ids=ids), None


@pytest.mark.parametrize("family", CASES)
def test_the_same_layer(family, one_thread):
    options, router, experts, shared, layer = CASES[family]
    blocks = blocks_of(family, options)
    assert blocks
    states = None
    for block in blocks:
        randomise_biases(block)
        own = dict(router)
        if family == "deepseek_v4":
            own |= {"selection": "hash", "vocab_size": 99} if block.is_hash else {"expert_bias": True}
        ours = build(block, own, experts, shared, layer)
        x, ids = 1.5 * randn(2, 9, 32, seed=1), token_ids(2, 9)
        results = []
        for number in range(2):
            leaf = x.clone().requires_grad_()
            both = outputs_of(family, block, ours, leaf, ids, states and states[number])
            output = both[number]
            (gradient,) = torch.autograd.grad((output * randn(*x.shape, seed=2)).sum(), leaf)
            results.append((output.detach(), gradient))
        for mine, theirs in zip(results[1], results[0], strict=True):
            assert_close(mine, theirs.double(), 32, 32, 24, 8, 8)
        states = both[2]


def test_which_families_are_left_out():
    """Those whose routing and experts are, in the table, those of another family."""
    tried = {*CASES}
    alike = {
        "mixtral": ("minimax", "qwen3_vl_moe", "hunyuan_v1_moe"),
        "qwen3_moe": ("qwen3_omni_moe", "flex_olmo", "mellum"),
        "qwen3_next": ("qwen3_5_moe", "qwen4_exp"),
        "gemma4": ("diffusion_gemma",),
        "ernie4_5_moe": ("ernie4_5_vl_moe",),
        "deepseek_v2": ("deepseek_ocr2",),
        "gpt_oss": ("openai_privacy_filter",),
        "granitemoe": ("granitemoehybrid", "granitemoeshared", "granitemoe_swa"),
        "deepseek_v3": ("deepseek_v32",),
        "minimax_m2": (
            "dots1", "exaone_moe", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm_moe_dsa", "hy_v3", "kimi_linear",
            "mimo_v2_flash", "solar_open",
        ),
        "glm5_next": ("hy_v4",),
    }  # fmt: skip
    others = {family for families in alike.values() for family in families}
    assert {*alike} <= tried
    assert {family for family, _ in find_decorated()} - tried == others
