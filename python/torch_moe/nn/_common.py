"""What the modules share: argument checks and the initialisation rule."""

import math

import torch
from torch import Tensor


def require(module: str, condition: bool, message: str) -> None:
    """Raise ``ValueError`` with the module's name unless the condition holds."""
    if not condition:
        raise ValueError(f"{module}: {message}")


@torch.no_grad()
def uniform_by_fan_in_(tensor: Tensor, fan_in: int) -> None:
    """Fill ``tensor`` uniformly in ±1/sqrt(fan_in), the rule of ``torch.nn.Linear``."""
    bound = 1 / math.sqrt(fan_in)
    tensor.uniform_(-bound, bound)
