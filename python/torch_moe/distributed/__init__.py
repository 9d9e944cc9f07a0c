"""Expert parallelism: the experts of a layer spread over the ranks of a process group.

::

    tokens --ep_plan, ep_pack--> rows --exchange--> --ep_index--> experts --exchange--> rows --ep_reduce--> tokens

A token goes once to each rank that has one of its experts, and one row per rank comes back, already summed over that
rank's experts. The routing is local and all tensors; between ranks there are bytes, moved by the functional
collectives of ``torch.distributed`` on whatever backend the group has.

- :class:`Placement` says which rank computes which expert: data, also for replicas and for ranks that are gone.
- ``ExpertParallel(layer, group)`` makes a :class:`torch_moe.MoE` of which each rank holds some experts. The group is a
  ``ProcessGroup``, or a ``DeviceMesh`` of one dimension or with one named ``ep``.
"""

import torch_moe.distributed.experts  # noqa: F401  # its operators get their implementations by being imported
from torch_moe.distributed.balance import count_moves, placement_of, rank_loads, solve_placement
from torch_moe.distributed.checkpoint import ExpertShards, expert_shards
from torch_moe.distributed.exchange import check_splits
from torch_moe.distributed.faults import RankLost, agree_on_survivors, guard, regroup, without_ranks
from torch_moe.distributed.fsdp import prepare_fsdp
from torch_moe.distributed.gradients import average_gradients, clip_grad_norm_
from torch_moe.distributed.layer import ExpertParallel, ShardedExperts
from torch_moe.distributed.moving import move_experts
from torch_moe.distributed.placement import Placement
from torch_moe.distributed.replicas import sum_replica_gradients
from torch_moe.distributed.tuning import ExchangeCost, best_chunks, measure_exchange, tune_chunks

__all__ = [
    "ExchangeCost",
    "ExpertParallel",
    "ExpertShards",
    "Placement",
    "RankLost",
    "ShardedExperts",
    "agree_on_survivors",
    "average_gradients",
    "best_chunks",
    "check_splits",
    "clip_grad_norm_",
    "count_moves",
    "expert_shards",
    "guard",
    "measure_exchange",
    "move_experts",
    "placement_of",
    "prepare_fsdp",
    "rank_loads",
    "regroup",
    "solve_placement",
    "sum_replica_gradients",
    "tune_chunks",
    "without_ranks",
]
