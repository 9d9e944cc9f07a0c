"""ep_experts: what arrived is computed, chunk by chunk, and summed where it came from; and its gradient.

::

    forward    ep_dispatch, [rows, by chunk] => index -> experts -> [partial sums, by chunk] => sum
    backward   gather -> [gradients, by chunk] => gradients of rows -> [those, by chunk] => sum
                                                  gradients of parameters, of all chunks at once

[..] is an exchange, => a wait for the next chunk only: while one chunk is computed, the others travel. The bits do not
depend on the number of chunks: a row's result does not depend on the other rows, a token's rows are summed in the order
of the ranks, and the gradients of the parameters are computed once, over all rows in the order (rank, token).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_moe.distributed import exchange
from torch_moe.distributed.dispatch import packed_bytes, start_chunks
from torch_moe.ops._common import (
    Context,
    Options,
    check_rank,
    empty_gradient,
    refuse_double_backward,
    register_autograd,
    register_fake,
)

# Up to here every kernel that is chosen by the number of rows is that for few: in parts as in the whole.
_FEW_ROWS = 4
_SAVED = 6  # tensors kept per chunk: hidden_states, topk_weights, the three of the plan, the pre-activation


def _experts(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    topk_weights: Tensor,
    rank_offsets: Tensor,
    row_to_slot: Tensor,
    slot_to_row: Tensor,
    physical_ids: Tensor,
    received_counts: Tensor,
    received: list[Tensor],
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    group_name: str,
    num_local_experts: int,
    wire: str = "input",
    check: bool = False,
    capacity: int = 0,
    save: bool = True,
    recompute: bool = False,
    **options: Options,
) -> tuple[Tensor, list[Tensor]]:
    """Compute what arrived, chunk by chunk, and sum what comes back.

    With a capacity everything is computed first; where one rank had more rows than that for another, all do it again,
    exactly.
    """
    ranks, top_k = slot_to_row.shape[1], topk_weights.shape[1]

    def compute(known: exchange.Counts | exchange.Blocks, received: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        row_invariant = not known.few_rows(_FEW_ROWS)
        returned, saved = [], []
        for chunk, rows in enumerate(received):
            index = torch.ops.moe.ep_index(
                exchange.wait(rows),
                hidden_states,
                hidden_states.shape[1],
                top_k,
                gate_up_proj.shape[0],
                known.pairs(chunk),
                wire=wire,
            )
            tokens, weights, *plan = index
            sums, pre_activation = torch.ops.moe.experts(
                tokens,
                gate_up_proj,
                down_proj,
                weights,
                *plan,
                gate_up_bias,
                down_bias,
                row_invariant=row_invariant,
                save_pre_activation=save and not recompute,
                **options,
            )
            returned.append(exchange.start(sums, known.receive(chunk), known.send(chunk), group_name, check=check))
            if save:
                saved += [*index, pre_activation]
        sums = _joined([exchange.wait(rows) for rows in returned])
        sums, slots = known.returned(sums, rank_offsets, row_to_slot)
        return torch.ops.moe.combine(sums, None, rank_offsets, slots, slot_to_row), saved

    if capacity == 0:
        return compute(exchange.Counts(rank_offsets, received_counts), received)
    received_counts = exchange.wait(received_counts)
    size = packed_bytes(hidden_states, top_k, wire)
    refused = (received_counts[:, -1] > capacity) | (received_counts[:, -2] != size)
    is_refused = exchange.read_later(refused.any())
    num_chunks = len(received)
    output, saved = compute(exchange.Blocks(num_chunks, ranks, capacity, min(top_k, num_local_experts)), received)
    block = capacity
    if is_refused():
        known, block = exchange.Counts(rank_offsets, received_counts[:, :-1]), 0
        known.check(size, top_k)
        rows = torch.ops.moe.ep_pack(
            hidden_states, topk_weights, physical_ids, row_to_slot, ranks, num_local_experts, wire=wire
        )
        output, saved = compute(known, start_chunks(rows, known, group_name, check=check))
    # The backward has to know which it was.
    return output, [*saved, rank_offsets.new_zeros(block)] if save else saved


def _joined(chunks: list[Tensor]) -> Tensor:
    return chunks[0] if len(chunks) == 1 else torch.cat(chunks)


@register_fake("ep_experts")
def _(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    topk_weights: Tensor,
    rank_offsets: Tensor,
    row_to_slot: Tensor,
    slot_to_row: Tensor,
    physical_ids: Tensor,
    received_counts: Tensor,
    received: list[Tensor],
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    weight_layout: str,
    capacity: int = 0,
    save: bool = True,
    recompute: bool = False,
    **options: Options,
) -> tuple[Tensor, list[Tensor]]:
    check_rank("ep_experts", "hidden_states", hidden_states, 2)
    context = torch.library.get_ctx()
    saved = []
    for _ in received if save else ():
        pairs, num_rows = context.new_dynamic_size(), context.new_dynamic_size()
        width = gate_up_proj.shape[1 if weight_layout == "out_in" else 2]
        saved += [
            hidden_states.new_empty((num_rows, hidden_states.shape[1])),
            topk_weights.new_empty((num_rows, topk_weights.shape[1])),
            rank_offsets.new_empty((gate_up_proj.shape[0] + 1,)),
            rank_offsets.new_empty((pairs,)),
            rank_offsets.new_empty((num_rows, topk_weights.shape[1])),
            hidden_states.new_empty((0 if recompute else pairs, width)),
        ]
    if save and capacity > 0:
        saved.append(rank_offsets.new_empty((context.new_dynamic_size(),)))
    return hidden_states.new_empty(hidden_states.shape), saved


def _experts_backward(
    grad_output: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    rank_offsets: Tensor,
    row_to_slot: Tensor,
    slot_to_row: Tensor,
    physical_ids: Tensor,
    received_counts: Tensor,
    saved: list[Tensor],
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    *,
    group_name: str,
    num_local_experts: int,
    needs_projections: bool,
    needs_biases: bool,
    check: bool = False,
    **options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Send gradients of the outputs along the plan, and what they make of tokens and weights back."""
    num_chunks, ranks, hidden_size = len(saved) // _SAVED, slot_to_row.shape[1], grad_output.shape[1]
    chunks = [saved[first : first + _SAVED] for first in range(0, num_chunks * _SAVED, _SAVED)]
    has_capacity = len(saved) > num_chunks * _SAVED
    known: exchange.Counts | exchange.Blocks
    if has_capacity and saved[-1].shape[0] > 0:
        block = saved[-1].shape[0]
        known = exchange.Blocks(num_chunks, ranks, block, chunks[0][3].shape[0] // (ranks * block))
    else:
        known = exchange.Counts(rank_offsets, received_counts[:, :-1] if has_capacity else received_counts)
    options["row_invariant"] = not known.few_rows(_FEW_ROWS)
    if isinstance(known, exchange.Counts):
        rows = torch.ops.moe.permute(grad_output, rank_offsets, row_to_slot[: known.rows_sent], slot_to_row)
    elif len(grad_output) > 0:  # a row that is not filled takes any gradient: no expert reads it
        rows = grad_output[(known.slots(rank_offsets, row_to_slot) // ranks).clamp(min=0)]
    else:
        rows = grad_output.new_zeros(known.rows_sent, hidden_size)
    arriving = start_chunks(rows, known, group_name, check=check)
    # With several chunks the rows are put together once, for which a rank without experts has no use.
    at_once = len(chunks) == 1 or gate_up_proj.shape[0] == 0
    returned, grads = [], []
    for chunk, (tokens, weights, *plan, pre_activation) in enumerate(chunks):
        grads.append(exchange.wait(arriving[chunk]))
        results = torch.ops.moe.experts_backward(
            grads[-1],
            tokens,
            pre_activation,
            gate_up_proj,
            down_proj,
            weights,
            *plan,
            gate_up_bias,
            down_bias,
            needs_hidden_states=True,
            needs_projections=needs_projections and at_once,
            needs_topk_weights=True,
            needs_biases=needs_biases and at_once,
            **options,
        )
        packed = torch.ops.moe.ep_pack(results[0], results[3], None, None, 1, 1)
        returned.append(exchange.start(packed, known.receive(chunk), known.send(chunk), group_name, check=check))
    if not at_once and (needs_projections or needs_biases):
        results = _parameter_gradients(
            known,
            chunks,
            grads,
            (gate_up_proj, down_proj),
            (gate_up_bias, down_bias),
            needs_projections=needs_projections,
            needs_biases=needs_biases,
            **options,
        )
    packed = known.returned(_joined([exchange.wait(rows) for rows in returned]), rank_offsets, row_to_slot)[0]
    grad_hidden, grad_weights = torch.ops.moe.ep_reduce(
        packed, grad_output, slot_to_row, physical_ids, hidden_size, num_local_experts
    )
    return grad_hidden, results[1], results[2], grad_weights, results[4], results[5]


def _parameter_gradients(
    known: exchange.Counts | exchange.Blocks,
    chunks: list[list[Tensor]],
    grads: list[Tensor],
    projections: tuple[Tensor, Tensor],
    biases: tuple[Tensor | None, Tensor | None],
    **options: Options,
) -> tuple[Tensor, ...]:
    """Return what one chunk with all rows would give: rows of all chunks in the order (rank, token)."""
    splits = [known.receive(chunk) for chunk in range(len(chunks))]

    def in_order(tensors: list[Tensor]) -> Tensor:
        blocks = [torch.split(tensor, sizes) for tensor, sizes in zip(tensors, splits, strict=True)]
        return torch.cat([block for of_rank in zip(*blocks, strict=True) for block in of_rank])

    ids, rows, first = [], [], 0
    for _, _, offsets, row_to_slot, slot_to_row, _ in chunks:
        expert = torch.bucketize(slot_to_row, offsets[1:], right=True, out_int32=True)
        ids.append(expert.where(slot_to_row >= 0, -1))
        rows.append(slot_to_row.where(slot_to_row < 0, slot_to_row + first))
        first += row_to_slot.shape[0]
    offsets, row_to_slot, slot_to_row = torch.ops.moe.plan(in_order(ids), projections[0].shape[0])
    row_to_slot = row_to_slot[:first]
    pre_activation = torch.cat([chunk[-1] for chunk in chunks])
    if pre_activation.shape[0] > 0:
        pre_activation = pre_activation[in_order(rows).flatten()[row_to_slot]]
    results: tuple[Tensor, ...] = torch.ops.moe.experts_backward(
        in_order(grads),
        in_order([chunk[0] for chunk in chunks]),
        pre_activation,
        *projections,
        in_order([chunk[1] for chunk in chunks]),
        offsets,
        row_to_slot,
        slot_to_row,
        *biases,
        needs_hidden_states=False,
        needs_topk_weights=False,
        **options,
    )
    return results


@register_fake("ep_experts_backward")
def _(
    grad_output: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    rank_offsets: Tensor,
    row_to_slot: Tensor,
    slot_to_row: Tensor,
    physical_ids: Tensor,
    received_counts: Tensor,
    saved: list[Tensor],
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    *,
    needs_projections: bool,
    needs_biases: bool,
    **options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    weight = torch.promote_types(grad_output.dtype, torch.float32)
    return (
        grad_output.new_empty(grad_output.shape),
        empty_gradient(grad_output, gate_up_proj, needs_projections),
        empty_gradient(grad_output, down_proj, needs_projections),
        grad_output.new_empty(physical_ids.shape, dtype=weight),
        empty_gradient(grad_output, gate_up_bias, needs_biases),
        empty_gradient(grad_output, down_bias, needs_biases),
    )


def _setup_context(
    ctx: Context, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: tuple[Tensor, list[Tensor]]
) -> None:
    _, gate_up, down, _, *maps, received, gate_up_bias, down_bias = (*inputs, None, None)[:12]
    # The dispatcher leaves out trailing arguments that equal their defaults, biases of None.
    ctx.num_inputs = 10 if down_bias is None and gate_up_bias is None else 11 if down_bias is None else 12
    ctx.num_chunks = len(received)
    ctx.save_for_backward(gate_up, down, gate_up_bias, down_bias, *maps, *output[1])
    ctx.options = {
        name: value
        for name, value in keyword_only_inputs.items()
        if name not in ("wire", "capacity", "save", "recompute")
    }


def _backward(ctx: Context, grad_output: Tensor, _: list[Tensor | None]) -> tuple[Any, ...]:
    gate_up, down, gate_up_bias, down_bias, *tensors = ctx.saved_tensors
    maps, saved = tensors[:5], tensors[5:]
    needs = (*ctx.needs_input_grad, False, False)[:12]
    grads = torch.ops.moe.ep_experts_backward(
        grad_output,
        gate_up,
        down,
        *maps,
        saved,
        gate_up_bias,
        down_bias,
        needs_projections=needs[1] or needs[2],
        needs_biases=needs[10] or needs[11],
        **ctx.options,
    )
    hidden, gate_up, down, weights, bias1, bias2 = (
        grad if need else None for grad, need in zip(grads, (*needs[:4], *needs[10:]), strict=True)
    )
    every = (hidden, gate_up, down, weights, *[None] * 5, [None] * ctx.num_chunks, bias1, bias2)
    return every[: ctx.num_inputs]


torch.library.impl("moe::ep_experts", "CompositeExplicitAutograd")(_experts)
torch.library.impl("moe::ep_experts_backward", "CompositeExplicitAutograd")(_experts_backward)
register_autograd("ep_experts", _backward, setup_context=_setup_context)
refuse_double_backward("ep_experts_backward")
