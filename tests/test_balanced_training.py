"""A small training end to end: eight clusters with a linear map each, and a router that starts out loving two experts.

Without balancing the same two experts take nearly everything for good; a balancer or a loss evens the load, and brings
back what had died. Nothing is claimed about the task's loss.
"""

from functools import cache

import pytest
import torch

from torch_moe import BiasBalancer, MoE, RoutingStats
from torch_moe.losses import GlobalLoad, load_balancing_loss

HIDDEN, EXPERTS, TOP_K, TOKENS = 16, 8, 2, 256
ARMS = {
    "sign": {"method": "sign", "rate": 0.01},
    "proportional": {"method": "proportional", "rate": 0.02},
    "pid": {"method": "pid", "rate": 0.02},
    "quantile": {"method": "quantile"},
}


class Run:
    """One layer in training; ``advance`` returns the metrics of its last steps, where one batch's luck averages out."""

    def __init__(self, seed=0):
        self.generator = torch.Generator().manual_seed(seed)
        self.centers = torch.randn(8, HIDDEN, generator=self.generator) + 1
        self.maps = torch.randn(8, HIDDEN, HIDDEN, generator=self.generator) / 4
        torch.manual_seed(seed)
        options = {"activation": "relu", "score_function": "sigmoid", "expert_bias": True}
        self.layer = MoE(HIDDEN, 16, EXPERTS, TOP_K, **options)
        with torch.no_grad():
            self.layer.router.weight.mul_(0.01)
            self.layer.router.weight[:2] += 0.05
            self.layer.router.weight[7] -= 0.05
        self.optimizer = torch.optim.Adam(self.layer.parameters(), lr=0.01)
        self.stats, self.load = RoutingStats.attach(self.layer), GlobalLoad(EXPERTS)

    def batch(self):
        cluster = torch.randint(0, 8, (TOKENS,), generator=self.generator)
        x = self.centers[cluster] + 0.1 * torch.randn(TOKENS, HIDDEN, generator=self.generator)
        return x, (x.unsqueeze(1) @ self.maps[cluster]).squeeze(1)

    def advance(self, steps, balancer=None, aux_loss_coef=0.0, micro_batches=1):
        for step in range(steps):
            if step == steps - 20:
                self.stats.reset()
            self.load.reset()
            x, y = self.batch()
            for part, target in zip(x.chunk(micro_batches), y.chunk(micro_batches), strict=True):
                output, routing = self.layer(part, return_routing=True)
                load = self.load(routing.topk_ids)
                balance = load_balancing_loss(routing.router_logits, tokens_per_expert=load, score_function="sigmoid")
                loss = (output - target).square().mean() + aux_loss_coef * balance
                (loss / micro_batches).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            if balancer is not None:
                balancer.step()
        return {name: value.item() for name, value in self.stats.metrics().items()}


pytestmark = pytest.mark.usefixtures("one_thread")


@cache
def unbalanced():
    run = Run()
    return run, run.advance(100)


def test_without_balancing_experts_die():
    metrics = unbalanced()[1]
    assert metrics["max_vio"] > 2
    assert metrics["dead"] >= 3 / EXPERTS


@pytest.mark.parametrize("options", ARMS.values(), ids=ARMS)
def test_with_a_balancer_the_load_is_even(options):
    run = Run()
    metrics = run.advance(100, BiasBalancer.attach(run.layer, **options), micro_batches=2)
    assert metrics["max_vio"] < 0.5
    assert metrics["cold"] == 0
    assert metrics["max_vio"] < unbalanced()[1]["max_vio"] / 4


def test_with_the_global_loss_the_load_is_even():
    run = Run()
    metrics = run.advance(150, aux_loss_coef=0.1, micro_batches=2)
    assert metrics["max_vio"] < 1
    assert metrics["cold"] == 0


def test_a_dead_expert_comes_back():
    """The unbalanced run goes on with a balancer."""
    run, before = unbalanced()
    assert before["dead"] > 0
    metrics = run.advance(100, BiasBalancer.attach(run.layer, rate=0.02))
    assert metrics["cold"] == 0
    assert metrics["max_vio"] < 1
