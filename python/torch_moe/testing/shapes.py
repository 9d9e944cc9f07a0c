"""Named shape classes, each for one thing that goes wrong elsewhere."""

from typing import NamedTuple


class Shape(NamedTuple):
    """Sizes of one layer call, with the letters of the legend."""

    num_tokens: int  # T
    hidden_size: int  # H
    intermediate_size: int  # I
    num_experts: int  # E
    top_k: int  # K


SHAPES = {
    # Several tiles of any kernel in every direction.
    "several_tiles": Shape(num_tokens=150, hidden_size=96, intermediate_size=80, num_experts=3, top_k=2),
    # Six slots for eight experts: under every routing some expert gets nothing.
    "empty_expert": Shape(num_tokens=3, hidden_size=32, intermediate_size=16, num_experts=8, top_k=2),
    # With the routing "one_expert", three experts get nothing and one gets every row.
    "one_expert_takes_all": Shape(num_tokens=33, hidden_size=32, intermediate_size=48, num_experts=4, top_k=1),
    "single_token": Shape(num_tokens=1, hidden_size=64, intermediate_size=32, num_experts=4, top_k=2),
    "no_tokens": Shape(num_tokens=0, hidden_size=32, intermediate_size=16, num_experts=4, top_k=2),
    # Primes: no size is a multiple of any vector or tile.
    "unaligned": Shape(num_tokens=19, hidden_size=37, intermediate_size=53, num_experts=5, top_k=3),
    "top_k_equals_num_experts": Shape(num_tokens=9, hidden_size=32, intermediate_size=16, num_experts=4, top_k=4),
    "many_experts_2048": Shape(num_tokens=64, hidden_size=16, intermediate_size=8, num_experts=2048, top_k=8),
}
