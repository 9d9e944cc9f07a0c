"""Losses, balancers and statistics never wait for the device: no value of a tensor reaches the host per step."""

import pytest
import torch
from helpers import randn
from torch.utils._python_dispatch import TorchDispatchMode

from torch_moe import BiasBalancer, MoE, RoutingStats
from torch_moe.balancing import METHODS
from torch_moe.losses import GlobalLoad, importance_loss, load_balancing_loss, load_loss, z_loss

T, H, I, E, K = 24, 16, 8, 6, 2  # noqa: E741
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique_consecutive", "bincount")


class NoWaiting(TorchDispatchMode):
    """Refuses what reads a value on the host, or has a shape that depends on one."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        assert name not in WAITING, name
        assert not by_mask, "index by a mask"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_a_step_never_waits(method, masked):
    layer = MoE(H, I, E, K, expert_bias=True, capacity_factor=1.0)
    balancer, stats, load = BiasBalancer.attach(layer, method=method), RoutingStats.attach(layer), GlobalLoad(E)
    x, mask = randn(T, H), torch.arange(T) % 3 > 0 if masked else None
    balancer.mask = stats.mask = mask
    with NoWaiting():
        logits, ids, weights, _ = layer(x, return_routing=True)[1]
        loss = load_balancing_loss(logits, ids, mask=mask) + z_loss(logits, mask=mask)
        loss = loss + load_balancing_loss(logits, tokens_per_expert=load(ids, mask=mask), mask=mask)
        loss = loss + importance_loss(weights, ids, E, mask=mask)
        loss = loss + load_loss(logits, logits.detach(), logits.exp(), K, mask=mask)
        loss.backward()
        balancer.step()
        stats.metrics()


def test_reading_does_wait():
    """The test above can fail."""
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoWaiting():
        RoutingStats(E).metrics()["max_vio"].item()
    with pytest.raises(AssertionError, match="index by a mask"), NoWaiting():
        torch.zeros(3)[torch.ones(3) > 0]
