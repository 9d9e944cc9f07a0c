"""Tiny random models of every transformers family whose experts class is decorated, found by reading the sources."""

import importlib
import importlib.util
import inspect
import re
from pathlib import Path

import torch

MODELS = Path(importlib.util.find_spec("transformers").origin).parent / "models"
DECORATED = re.compile(r"^@use_experts_implementation(?:\(.*\))?\nclass (\w+)", re.MULTILINE)

# Sizes of a model that runs in milliseconds; a config takes those of them that it knows.
TINY = {
    "hidden_size": 32,
    "intermediate_size": 24,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "v_head_dim": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "index_topk": 4,
    "index_head_dim": 8,
    "index_n_heads": 2,
    "vocab_size": 99,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "max_position_embeddings": 64,
    "first_k_dense_replace": 1,
    "mlp_layer_types": ["sparse", "sparse"],
    "linear_head_dim": 8,
    "use_cache": False,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# What single families need besides, or instead.
SPECIAL = {
    "aria": {"moe_num_experts": 4, "moe_topk": 2},
    "axk1": {"head_dim": 4},
    "deepseek_v4": {"mlp_layer_types": ["hash_moe", "moe"]},
    "diffusion_gemma": {"top_k_experts": 2},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2},
    "ernie4_5_vl_moe": {"moe_intermediate_size": [24, 16], "moe_num_experts": 4, "moe_k": 2}
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}},
    "gemma4": {
        "top_k_experts": 2,
        "enable_moe_block": True,
        "vocab_size_per_layer_input": 99,
        "hidden_size_per_layer_input": 8,
    },
    "glm4v_moe": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0]}},
    "glm5_next": {"index_topk": 16, "qk_rope_head_dim": 0},
    "granitemoehybrid": {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8},
    "lfm2_moe": {"layer_types": ["full_attention", "full_attention"], "num_dense_layers": 0},
    "mimo_v2_flash": {"num_key_value_heads": 2},
    "qwen3_omni_moe": {"shared_expert_intermediate_size": 24},
    "zaya": {"num_experts_per_tok": 1},
    # Without the decorator.
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "attn_config": {"kv_n_heads": 4, "clip_qkv": 8, "rope_theta": 1e4},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "jetmoe": {"kv_channels": 8},
    "llama4": {"intermediate_size_mlp": 40, "num_experts_per_tok": 1, "no_rope_layers": [1, 1]},
    "longcat_flash": {"expert_ffn_hidden_size": 24, "ffn_hidden_size": 24, "zero_expert_num": 2, "moe_topk": 3}
    | {"num_layers": 2, "head_dim": 4},
    "nllb_moe": {"d_model": 32, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "encoder_layers": 2, "decoder_layers": 2}
    | {"encoder_sparse_step": 1, "decoder_sparse_step": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    | {"pad_token_id": 0},
    "step3p7": {"pad_token_id": 0, "sliding_window": 4, "swiglu_limits": [0.0, 0.5], "share_expert_dim": 24},
    "switch_transformers": {"d_model": 32, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 4}
    | {"num_sparse_encoder_layers": 2, "num_decoder_layers": 2, "num_sparse_decoder_layers": 2, "pad_token_id": 0},
}


def find_decorated():
    """Return every (family, experts class)."""
    return [
        (path.parent.name, name)
        for path in sorted(MODELS.glob("*/modeling_*.py"))
        for name in DECORATED.findall(path.read_text(encoding="utf-8"))
    ]


def model_class(family, experts):
    """Return the smallest text model with these experts: with a head where there is one."""
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    stem = experts.removesuffix("Experts")
    short = stem.removesuffix("Text")
    exact = ("ForCausalLM", "TextForCausalLM", "ForTokenClassification", "Model")
    names = [f"{short}EncoderTextModel", *(f"{start}{end}" for start in (stem, short) for end in exact)]
    names.append(f"{short.removesuffix('Moe')}TextModel")
    for name in names:
        found = getattr(module, name, None)
        if inspect.isclass(found):
            return found
    raise LookupError(f"{family}: none of {names}; name its model here")


def tiny_config(cls, **options):
    """Return the config of a model class with the sizes above."""
    config_class = cls.config_class
    known = {name for base in config_class.__mro__ for name in getattr(base, "__annotations__", {})}
    known |= set(getattr(config_class, "attribute_map", {}))
    sizes = {name: value for name, value in TINY.items() if name in known}
    return config_class(**sizes | SPECIAL.get(cls.__module__.split(".")[-2], {}) | options)


def tiny_model(cls, dtype=torch.float32, **options):
    """Return a model in eval mode whose weights are seeded and large enough for every expert to matter."""
    model = cls(tiny_config(cls, **options)).eval()
    randomise(model)
    return model.to(dtype)


@torch.no_grad()
def randomise(model, seed=0):
    """Draw all parameters anew: transformers leaves some uninitialised and sets others to zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        fan_in = parameter[0].numel() ** 0.5 if parameter.dim() == 2 else parameter.shape[-1] ** 0.5
        drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        is_norm = parameter.dim() == 1 and "norm" in name
        parameter.copy_(1 + 0.1 * drawn if is_norm else drawn / fan_in)
    for name, buffer in model.named_buffers():
        if name.endswith("tid2eid"):  # token to experts, of layers that route by a table: different experts per token
            draw = torch.rand(buffer.shape[0], TINY["num_experts"], generator=generator)
            buffer.copy_(draw.argsort(dim=1)[:, : buffer.shape[1]])


def token_ids(*shape, seed=0):
    return torch.randint(3, TINY["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


def tiny_inputs(model, num_tokens=7, seed=0):
    """Return arguments of the model's forward: ids, or embeddings where a model has no table of its own."""
    family = type(model).__module__.split(".")[-2]
    if type(model).__name__ == "Qwen3OmniMoeTalkerModel":
        embeds = torch.randn(2, num_tokens, TINY["hidden_size"], generator=torch.Generator().manual_seed(seed))
        return {"inputs_embeds": embeds.to(model.dtype)}
    inputs = {"input_ids": token_ids(2, num_tokens, seed=seed)}
    if family == "ernie4_5_vl_moe":  # both sets of experts: those of text and those of pictures
        inputs["moe_mm_token_type_ids"] = torch.arange(2 * num_tokens).view(2, num_tokens) % 3 == 0
    return inputs
