"""The specification: every stage in plain torch, read and run in fp64; the backward is autograd's.

Each function computes in the dtype it is given, on the device it is given. Parameters are those of the function of the
same name in :mod:`torch_moe.ops`, which documents them; nothing is validated and nothing is fast.
Legend: T tokens, H hidden_size, I intermediate_size, E num_experts, K top_k, R = T * K rows.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from torch_moe.ops.activation import is_gated
from torch_moe.ops.ep_plan import EpPlan
from torch_moe.ops.plan import Plan


def route(
    router_logits: Tensor,  # [T, E]
    top_k: int,
    expert_bias: Tensor | None = None,  # [E]
    route_override: Tensor | None = None,  # [T, K]
    *,
    score_function: str = "softmax",
    score_order: str = "score_then_topk",
    renormalize: bool = True,
    renormalize_p: float = 1.0,
    renormalize_eps: float = 1e-20,
    renormalize_eps_mode: str = "add",
    routed_scaling_factor: float = 1.0,
    num_groups: int = 1,
    topk_groups: int = 1,
    group_score: str = "top2_sum",
    group_mask: str = "-inf",
) -> tuple[Tensor, Tensor]:
    r"""Choose ``top_k`` experts per token and weigh them.

    With the scores :math:`v` of the logits :math:`z`, the candidates are :math:`v + b` (``score_then_topk``) or
    :math:`z + b` (``topk_then_score``), of which the K best are taken within the best groups. The chosen :math:`S`
    weigh :math:`v_S`, or the scores of :math:`z_S` alone; then normalised and scaled.

    Returns
    -------
    topk_weights : Tensor of shape (num_tokens, top_k), dtype of the logits
        Differentiable in ``router_logits``. An id of ``route_override`` outside ``[0, num_experts)`` weighs 0.
    topk_ids : Tensor of shape (num_tokens, top_k), dtype=int32
        The experts, best candidate first; of equals the lower id.
    """
    # Without bias or groups the order of scores is the order of logits, which no saturation can tie.
    by_score = score_order == "score_then_topk" and (expert_bias is not None or num_groups > 1)
    if route_override is not None:
        topk_ids = route_override.long()
    else:
        candidates = (scores(router_logits, score_function) if by_score else router_logits).detach()
        if expert_bias is not None:
            candidates = candidates + expert_bias
        topk_ids = _best(_nan_last(candidates), top_k, num_groups, topk_groups, group_score, group_mask)

    valid = (topk_ids >= 0) & (topk_ids < router_logits.shape[-1])
    chosen = topk_ids.where(valid, 0)
    if score_order == "score_then_topk":
        weights = scores(router_logits, score_function).gather(-1, chosen).masked_fill(~valid, 0)
    else:
        logits = router_logits.gather(-1, chosen).masked_fill(~valid, -torch.inf)
        weights = scores(logits, score_function).masked_fill(~valid, 0)
    if renormalize:
        weights = renormalize_weights(weights, renormalize_p, renormalize_eps, renormalize_eps_mode)
    return weights * routed_scaling_factor, topk_ids.int()


def scores(router_logits: Tensor, score_function: str) -> Tensor:
    r"""Return the score of every expert.

    Parameters
    ----------
    router_logits : Tensor of shape (..., num_experts), any floating dtype
        The logits :math:`z`.
    score_function : {"softmax", "sigmoid", "sqrtsoftplus"}
        :math:`\mathrm{softmax}(z)`, :math:`\mathrm{sigmoid}(z)`, or :math:`\sqrt{\mathrm{softplus}(z)}`.

    Returns
    -------
    Tensor of shape (..., num_experts), same dtype
        The scores, differentiable.
    """
    if score_function == "softmax":
        return router_logits.softmax(dim=-1)
    return router_logits.sigmoid() if score_function == "sigmoid" else functional.softplus(router_logits).sqrt()


def renormalize_weights(weights: Tensor, p: float, eps: float, eps_mode: str) -> Tensor:
    r"""Return the weights of each token over their :math:`L_p` norm, for p = 1 their sum.

    Parameters
    ----------
    weights : Tensor of shape (..., top_k)
        Not negative.
    p, eps : float
        Of the norm, and what keeps it from zero.
    eps_mode : {"add", "clamp"}
        Whether ``eps`` is added to the norm or is its least value.

    Returns
    -------
    Tensor of shape (..., top_k), same dtype
        The weights, differentiable.
    """
    norm: Tensor = torch.linalg.vector_norm(weights, p, dim=-1, keepdim=True)
    return weights / (norm + eps if eps_mode == "add" else norm.clamp(min=eps))


def _nan_last(values: Tensor) -> Tensor:
    return values.masked_fill(values.isnan(), -torch.inf)


def _best(
    candidates: Tensor, top_k: int, num_groups: int, topk_groups: int, group_score: str, group_mask: str
) -> Tensor:
    """Return the ids of the K best of the best groups, best first; a tie goes to the lower id."""

    def order(values: Tensor) -> Tensor:
        return values.sort(dim=-1, descending=True, stable=True).indices

    grouped = candidates.view(-1, num_groups, candidates.shape[-1] // num_groups)  # [T, groups, experts of a group]
    best_of_group = grouped.sort(dim=-1, descending=True).values
    group_scores = best_of_group[..., : 2 if group_score == "top2_sum" else 1].sum(dim=-1)
    group_scores = _nan_last(group_scores)  # infinity - infinity
    eligible = torch.zeros_like(group_scores, dtype=torch.bool)
    eligible.scatter_(-1, order(group_scores)[..., :topk_groups], True)
    eligible = eligible.repeat_interleave(grouped.shape[-1], dim=-1)  # [T, E]
    if group_mask == "zero":
        return order(candidates.where(eligible, 0))[..., :top_k]

    # Sorting by candidate, then stably by eligibility, keeps an eligible -inf before everything ineligible.
    by_candidate = order(candidates)
    return by_candidate.gather(-1, order(eligible.gather(-1, by_candidate).int()))[..., :top_k]


def plan(topk_ids: Tensor, num_experts: int, capacity: int | None = None) -> Plan:
    """Sort the slots by expert: each takes its own in their order, up to its capacity.

    Slot ``t * K + k`` is choice k of token t. It is dropped where the expert is full, or the id outside
    ``[0, num_experts)``.

    Returns
    -------
    Plan
        Offsets of the experts' rows, and two maps that are inverse; -1 where a row has no slot, or a slot no row.
    """
    slots_of: list[list[int]] = [[] for _ in range(num_experts)]
    for slot, expert in enumerate(topk_ids.flatten().tolist()):
        if 0 <= expert < num_experts and (capacity is None or len(slots_of[expert]) < capacity):
            slots_of[expert].append(slot)

    num_rows = topk_ids.numel()
    offsets, row_to_slot, slot_to_row = [0], [-1] * num_rows, [-1] * num_rows
    for slots in slots_of:
        for row, slot in enumerate(slots, start=offsets[-1]):
            row_to_slot[row], slot_to_row[slot] = slot, row
        offsets.append(offsets[-1] + len(slots))

    def int32(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=topk_ids.device)

    return Plan(int32(offsets), int32(row_to_slot), int32(slot_to_row).view(topk_ids.shape))


def permute(hidden_states: Tensor, plan: Plan) -> Tensor:
    """Put the tokens of one expert side by side.

    Returns
    -------
    Tensor of shape (num_rows, hidden_size), dtype of ``hidden_states``
        ``rows[r] = hidden_states[row_to_slot[r] // K]``; rows without a slot, which are the last, are zero.
    """
    used = int(plan.expert_offsets[-1])
    tokens = plan.row_to_slot[:used] // plan.top_k
    return torch.cat([hidden_states[tokens], hidden_states.new_zeros(plan.num_rows - used, hidden_states.shape[1])])


def grouped_gemm(
    rows: Tensor,  # [R, K]
    weight: Tensor,  # [E, N, K], or [E, K, N] for in_out
    expert_offsets: Tensor,  # [E + 1]
    bias: Tensor | None = None,  # [E, N]
    weight_layout: str = "out_in",
) -> Tensor:
    """Multiply each expert's rows by its own weight.

    Returns
    -------
    Tensor of shape (num_rows, N), dtype of ``rows``
        ``rows[r] @ weight[e].T + bias[e]`` (``weight[e]`` itself for ``in_out``) for the rows of expert e; rows past
        ``expert_offsets[E]`` are zero.
    """
    weight = weight.transpose(1, 2) if weight_layout == "in_out" else weight
    used = int(expert_offsets[-1])
    # Views of all experts at once: their gradient is put together once, not added up expert by expert.
    rows_of = torch.split(rows[:used], expert_offsets.diff().tolist())
    bias_of = [None] * weight.shape[0] if bias is None else bias.unbind()
    outputs = [functional.linear(*arguments) for arguments in zip(rows_of, weight.unbind(), bias_of, strict=True)]
    return torch.cat([*outputs, rows.new_zeros(rows.shape[0] - used, weight.shape[1])])


def activation(
    pre_activation: Tensor,  # [R, 2I], or [R, I] when not gated
    activation: str = "swiglu",
    *,
    gate_layout: str = "concat",
    alpha: float = 1.0,
    limit: float | None = None,
    up_offset: float = 0.0,
) -> Tensor:
    r"""Apply the nonlinearity between the two projections.

    With gate :math:`g` and up :math:`u`, the halves of a row (``concat``) or its even and odd columns
    (``interleaved``): swiglu is :math:`g\,\sigma(\alpha g)\,(u + \mathtt{up\_offset})` after :math:`g` is clamped to at
    most ``limit`` and :math:`u` to at most ``limit`` in magnitude; geglu, geglu_tanh and reglu are
    :math:`\phi(g)\,u`. The others act on the whole row.

    Returns
    -------
    Tensor of shape (num_rows, intermediate_size), same dtype
        Its values.
    """
    if not is_gated(activation):
        return _UNGATED[activation](pre_activation)
    if gate_layout == "concat":
        gate, up = pre_activation.chunk(2, dim=-1)
    else:
        gate, up = pre_activation[..., 0::2], pre_activation[..., 1::2]
    if activation != "swiglu":
        return _UNGATED[_GATE_OF[activation]](gate) * up
    if limit is not None:
        # Not Tensor.clamp: its gradient at the limit itself is 1 up to torch 2.14 and 0 from 2.15. Here it is 1.
        gate = torch.where(gate > limit, limit, gate)
        up = torch.where(up > limit, limit, torch.where(up < -limit, -limit, up))
    return gate * torch.sigmoid(alpha * gate) * (up + up_offset)


_GATE_OF = {"geglu": "gelu", "geglu_tanh": "gelu_tanh", "reglu": "relu"}
_UNGATED: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
    "relu2": lambda x: functional.relu(x).square(),
}


def combine(rows: Tensor, topk_weights: Tensor | None, plan: Plan) -> Tensor:
    """Sum the rows of each token by weight.

    Returns
    -------
    Tensor of shape (num_tokens, hidden_size), dtype of the product
        ``sum_k topk_weights[t, k] * rows[slot_to_row[t, k]]``, dropped slots left out; without weights each is 1.
    """
    padded = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])  # slot_to_row = -1 reads the zero row
    chosen = padded[plan.slot_to_row]  # [T, K, H]
    if topk_weights is not None:
        chosen = chosen * topk_weights.unsqueeze(-1)
    return chosen.sum(dim=1)


def experts(
    hidden_states: Tensor,  # [T, H]
    gate_up_proj: Tensor,  # [E, 2I, H]
    down_proj: Tensor,  # [E, H, I]
    topk_weights: Tensor,  # [T, K]
    plan: Plan,
    gate_up_bias: Tensor | None = None,  # [E, 2I]
    down_bias: Tensor | None = None,  # [E, H]
    *,
    activation: str = "swiglu",
    gate_layout: str = "concat",
    weight_layout: str = "out_in",
    alpha: float = 1.0,
    limit: float | None = None,
    up_offset: float = 0.0,
) -> Tensor:
    """Run each token through its experts: permute, grouped_gemm, activation, grouped_gemm, combine.

    Returns
    -------
    Tensor of shape (num_tokens, hidden_size)
        ``sum_k topk_weights[t, k] * (down[e] @ activation(gate_up[e] @ x[t] + b[e]) + c[e])`` with
        ``e = topk_ids[t, k]``.
    """
    rows = permute(hidden_states, plan)
    rows = grouped_gemm(rows, gate_up_proj, plan.expert_offsets, gate_up_bias, weight_layout)
    rows = _activation(rows, activation, gate_layout=gate_layout, alpha=alpha, limit=limit, up_offset=up_offset)
    rows = grouped_gemm(rows, down_proj, plan.expert_offsets, down_bias, weight_layout)
    return combine(rows, topk_weights, plan)


_activation = activation  # inside experts the name is the option's


def ep_plan(
    topk_ids: Tensor,  # [T, K]
    num_experts: int,
    ep_size: int,
    *,
    ep_rank: int = 0,
    num_local_experts: int | None = None,
    placement: Tensor | None = None,  # [E, N]
    num_chunks: int = 1,
) -> EpPlan:
    """Plan the exchange between ranks: which tokens go where, by chunk, then by rank, each token once per rank.

    A choice goes to physical expert ``e``, or with a placement to one of its replicas, the ``(token + ep_rank)``-th in
    turn; rank ``physical // num_local_experts`` holds it.

    Returns
    -------
    EpPlan
        Where each choice is computed, the rows to send with their maps, and what each rank is told beforehand.
    """
    local = num_local_experts or -(-num_experts // ep_size)
    table = [[e] for e in range(num_experts)] if placement is None else placement.tolist()
    num_tokens, top_k = topk_ids.shape

    def physical(token: int, expert: int) -> int:
        replicas = [p for p in table[expert] if p >= 0] if 0 <= expert < num_experts else []
        p = int(replicas[(token + ep_rank) % len(replicas)]) if replicas else -1
        return p if p < ep_size * local else -1

    ids = [[physical(token, expert) for expert in experts] for token, experts in enumerate(topk_ids.tolist())]
    offsets, slots = [0], [[-1] * ep_size for _ in range(num_tokens)]
    rows: list[int] = []
    counts = [[0] * (2 * num_chunks + local) for _ in range(ep_size)]
    for chunk in range(num_chunks):
        tokens = range(num_tokens * chunk // num_chunks, num_tokens * (chunk + 1) // num_chunks)
        for rank in range(ep_size):
            for token in tokens:
                here = [p % local for p in ids[token] if p >= 0 and p // local == rank]
                if here:
                    slots[token][rank] = len(rows)
                    rows.append(token * ep_size + rank)
                counts[rank][chunk] += bool(here)
                counts[rank][num_chunks + chunk] += len(here)
                for expert in here:
                    counts[rank][2 * num_chunks + expert] += 1
            offsets.append(len(rows))
    rows += [-1] * (num_tokens * min(top_k, ep_size) - len(rows))

    def int32(values: object, *shape: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=topk_ids.device).view(shape)

    return EpPlan(
        int32(ids, num_tokens, top_k),
        int32(offsets, -1),
        int32(rows, -1),
        int32(slots, num_tokens, ep_size),
        int32(counts, ep_size, -1),
    )


def ep_wire(hidden_states: Tensor, wire: str = "input") -> Tensor:
    """Return what arrives of tokens that are sent in a wire type.

    Parameters
    ----------
    hidden_states : Tensor of shape (num_tokens, hidden_size), any floating dtype
        The tokens.
    wire : {"input", "fp8", "int8"}, default="input"
        ``"input"`` sends them as they are. The others send ``round(x / scale)`` as float8_e4m3fn or int8, with one fp32
        scale per token: its largest magnitude over 448 or 127.

    Returns
    -------
    Tensor of shape (num_tokens, hidden_size), same dtype
        ``scale * round(x / scale)``; the scale and the quotient are rounded to fp32.
    """
    if wire == "input":
        return hidden_states
    largest = 448.0 if wire == "fp8" else 127.0
    tokens = hidden_states.float()
    scale = tokens.abs().amax(dim=-1, keepdim=True) / largest
    quotient = (tokens * (1 / scale).where(scale > 0, 0)).clamp(-largest, largest)
    quantised = quotient.to(torch.float8_e4m3fn).float() if wire == "fp8" else quotient.round()
    return (scale * quantised).to(hidden_states.dtype)
