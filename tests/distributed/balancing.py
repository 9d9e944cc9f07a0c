"""Run by tests/test_balancing_ranks.py, one process per rank: each rank sees other tokens, all get one result."""

import torch
from rank import run
from torch import distributed

from torch_moe import BiasBalancer, MoE, Observation, RoutingStats
from torch_moe.losses import GlobalLoad

EXPERTS = 4


def main(rank, world_size, path):
    distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world_size)
    ids = torch.full((6, 1), rank)  # rank 0 floods expert 0, rank 1 expert 1
    expected = torch.tensor([6, 6, 0, 0])

    assert torch.equal(GlobalLoad(EXPERTS)(ids), expected)
    stats = RoutingStats(EXPERTS)
    stats.observe(Observation(ids))
    stats.sum_over_ranks()
    assert torch.equal(stats.tokens_per_expert(0), expected)

    for method in ("sign", "proportional", "pid", "quantile"):
        balancer, bias = BiasBalancer(EXPERTS, method=method, rate=0.1), torch.zeros(EXPERTS)
        logits = torch.nn.functional.one_hot(ids[:, 0], EXPERTS).float() + torch.linspace(0, 0.1, EXPERTS)
        balancer.observe(Observation(ids, router_logits=logits, expert_bias=bias))
        balancer.step([bias])
        biases = [torch.empty_like(bias) for _ in range(world_size)]
        distributed.all_gather(biases, bias)
        assert torch.equal(biases[0], biases[1]), method
        assert (bias[:2] < bias[2:].min()).all(), method

    # One group for each rank: nothing is shared.
    alone = [distributed.new_group([other]) for other in range(world_size)][rank]
    balancer, bias = BiasBalancer(EXPERTS, rate=0.1, process_group=alone, center=False), torch.zeros(EXPERTS)
    balancer.add(torch.nn.functional.one_hot(torch.tensor(rank), EXPERTS) * 6)
    balancer.step([bias])
    assert bias.argmin() == rank
    assert (bias > 0).sum() == EXPERTS - 1

    # DistributedDataParallel broadcasts the buffers of rank 0 before each forward: the counts stay each rank's.
    torch.manual_seed(0)
    layer = MoE(8, 8, EXPERTS, 2, expert_bias=True)
    balancer = BiasBalancer.attach(layer, rate=0.1)
    parallel = torch.nn.parallel.DistributedDataParallel(layer)
    own = torch.zeros(EXPERTS, dtype=torch.int64)
    for micro in range(2):
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(10 * rank + micro))
        parallel(x).sum().backward()
        own += layer(x, return_routing=True)[1].tokens_per_expert
    assert torch.equal(balancer.state_dict()["tokens_per_expert"][0], 2 * own)
    distributed.all_reduce(own)
    balancer.step()
    wanted = 0.1 * (own.float().mean() - own).sign()
    torch.testing.assert_close(layer.router.expert_bias, wanted - wanted.mean())
    distributed.destroy_process_group()


if __name__ == "__main__":
    run(main)
