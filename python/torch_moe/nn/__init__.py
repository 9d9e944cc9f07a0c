"""The layer and its parts: ``MoE`` is ``TopKRouter``, then ``Experts``, and perhaps a ``DenseFFN`` beside them."""

from torch_moe.nn.dense import DenseFFN
from torch_moe.nn.experts import Experts
from torch_moe.nn.layer import MoE, Routing
from torch_moe.nn.router import TopKRouter

__all__ = ["DenseFFN", "Experts", "MoE", "Routing", "TopKRouter"]
