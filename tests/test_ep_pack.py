"""ep_pack: the bytes of a row, quantised tokens, and its errors. What is packed comes back: see test_ep_index."""

import pytest
import torch
from helpers import ALL_DTYPES, randn, weight_dtype

from torch_moe import ops, reference
from torch_moe.ops.ep_pack import WIRES, row_bytes
from torch_moe.testing import SHAPES, routing

T, H, I, E, K = SHAPES["unaligned"]  # noqa: E741
PLAN = ops.ep_plan(routing("uniform", T, E, K), E, 2)


def packed(dtype, wire, device="cpu"):
    tokens = randn(T, H, dtype=dtype, device=device)
    weights = randn(T, K, dtype=weight_dtype(dtype), device=device, seed=1)
    return tokens, weights, ops.ep_pack(tokens, weights, plan_on(device), wire=wire)


def plan_on(device):
    return ops.EpPlan(*(tensor.to(device) for tensor in PLAN))


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_a_row_has_the_bytes_that_are_promised(dtype, wire, device):
    *_, rows = packed(dtype, wire, device)
    assert rows.shape[1] == row_bytes(H, dtype, top_k=K, wire=wire, has_ids=True, has_weights=True)
    assert rows.shape[1] % 16 == 0


@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_a_row_starts_with_its_token(dtype, device):
    tokens, _, rows = packed(dtype, "input", device)
    used = int(PLAN.rank_offsets[-1])
    sent = rows[:used, : H * dtype.itemsize].contiguous().view(dtype)
    assert torch.equal(sent, tokens[PLAN.row_to_slot[:used].to(device).long() // 2])
    assert not rows[used:, : H * dtype.itemsize].any()


def test_without_maps_row_r_is_token_r(device):
    tokens = randn(T, H, device=device)
    rows = torch.ops.moe.ep_pack(tokens, None, None, None, 1, 1)
    assert torch.equal(rows[:, : H * 4].contiguous().view(torch.float32), tokens)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("wire", ["fp8", "int8"])
def test_a_row_that_is_not_finite_stays_so(wire, value, device):
    tokens, weights, _ = packed(torch.float32, wire, device)
    tokens[3, 5] = value
    rows = ops.ep_pack(tokens, weights, plan_on(device), wire=wire)
    got = ops.ep_index(rows, tokens, H, K, E, 0, wire=wire).hidden_states
    used = int(PLAN.rank_offsets[-1])
    bad = (PLAN.row_to_slot[:used] // 2 == 3).to(device)
    assert not got[:used][bad].isfinite().any()
    assert got[:used][~bad].isfinite().all()


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_every_fp8_number_arrives_exactly(scale, device):
    """All 254 finite values in one row whose scale is a power of two."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    codes = codes[codes.isfinite()]
    power = 2.0 ** round(torch.tensor(scale).log2().item())
    tokens = (codes * power).view(1, -1).to(device)
    maps = (torch.ones(1, 1, device=device), IDS[:1, :1].to(device), None)
    rows = torch.ops.moe.ep_pack(tokens, *maps, 1, 1, wire="fp8")
    got = ops.ep_index(rows, tokens, tokens.shape[1], 1, 1, 1, wire="fp8").hidden_states
    assert torch.equal(got, tokens)


def test_rounds_like_torch(device):
    tokens = randn(64, 300, device=device)
    tokens[0] = 0
    maps = (torch.ones(64, 1, device=device), torch.zeros(64, 1, dtype=torch.int32, device=device), None)
    for wire in ("fp8", "int8"):
        rows = torch.ops.moe.ep_pack(tokens, *maps, 1, 1, wire=wire)
        got = ops.ep_index(rows, tokens, 300, 1, 1, 64, wire=wire).hidden_states
        assert torch.equal(got.cpu(), reference.ep_wire(tokens.cpu(), wire)), wire


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_every_device_writes_the_same_bytes(dtype, wire, device):
    assert torch.equal(packed(dtype, wire, device)[-1].cpu(), packed(dtype, wire)[-1])


IDS = torch.zeros(T, K, dtype=torch.int32)


@pytest.mark.parametrize(
    ("arguments", "wire", "message"),
    [
        ((IDS, None, None, None, 1, 1), "input", "ep_pack: hidden_states must be float32.*got int32"),
        ((randn(T, H), randn(T, K).half(), None, None, 1, 1), "input", "ep_pack: topk_weights must be float32"),
        ((randn(T, H), None, IDS, None, 1, 1), "input", "ep_pack: topk_weights must be given with physical_ids"),
        ((randn(T, H), randn(T, K), IDS[1:], None, 1, 1), "input", r"ep_pack: physical_ids must have shape \[19, 3\]"),
        (
            (randn(T, H), None, None, None, 1, 1),
            "fp4",
            "ep_pack: wire must be one of 'input'.*, got 'fp4'",
        ),
    ],
)
def test_errors(arguments, wire, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.moe.ep_pack(*arguments, wire=wire)
