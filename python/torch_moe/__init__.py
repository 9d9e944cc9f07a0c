"""Mixture-of-Experts layers for PyTorch: compiled, differentiable, deterministic operators.

``torch_moe.MoE`` is the layer, ``torch_moe.nn`` its parts, ``torch_moe.ops`` the operators it is made of (also
``torch.ops.moe.*``), ``torch_moe.reference`` what they compute, and ``torch_moe.explain`` tells which kernels run here.
"""

from torch_moe._load import load_extension

__version__: str = str(load_extension().build_info()["version"])

from torch_moe import losses, nn, ops  # the operators exist only once the extension is loaded
from torch_moe.balancing import BiasBalancer
from torch_moe.config import ExpertsConfig, MoEConfig, RouterConfig, SharedExpertsConfig
from torch_moe.explain import explain
from torch_moe.metrics import RoutingStats
from torch_moe.nn import Experts, MoE, TopKRouter
from torch_moe.observe import Observation
from torch_moe.ops import Plan
from torch_moe.param_report import ParamReport, param_report
from torch_moe.presets import PRESETS
from torch_moe.trace import trace
from torch_moe.upcycling import upcycle

__all__ = [
    "PRESETS",
    "BiasBalancer",
    "Experts",
    "ExpertsConfig",
    "MoE",
    "MoEConfig",
    "Observation",
    "ParamReport",
    "Plan",
    "RouterConfig",
    "RoutingStats",
    "SharedExpertsConfig",
    "TopKRouter",
    "__version__",
    "explain",
    "losses",
    "nn",
    "ops",
    "param_report",
    "trace",
    "upcycle",
]
