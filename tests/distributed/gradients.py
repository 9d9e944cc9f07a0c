"""Run by tests/test_ep_gradients.py, one process per rank: norms and means over several meshes."""

import torch
from rank import run
from torch import distributed, nn
from torch.distributed import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from torch_moe.distributed import average_gradients, clip_grad_norm_


def main(rank, world_size, path):
    distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world_size)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "ep"))
    torch.manual_seed(0)
    whole = [torch.randn(5, 3), torch.randn(6, 2), torch.randn(7)]  # five experts on two ranks: uneven
    for norm_type in (2.0, 1.0, float("inf")):
        for max_norm in (0.5, 1e6):
            parameters = [
                nn.Parameter(distribute_tensor(whole[0], mesh["ep"], [Shard(0)])),
                nn.Parameter(distribute_tensor(whole[1], mesh, [Shard(0), Shard(1)])),
                nn.Parameter(whole[2].clone()),
            ]
            plain = [nn.Parameter(tensor.clone()) for tensor in whole]
            for one, other, tensor in zip(parameters, plain, whole, strict=True):
                one.grad, other.grad = one.detach().clone().mul_(3), 3 * tensor
            expected = nn.utils.clip_grad_norm_(plain, max_norm, norm_type)
            total = clip_grad_norm_(iter(parameters), max_norm, norm_type)
            torch.testing.assert_close(total, expected)
            for one, other in zip(parameters, plain, strict=True):
                grad = one.grad.full_tensor() if hasattr(one.grad, "full_tensor") else one.grad
                torch.testing.assert_close(grad, other.grad)

    model = nn.Module()
    model.dense, model.unused = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2))
    model.experts = nn.Parameter(distribute_tensor(torch.zeros(8, 3), mesh["ep"], [Shard(0)]))
    model.dense.grad = torch.full((3,), float(rank))
    model.experts.grad = distribute_tensor(torch.arange(24.0).view(8, 3), mesh["ep"], [Shard(0)])
    if rank == 0:
        model.unused.grad = torch.ones(2)
    average_gradients(model)
    assert torch.equal(model.dense.grad, torch.full((3,), 1.5))
    assert torch.equal(model.unused.grad, torch.full((2,), 0.25))
    assert torch.equal(model.experts.grad.full_tensor(), torch.arange(24.0).view(8, 3) / 4)
    distributed.destroy_process_group()


if __name__ == "__main__":
    run(main)
