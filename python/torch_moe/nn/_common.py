"""What the modules share: argument checks, the initialisation rule, and what autocast must not touch."""

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from torch_moe.ops._common import is_autocast_enabled


def require(module: str, condition: bool, message: str) -> None:
    """Raise ``ValueError`` with the module's name unless the condition holds."""
    if not condition:
        raise ValueError(f"{module}: {message}")


@torch.no_grad()
def uniform_by_fan_in_(tensor: Tensor, fan_in: int) -> None:
    """Fill ``tensor`` uniformly in ±1/sqrt(fan_in), the rule of ``torch.nn.Linear``."""
    bound = 1 / math.sqrt(fan_in)
    tensor.uniform_(-bound, bound)


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Return the context in which operators compute in the dtype of their inputs."""
    return torch.autocast(device_type, enabled=False) if is_autocast_enabled(device_type) else nullcontext()
