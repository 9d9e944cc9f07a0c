"""Mixture-of-Experts layers for PyTorch: compiled, differentiable, deterministic operators.

``torch_moe.ops`` are the operators (also ``torch.ops.moe.*``), ``torch_moe.reference`` what they compute, and
``torch_moe.explain`` tells which kernels run here.
"""

from torch_moe._load import load_extension

__version__: str = str(load_extension().build_info()["version"])

from torch_moe import ops  # the operators exist only once the extension is loaded
from torch_moe.explain import explain
from torch_moe.ops import Plan

__all__ = ["Plan", "__version__", "explain", "ops"]
