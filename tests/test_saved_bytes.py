"""What experts keeps for the backward: counted, to the byte."""

import pytest
import torch
from helpers import expert_inputs, make_plan

from torch_moe import ops
from torch_moe.testing import SHAPES

SHAPE = SHAPES["several_tiles"]


def saved(inputs, plan, **options):
    """The storages that the graph holds on to, as {address: bytes}."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = ops.experts(**inputs, plan=plan, **options)
    return storages, output


@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recompute"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("activation", "halves"), [("swiglu", 2), ("gelu", 1)])
def test_only_inputs_and_the_pre_activation_are_kept(activation, halves, dtype, recompute):
    plan = make_plan(SHAPE)
    inputs = {
        name: tensor.requires_grad_()
        for name, tensor in expert_inputs(SHAPE, dtype, "cpu", gated=halves == 2, bias=True).items()
    }
    storages, output = saved(inputs, plan, activation=activation, recompute=recompute)
    held = {tensor.untyped_storage().data_ptr() for tensor in (*inputs.values(), *plan)}
    new_bytes = sum(size for address, size in storages.items() if address not in held)
    pre_activation = plan.num_rows * halves * SHAPE.intermediate_size * dtype.itemsize
    assert held <= set(storages)
    assert new_bytes == (0 if recompute else pre_activation)
    output.sum().backward()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_inference_asks_for_no_pre_activation(mode):
    plan = make_plan(SHAPE)
    inputs = {name: t.requires_grad_() for name, t in expert_inputs(SHAPE, torch.float32, "cpu").items()}
    with mode(), torch.profiler.profile(profile_memory=True) as profile:
        output = ops.experts(**inputs, plan=plan)
    assert not output.requires_grad
    (event,) = [event for event in profile.key_averages() if event.key == "moe::experts"]
    assert event.cpu_memory_usage == output.nbytes  # what is still allocated when the operator returns


def test_nothing_is_kept_without_leaves():
    plan = make_plan(SHAPE)
    storages, output = saved(expert_inputs(SHAPE, torch.float32, "cpu"), plan)
    assert not storages
    assert not output.requires_grad
