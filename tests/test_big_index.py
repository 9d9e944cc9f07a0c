"""Tensors of more than 2**31 elements: no index overflows. Each test takes 4 to 5 GiB for some seconds."""

import pytest
import torch
from helpers import randn

from torch_moe import ops

NUM_ROWS, WIDTH = 2049, 2**20
assert NUM_ROWS * WIDTH > 2**31


@pytest.fixture
def plan():
    """One token and one expert that it chose for all of its slots: the cheapest way to many rows."""
    return ops.plan(torch.zeros(1, NUM_ROWS, dtype=torch.int32), 1)


def test_permute_and_combine(plan):
    hidden_states = randn(1, WIDTH, dtype=torch.bfloat16)
    rows = ops.permute(hidden_states, plan)
    assert rows.numel() > 2**31
    assert torch.equal(rows[-1], hidden_states[0])
    assert torch.equal(rows[2047], hidden_states[0])  # ends just below 2**31 elements
    rows[-1] *= 3  # so that the last row counts
    weights = torch.zeros(1, NUM_ROWS)
    weights[0, [0, -1]] = 1
    assert torch.equal(ops.combine(rows, weights, plan), hidden_states * 4)


def test_grouped_gemm(plan):
    """rows [R, 1] times weight [1, N, 1]: R * N outputs, one multiplication each."""
    rows, weight = randn(NUM_ROWS, 1, dtype=torch.bfloat16), randn(1, WIDTH, 1, dtype=torch.bfloat16, seed=1)
    output = ops.grouped_gemm(rows, weight, plan.expert_offsets)
    for row in (0, 2047, 2048):
        assert torch.equal(output[row], rows[row] * weight[0, :, 0])


def test_activation():
    """The input is only reserved: what is never written takes no memory, and its rows are not looked at."""
    pre_activation = torch.empty(NUM_ROWS, WIDTH, dtype=torch.bfloat16)
    pre_activation[-1] = randn(WIDTH, dtype=torch.bfloat16)
    output = ops.activation(pre_activation)
    assert torch.equal(output[-1], ops.activation(pre_activation[-1:])[0])
