"""Tensors of more than 2**31 elements: no index overflows. Each test takes up to 6.5 GiB for some seconds."""

import ctypes
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from helpers import randn

from torch_moe import ops
from torch_moe.testing import assert_close

NUM_ROWS, WIDTH = 2049, 2**20
assert NUM_ROWS * WIDTH > 2**31
MEMINFO = Path("/proc/meminfo")
LAST_BELOW = 2047  # the last row whose elements all have an index below 2**31


def available_memory():
    """Bytes; on Linux with the pages of files, which are given up on demand."""
    if MEMINFO.exists():
        return int(re.search(r"MemAvailable: *(\d+) kB", MEMINFO.read_text()).group(1)) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(autouse=True)
def _enough_memory(device):
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
    if free < 7 * 2**30:
        pytest.skip(f"needs 7 GiB of free memory, there are {free / 2**30:.1f}")


@pytest.fixture(scope="module", autouse=True)
def _small_pages():
    """Most of the time is the kernel's: in fragmented memory it takes four times as long to find the pages of 2 MiB.

    The operators ask for those; here a page is touched once.
    """
    libc, thp_disable = ctypes.CDLL(None), 41  # PR_SET_THP_DISABLE of Linux
    if sys.platform == "linux":
        libc.prctl(thp_disable, 1, 0, 0, 0)
    yield
    if sys.platform == "linux":
        libc.prctl(thp_disable, 0, 0, 0, 0)


@pytest.fixture
def plan(device):
    """One token that chose the one expert for all of its slots: the cheapest way to many rows."""
    return ops.plan(torch.zeros(1, NUM_ROWS, dtype=torch.int32, device=device), 1)


@pytest.fixture(scope="module")
def rows_of_all(request):
    """Memory that is only reserved: what is never written takes none, and is zero on a CPU.

    One for all tests, because most of their time is the kernel's, mapping a million pages per tensor that is read.
    """
    on_gpu = request.config.getoption("--device") == "cuda" and torch.cuda.is_available()  # else tests skip
    return torch.empty(NUM_ROWS, WIDTH, dtype=torch.bfloat16, device="cuda" if on_gpu else "cpu")


@pytest.fixture
def reserved_rows(device, rows_of_all):
    """To be written in a few rows; the others' values are not looked at."""
    return rows_of_all


def test_permute(plan, device):
    hidden_states = randn(1, WIDTH, dtype=torch.bfloat16, device=device)
    rows = ops.permute(hidden_states, plan)
    for row in (0, LAST_BELOW, -1):
        assert torch.equal(rows[row], hidden_states[0])


def test_combine(plan, device, reserved_rows):
    rows = reserved_rows
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


def test_activation(device, reserved_rows):
    pre_activation = reserved_rows
    pre_activation[-1] = randn(WIDTH, dtype=torch.bfloat16, device=device)
    output = ops.activation(pre_activation)
    assert torch.equal(output[-1], ops.activation(pre_activation[-1:])[0])


def test_experts(device):
    """R x 2I elements of pre-activation; all rows are one token's, so each slot alone gives the whole result.

    Many rows of few columns: scratch grows with a block of rows, and would take twice the memory of the result.
    """
    num_rows, width = 2**17 + 64, 2**14
    assert num_rows * width > 2**31
    like = {"dtype": torch.bfloat16, "device": device}
    gate_up = randn(1, width, 1, **like, seed=1).abs()  # no cancellation in the long sum
    down = randn(1, 1, width // 2, **like, seed=2).abs() / 2**7
    hidden_states, weights = torch.ones(1, 1, **like), torch.zeros(1, num_rows, device=device)
    weights[0, -1] = 1
    plan = ops.plan(torch.zeros(1, num_rows, dtype=torch.int32, device=device), 1)
    output, pre_activation = torch.ops.moe.experts(hidden_states, gate_up, down, weights, *plan)
    for row in (0, 2**17 - 1, -1):  # the middle one is the last whose elements all have an index below 2**31
        assert torch.equal(pre_activation[row], gate_up[0, :, 0])
    one_slot = ops.plan(torch.zeros(1, 1, dtype=torch.int32, device=device), 1)
    alone = ops.experts(hidden_states, gate_up, down, weights[:, -1:], one_slot)  # by another kernel: one row
    assert_close(output, alone.double(), width // 2)


def test_combine_backward(plan, device, reserved_rows):
    rows, grad = reserved_rows, randn(1, WIDTH, dtype=torch.bfloat16, device=device)
    rows[-1] = 1 / WIDTH
    weights = torch.arange(NUM_ROWS, dtype=torch.float32, device=device)[None]
    grad_rows, grad_weights = torch.ops.moe.combine_backward(grad, rows, weights, *plan)
    for row in (0, LAST_BELOW, -1):
        assert torch.equal(grad_rows[row], (grad[0] * weights[0, row]).bfloat16())
    assert_close(grad_weights[0, -1:], grad.double().mean()[None], WIDTH)


def test_activation_backward(device, reserved_rows):
    pre_activation, grad = reserved_rows, randn(1, WIDTH // 2, dtype=torch.bfloat16, device=device)
    pre_activation[-1] = randn(WIDTH, dtype=torch.bfloat16, device=device)
    options = {"gate_layout": "concat", "alpha": 1.0, "limit": None, "up_offset": 0.0}
    gradient = torch.ops.moe.activation_backward
    output = gradient(grad.expand(NUM_ROWS, -1), pre_activation, "swiglu", **options)
    assert torch.equal(output[-1], gradient(grad, pre_activation[-1:], "swiglu", **options)[0])


def test_experts_backward(plan, device, reserved_rows):
    """The gradient of the tokens from that of R x 2I elements of pre-activation; one slot alone has a weight."""
    like = {"dtype": torch.bfloat16, "device": device}
    weights = torch.zeros(1, NUM_ROWS, device=device)
    weights[0, -1] = 1
    pre_activation = reserved_rows
    pre_activation[-1] = randn(WIDTH, **like).abs()  # no cancellation in the long sum
    down, gate_up = (randn(*size, **like, seed=1).abs() / 2**10 for size in ((1, 1, WIDTH // 2), (1, WIDTH, 1)))
    ones = torch.ones(1, 1, **like)
    options = {"activation": "reglu", "gate_layout": "concat", "alpha": 1.0, "limit": None, "up_offset": 0.0}
    options |= {"weight_layout": "out_in", "row_invariant": False, "needs_projections": False, "needs_biases": False}

    def gradients(pre_activation, weights, plan):
        return torch.ops.moe.experts_backward(
            ones, ones, pre_activation, gate_up, down, weights, *plan, None, None, **options,
            needs_hidden_states=True, needs_topk_weights=True,
        )  # fmt: skip

    actual = gradients(pre_activation, weights, plan)
    one_slot = ops.plan(torch.zeros(1, 1, dtype=torch.int32, device=device), 1)
    expected = gradients(pre_activation[-1:], weights[:, -1:], one_slot)
    assert_close(actual[0], expected[0].double(), WIDTH, WIDTH)  # by another kernel: one row
    assert_close(actual[3][:, -1:], expected[3].double(), WIDTH, WIDTH)


def test_weights(device):
    """Weights of more than 2**31 elements, of which the last expert is chosen: those of large models have as many."""
    size, experts = 1024, 2049
    like = {"dtype": torch.bfloat16, "device": device}
    weight = torch.empty(experts, size, size, **like)
    weight[-1] = randn(size, size, **like, seed=1) / size**0.5
    plan = ops.plan(torch.full((3, 1), experts - 1, dtype=torch.int32, device=device), experts)
    alone = ops.plan(torch.zeros(3, 1, dtype=torch.int32, device=device), 1)
    rows, ones = randn(3, size, **like), torch.ones(3, 1, device=device)
    for layout in ("out_in", "in_out"):
        output = ops.grouped_gemm(rows, weight, plan.expert_offsets, weight_layout=layout)
        assert torch.equal(output, ops.grouped_gemm(rows, weight[-1:], alone.expert_offsets, weight_layout=layout))
        options = {"activation": "gelu", "weight_layout": layout}
        output = ops.experts(rows, weight, weight, ones, plan, **options)
        assert torch.equal(output, ops.experts(rows, weight[-1:], weight[-1:], ones, alone, **options))
    gradient = torch.ops.moe.grouped_gemm_wgrad(rows, rows, plan.expert_offsets)
    assert torch.equal(gradient[-1:], torch.ops.moe.grouped_gemm_wgrad(rows, rows, alone.expert_offsets))
    assert not gradient[LAST_BELOW].any()


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
