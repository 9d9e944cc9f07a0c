"""Run by tests/test_ep_placement.py, one process per rank: two experts go each way, into another order."""

import copy
import dataclasses

import torch
from rank import run
from torch import distributed

from torch_moe import MoE
from torch_moe.distributed import ExpertParallel, Placement, move_experts
from torch_moe.nn.layer import OPTIONAL_PARTS
from torch_moe.testing import assert_close

H, LATENT, I, E, K, T = 16, 12, 24, 8, 2, 20  # noqa: E741
AFTER = ([7, 4, 1, 2], [6, 0, 5, 3])  # before: 0 to 3 and 4 to 7


def main(rank, world_size, path):
    distributed.init_process_group(
        "gloo", store=distributed.FileStore(path, world_size), rank=rank, world_size=world_size
    )
    torch.manual_seed(0)
    config = MoE(H, I, E, K, num_shared_experts=1).config
    config = dataclasses.replace(
        config,
        experts=MoE(LATENT, I, E, K).config.experts,
        latent_size=LATENT,
        output_bias=True,
        output_norm=True,
    )
    plain = MoE.from_config(config)
    layer = ExpertParallel(copy.deepcopy(plain), distributed.group.WORLD)
    places = [[(AFTER[0] + AFTER[1]).index(expert)] for expert in range(E)]
    moved = move_experts(layer, Placement(torch.tensor(places, dtype=torch.int32), E // world_size))

    for name, parameter in moved.experts.named_parameters():
        assert torch.equal(parameter, plain.experts.get_parameter(name)[AFTER[rank]]), name
    for name in ("router", *OPTIONAL_PARTS):
        assert getattr(moved, name) is getattr(layer, name), name
    assert [name for name, _ in moved.named_parameters()] == [name for name, _ in plain.named_parameters()]
    x = torch.randn(T, H)
    with torch.no_grad():
        assert_close(moved(x), copy.deepcopy(plain).double()(x.double()), H, LATENT, I, K, 2)
    distributed.destroy_process_group()


if __name__ == "__main__":
    run(main)
