"""Run by tests/test_ep_device.py, one process per rank, all on one device: what the layer on the CPU gives."""

import torch
from expert_parallel import E, K, inputs, make_layer, results, steps
from rank import run
from torch import distributed

from torch_moe.distributed import ExpertParallel, Placement
from torch_moe.testing import assert_close

COUNTS = (40, 7, 0, 33)
OPTIONS = {"bias": True, "num_shared_experts": 1}


def placement(world_size):
    """Every expert on two ranks."""
    local = -(-2 * E // world_size)
    table = torch.empty(E, 2, dtype=torch.int32)
    for expert in range(E):
        for replica in range(2):
            turn = expert + replica * E
            table[expert, replica] = turn % world_size * local + turn // world_size
    return Placement(table, local)


def main(rank, world_size, path, device):
    backend = "cpu:gloo,cuda:gloo" if device == "cuda" else "gloo"
    distributed.init_process_group(backend, init_method=f"file://{path}", rank=rank, world_size=world_size)
    counts = COUNTS[:world_size]
    tokens, grads, own = inputs(rank, world_size, counts=counts)
    ids = make_layer(**OPTIONS).router(tokens).topk_ids
    expected = results(make_layer(**OPTIONS).double(), tokens.double(), grads.double(), ids)
    cases = {
        "serial": {},
        "chunks": {"num_chunks": 3, "check": True},
        "capacity": {"capacity": 64},
        "too small a capacity": {"capacity": 2, "num_chunks": 2},
        "replicas": {"placement": placement(world_size), "num_chunks": 2},
    }
    first = None
    for case, options in cases.items():
        layer = ExpertParallel(make_layer(**OPTIONS).to(device), distributed.group.WORLD, **options)
        actual = results(layer, tokens[own].to(device), grads[own].to(device), ids[own].to(device))
        assert all(value.device.type == device for value in actual.values())
        for name, value in actual.items():
            if case == "replicas" and name.startswith("experts."):
                total = torch.zeros_like(expected[name], dtype=value.dtype, device=device)
                for place, expert in enumerate(layer.experts.experts):
                    total[expert] += value[place]
                value, wanted = total, expected[name]
                distributed.all_reduce(value)
            elif name.startswith("experts."):
                wanted = expected[name][layer.experts.experts]
            elif name in ("output", "tokens"):
                wanted = expected[name][own]
            else:
                distributed.all_reduce(value)
                wanted = expected[name]
            # The tolerance is relative to the largest number of all ranks.
            scale = expected[name].abs().max().view(1)
            try:
                assert_close(
                    torch.cat([value.cpu().flatten(), scale.float()]),
                    torch.cat([wanted.flatten(), scale.float().double()]),
                    *steps(name, sum(counts), world_size),
                )
            except AssertionError as error:
                raise AssertionError(f"{case}: {name}: {error}") from None
        if case != "replicas":
            first = first or actual
            same = [name for name in actual if name.startswith("experts.") or name in ("output", "tokens")]
            assert all(torch.equal(actual[name], first[name]) for name in same), case
    quantised = ExpertParallel(make_layer(**OPTIONS).to(device), distributed.group.WORLD, wire="int8")
    output = results(quantised, tokens[own].to(device), grads[own].to(device), ids[own].to(device))["output"].cpu()
    change = (output - expected["output"][own]).norm()
    assert change <= 2.0**-6 * expected["output"].norm()
    assert change > 0 or counts[rank] == 0
    assert ids.shape[1] == K
    distributed.destroy_process_group()


if __name__ == "__main__":
    run(main)
