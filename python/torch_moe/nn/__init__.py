"""The layer and its parts: ``MoE`` is ``TopKRouter``, then ``Experts``, and perhaps ``SharedExperts`` beside them."""

from torch_moe.nn.dense import DenseFFN, SharedExperts
from torch_moe.nn.experts import Experts
from torch_moe.nn.layer import ExtendedRouting, MoE, Routing
from torch_moe.nn.router import TopKRouter
from torch_moe.nn.router_output import ExtendedRouterOutput, RouterOutput

__all__ = [
    "DenseFFN",
    "Experts",
    "ExtendedRouterOutput",
    "ExtendedRouting",
    "MoE",
    "RouterOutput",
    "Routing",
    "SharedExperts",
    "TopKRouter",
]
