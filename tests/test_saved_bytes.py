"""What experts keeps for the backward: counted, to the byte."""

import pytest
import torch
from helpers import expert_inputs, make_plan
from torch.utils._python_dispatch import TorchDispatchMode

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


class Allocations(TorchDispatchMode):
    """Notes the shapes that torch itself allocates."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.zeros.default, torch.ops.aten.new_zeros.default):
            self.shapes.append(tuple(output.shape))
        return output


def test_the_backward_fills_no_gradient_of_what_is_kept():
    """Autograd would make one of zeros, as large as the pre-activation, for an output that nobody differentiates."""
    plan = make_plan(SHAPE)
    inputs = {name: t.requires_grad_() for name, t in expert_inputs(SHAPE, torch.float32, "cpu").items()}
    output = ops.experts(**inputs, plan=plan)
    with Allocations() as made:
        output.backward(torch.ones_like(output))
    assert (plan.num_rows, 2 * SHAPE.intermediate_size) not in made.shapes
    assert all(tensor.grad is not None for tensor in inputs.values())


def test_an_output_that_nothing_depends_on_has_no_gradients():
    class Cut(torch.autograd.Function):
        @staticmethod
        def forward(ctx, tensor):
            return tensor.clone()

        @staticmethod
        def backward(ctx, grad):
            return None

    inputs = {name: t.requires_grad_() for name, t in expert_inputs(SHAPE, torch.float32, "cpu").items()}
    output = ops.experts(**inputs, plan=make_plan(SHAPE))
    Cut.apply(output).sum().backward()
    assert all(tensor.grad is None or not tensor.grad.any() for tensor in inputs.values())
