"""ExpertParallel where the tests' device is: several processes on one GPU over gloo, and NCCL with one rank.

Without a GPU the processes run on the CPU, for the sake of their own code, and NCCL's tests are skipped.
"""

import pytest
import torch
from helpers import randn
from ranks import needs_distributed, run_ranks

import torch_moe
from torch_moe.distributed import ExpertParallel, Placement, tune_chunks
from torch_moe.testing import assert_close

pytestmark = needs_distributed

H, I, E, K, T = 40, 56, 5, 3, 67  # noqa: E741


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_on_one_device(device, world_size, tmp_path):
    run_ranks("on_device.py", world_size, tmp_path, device.type)


@pytest.fixture
def nccl(gpu):
    if not torch.distributed.is_nccl_available():
        pytest.skip("this torch was built without NCCL")
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("nccl", store=store, rank=0, world_size=1, device_id=gpu)
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


def make_layer(**options):
    torch.manual_seed(0)
    return torch_moe.MoE(H, I, E, K, bias=True, num_shared_experts=1, **options).cuda()


def results(layer, x):
    leaf = x.clone().requires_grad_()
    output = layer(leaf)
    grads = torch.autograd.grad(output.square().sum(), [leaf, *layer.parameters()])
    return [output.detach(), *(grad.to_local() if hasattr(grad, "to_local") else grad for grad in grads)]


def test_nccl_with_one_rank_is_the_plain_layer(nccl):
    x = randn(T, H, device="cuda")
    for a, b in zip(results(ExpertParallel(make_layer(), nccl), x), results(make_layer(), x), strict=True):
        assert torch.equal(a, b)


def test_nccl_exchanges_with_itself(nccl):
    """With a placement one rank also sends: chunks give the same bits, and those are the layer's numbers."""
    x, identity = randn(T, H, device="cuda"), Placement.identity(E, 1)
    expected = [tensor.double() for tensor in results(make_layer().cpu(), x.cpu())]
    first = None
    for options in ({}, {"num_chunks": 3, "check": True}, {"capacity": T}, {"capacity": 2}):
        actual = results(ExpertParallel(make_layer(), nccl, placement=identity, **options), x)
        for a, b in zip(actual, expected, strict=True):
            assert_close(a.cpu(), b, H, E, H, 1, I, K, H, 2 * I, I, E, T)
        first = first or actual
        for a, b in zip(actual, first, strict=True):
            assert torch.equal(a, b)
    for wire in ("fp8", "int8"):
        output = results(ExpertParallel(make_layer(), nccl, placement=identity, wire=wire), x)[0].cpu()
        assert 0 < (output - expected[0]).norm() / expected[0].norm() < {"fp8": 2.0**-4, "int8": 2.0**-6}[wire]


def test_nccl_compiled_and_tuned(nccl):
    layer, x = ExpertParallel(make_layer(), nccl, placement=Placement.identity(E, 1)), randn(T, H, device="cuda")
    expected = layer(x)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), expected)
    assert tune_chunks(layer, x, rounds=2, backward=True) >= 1
    assert torch.equal(layer(x), expected)
