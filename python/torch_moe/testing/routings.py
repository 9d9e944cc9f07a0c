"""Named routings: how the tokens spread over the experts."""

import torch
from torch import Tensor

ROUTINGS = ("uniform", "zipf", "one_expert")


def routing(name: str, num_tokens: int, num_experts: int, top_k: int, *, seed: int = 0) -> Tensor:
    """Draw the experts of each token, distinct within a token.

    Parameters
    ----------
    name : {"uniform", "zipf", "one_expert"}
        ``uniform``: any expert as likely as any other. ``zipf``: expert ``e`` with odds 1 / (e + 1), as loads look
        without balancing. ``one_expert``: choice ``k`` of every token is expert ``num_experts - 1 - k``, so for
        ``top_k=1`` the last expert takes all.
    num_tokens, num_experts, top_k : int
        The sizes.
    seed : int, default=0
        Seeds the draw.

    Returns
    -------
    Tensor of shape (num_tokens, top_k), dtype=int32
        The ids, on the CPU.

    Raises
    ------
    ValueError
        If the name is another.
    """
    if name == "one_expert":
        return (num_experts - 1 - torch.arange(top_k, dtype=torch.int32)).repeat(num_tokens, 1)
    if name not in ROUTINGS:
        raise ValueError(f"routing: name must be in {ROUTINGS}, got {name!r}")
    generator = torch.Generator().manual_seed(seed)
    # Gumbel-top-k draws without replacement by the odds exp(log_odds).
    gumbel = -torch.empty(num_tokens, num_experts).exponential_(generator=generator).log()
    log_odds = -torch.arange(1, num_experts + 1).log() if name == "zipf" else torch.zeros(num_experts)
    return (gumbel + log_odds).topk(top_k, dim=-1).indices.int()
