"""Tensors of more than 2**31 elements: no index overflows. Each test takes up to 6.5 GiB for some seconds."""

import os

import pytest
import torch
from helpers import randn

from torch_moe import ops
from torch_moe.testing import assert_close

NUM_ROWS, WIDTH = 2049, 2**20
assert NUM_ROWS * WIDTH > 2**31
LAST_BELOW = 2047  # the last row whose elements all have an index below 2**31


@pytest.fixture(autouse=True)
def _enough_memory(device):
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if free < 7 * 2**30:
        pytest.skip(f"needs 7 GiB of free memory, there are {free / 2**30:.1f}")


@pytest.fixture
def plan(device):
    """One token that chose the one expert for all of its slots: the cheapest way to many rows."""
    return ops.plan(torch.zeros(1, NUM_ROWS, dtype=torch.int32, device=device), 1)


def reserved_rows(device):
    """Memory that is only reserved: what is never written takes none, and its values are not looked at."""
    return torch.empty(NUM_ROWS, WIDTH, dtype=torch.bfloat16, device=device)


def test_permute(plan, device):
    hidden_states = randn(1, WIDTH, dtype=torch.bfloat16, device=device)
    rows = ops.permute(hidden_states, plan)
    for row in (0, LAST_BELOW, -1):
        assert torch.equal(rows[row], hidden_states[0])


def test_combine(plan, device):
    rows = reserved_rows(device)
    rows[LAST_BELOW], rows[-1] = 1, 2
    slot_to_row = torch.full_like(plan.slot_to_row, -1)
    slot_to_row[0, :2] = torch.tensor([LAST_BELOW, NUM_ROWS - 1], device=device)
    assert (ops.combine(rows, None, plan._replace(slot_to_row=slot_to_row)) == 3).all()


def test_grouped_gemm(plan, device):
    """rows [R, 1] times weight [1, N, 1]: R * N outputs, one multiplication each."""
    like = {"dtype": torch.bfloat16, "device": device}
    rows, weight = randn(NUM_ROWS, 1, **like), randn(1, WIDTH, 1, **like, seed=1)
    output = ops.grouped_gemm(rows, weight, plan.expert_offsets)
    for row in (0, LAST_BELOW, -1):
        assert torch.equal(output[row], rows[row] * weight[0, :, 0])


def test_activation(device):
    pre_activation = reserved_rows(device)
    pre_activation[-1] = randn(WIDTH, dtype=torch.bfloat16, device=device)
    output = ops.activation(pre_activation)
    assert torch.equal(output[-1], ops.activation(pre_activation[-1:])[0])


def test_experts(plan, device):
    """R x 2I elements of pre-activation; all rows are one token's, so each slot alone gives the whole result."""
    like = {"dtype": torch.bfloat16, "device": device}
    gate_up = randn(1, WIDTH, 1, **like, seed=1).abs()  # no cancellation in the long sum
    down = randn(1, 1, WIDTH // 2, **like, seed=2).abs() / 2**10
    hidden_states, weights = torch.ones(1, 1, **like), torch.zeros(1, NUM_ROWS, device=device)
    weights[0, -1] = 1
    output, pre_activation = torch.ops.moe.experts(hidden_states, gate_up, down, weights, *plan)
    for row in (0, LAST_BELOW, -1):
        assert torch.equal(pre_activation[row], gate_up[0, :, 0])
    one_slot = ops.plan(torch.zeros(1, 1, dtype=torch.int32, device=device), 1)
    alone = ops.experts(hidden_states, gate_up, down, weights[:, -1:], one_slot)  # by another kernel: one row
    assert_close(output, alone.double(), WIDTH // 2)


def test_ep_pack_and_reduce(device):
    """Rows of more than 2**31 bytes and elements between ranks."""
    like = {"dtype": torch.bfloat16, "device": device}
    hidden_states = randn(1, WIDTH, **like)
    row_to_slot = torch.full((NUM_ROWS,), -1, dtype=torch.int32, device=device)
    row_to_slot[-1] = 0
    rows = torch.ops.moe.ep_pack(hidden_states, None, None, row_to_slot, 1, 1)
    assert torch.equal(rows[-1].view(torch.bfloat16), hidden_states[0])
    slot_to_row = torch.tensor([[NUM_ROWS - 1]], dtype=torch.int32, device=device)
    assert torch.equal(torch.ops.moe.ep_reduce(rows, hidden_states, slot_to_row, None, WIDTH, 1)[0], hidden_states)
