"""The stages of a Mixture-of-Experts layer as differentiable operators, in the order the data flows.

::

    router_logits --route--> topk_weights, topk_ids --plan--> Plan
    hidden_states --permute--> rows --grouped_gemm--> --activation--> --grouped_gemm--> rows --combine--> output

``experts`` runs the second line as one operator that materialises next to nothing. Across ranks
(:mod:`torch_moe.distributed`) it stands between ``ep_plan``, ``ep_pack`` and, on the other side, ``ep_index``; and
``ep_reduce`` on the way back.

Legend: T tokens, H hidden_size, I intermediate_size, E num_experts, K top_k, R = T * K rows. A slot is one
(token, choice) pair, numbered ``token * top_k + k``; a row is a position in expert order.
"""

from torch_moe.ops.activation import activation
from torch_moe.ops.combine import combine
from torch_moe.ops.ep_index import Received, ep_index
from torch_moe.ops.ep_pack import ep_pack
from torch_moe.ops.ep_plan import EpPlan, ep_plan
from torch_moe.ops.ep_reduce import ep_reduce
from torch_moe.ops.experts import experts
from torch_moe.ops.grouped_gemm import grouped_gemm
from torch_moe.ops.permute import permute
from torch_moe.ops.plan import Plan, plan
from torch_moe.ops.route import route

__all__ = [
    "EpPlan",
    "Plan",
    "Received",
    "activation",
    "combine",
    "ep_index",
    "ep_pack",
    "ep_plan",
    "ep_reduce",
    "experts",
    "grouped_gemm",
    "permute",
    "plan",
    "route",
]
