"""What attention adds to a model's size: each kind as modules that have its parameters and compute nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import nn


def _linear(inputs: int, outputs: int, bias: bool = False) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=bias, device="meta")


def _vector(size: int) -> nn.ParameterList:
    return nn.ParameterList([nn.Parameter(torch.empty(size, device="meta"))])


@dataclass(frozen=True, kw_only=True)
class GroupedQueryAttention:
    """Softmax attention whose query heads share keys and values.

    Parameters
    ----------
    num_heads, num_kv_heads, head_dim : int
        Heads of queries, of keys and values, and their width.
    qkv_bias, output_bias : bool, default=False
        Biases of the projections.
    qk_norm : {"none", "head", "width"}, default="none"
        Whether queries and keys are normalised with weights, per head or over all heads together.
    sinks : bool, default=False
        One learned logit per head (gpt-oss).
    output_gate : bool, default=False
        The projection of the queries also gives a gate (Qwen3-Next).
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: Literal["none", "head", "width"] = "none"
    sinks: bool = False
    output_gate: bool = False

    def build(self, hidden_size: int) -> nn.ModuleDict:
        """Return the parameters as modules on the meta device."""
        width, kv_width = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        parts: dict[str, nn.Module] = {
            "q_proj": _linear(hidden_size, width * (2 if self.output_gate else 1), self.qkv_bias),
            "k_proj": _linear(hidden_size, kv_width, self.qkv_bias),
            "v_proj": _linear(hidden_size, kv_width, self.qkv_bias),
            "o_proj": _linear(width, hidden_size, self.output_bias),
        }
        if self.qk_norm != "none":
            by_head = self.qk_norm == "head"
            parts["q_norm"] = _vector(self.head_dim if by_head else width)
            parts["k_norm"] = _vector(self.head_dim if by_head else kv_width)
        if self.sinks:
            parts["sinks"] = _vector(self.num_heads)
        return nn.ModuleDict(parts)


@dataclass(frozen=True, kw_only=True)
class LatentAttention:
    """DeepSeek's multi-head latent attention (arXiv 2405.04434).

    Parameters
    ----------
    num_heads : int
        Heads.
    q_lora_rank, kv_lora_rank : int
        Widths that queries, and keys with values, are compressed to.
    nope_head_dim, rope_head_dim, v_head_dim : int
        Widths of a head: keys without and with position, values.
    """

    num_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    nope_head_dim: int = 128
    rope_head_dim: int = 64
    v_head_dim: int = 128

    def build(self, hidden_size: int) -> nn.ModuleDict:
        """Return the parameters as modules on the meta device."""
        query_width = self.num_heads * (self.nope_head_dim + self.rope_head_dim)
        value_width = self.num_heads * self.v_head_dim
        return nn.ModuleDict(
            {
                "q_a_proj": _linear(hidden_size, self.q_lora_rank),
                "q_a_norm": _vector(self.q_lora_rank),
                "q_b_proj": _linear(self.q_lora_rank, query_width),
                "kv_a_proj": _linear(hidden_size, self.kv_lora_rank + self.rope_head_dim),
                "kv_a_norm": _vector(self.kv_lora_rank),
                "kv_b_proj": _linear(self.kv_lora_rank, self.num_heads * self.nope_head_dim + value_width),
                "o_proj": _linear(value_width, hidden_size),
            }
        )


@dataclass(frozen=True, kw_only=True)
class GatedDeltaNet:
    """Linear attention with a gated delta rule (arXiv 2412.06464), as Qwen3-Next has it.

    Parameters
    ----------
    num_key_heads, num_value_heads, key_head_dim, value_head_dim : int
        Heads and their widths.
    conv_size : int
        Length of the causal convolution over queries, keys and values.
    """

    num_key_heads: int
    num_value_heads: int
    key_head_dim: int
    value_head_dim: int
    conv_size: int

    def build(self, hidden_size: int) -> nn.ModuleDict:
        """Return the parameters as modules on the meta device."""
        keys, values = self.num_key_heads * self.key_head_dim, self.num_value_heads * self.value_head_dim
        channels = 2 * keys + values
        return nn.ModuleDict(
            {
                "in_proj_qkvz": _linear(hidden_size, channels + values),
                "in_proj_ba": _linear(hidden_size, 2 * self.num_value_heads),
                "conv1d": nn.Conv1d(channels, channels, self.conv_size, groups=channels, bias=False, device="meta"),
                "dt_bias": _vector(self.num_value_heads),
                "A_log": _vector(self.num_value_heads),
                "norm": _vector(self.value_head_dim),
                "out_proj": _linear(values, hidden_size),
            }
        )


Attention: TypeAlias = GroupedQueryAttention | LatentAttention | GatedDeltaNet
