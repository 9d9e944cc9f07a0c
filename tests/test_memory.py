"""Large gradients come from blocks that are kept from step to step."""

import resource
import sys

import pytest
import torch
from helpers import expert_inputs, make_plan, randn

from torch_moe import ops
from torch_moe.testing import Shape

# Each projection's gradient is some MiB large.
SHAPE = Shape(num_tokens=64, hidden_size=512, intermediate_size=768, num_experts=8, top_k=2)
PROJECTIONS = ("gate_up_proj", "down_proj")
TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="blocks are kept on Linux alone"),
    pytest.mark.skipif(TORCH < (2, 11), reason="torch takes memory from others since 2.11"),
]


def step(inputs, plan, seed):
    for tensor in inputs.values():
        tensor.grad = None
    output = ops.experts(**inputs, plan=plan)
    output.backward(randn(*output.shape, seed=seed))
    return {name: inputs[name].grad for name in PROJECTIONS}


@pytest.fixture
def inputs():
    return {name: tensor.requires_grad_() for name, tensor in expert_inputs(SHAPE, torch.float32, "cpu").items()}


def test_the_next_step_takes_the_freed_gradients(inputs):
    plan = make_plan(SHAPE, "zipf")
    places = [{grad.data_ptr() for grad in step(inputs, plan, seed).values()} for seed in range(4)]
    assert places[1] == places[2] == places[3]
    size = sum(inputs[name].nbytes for name in PROJECTIONS)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for seed in range(10):
        step(inputs, plan, seed)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    assert faults < 10 * size / resource.getpagesize() / 4


def test_gradients_that_live_keep_their_memory(inputs):
    plan = make_plan(SHAPE, "zipf")
    first = step(inputs, plan, 1)
    copies = {name: grad.clone() for name, grad in first.items()}
    second = step(inputs, plan, 2)
    for name in PROJECTIONS:
        assert first[name].data_ptr() != second[name].data_ptr()
        assert torch.equal(first[name], copies[name])
        assert not torch.equal(first[name], second[name])


def test_reused_memory_leaves_no_trace(inputs):
    """A block holds what was there before: all of a gradient is written, that of an idle expert, too."""
    plan = make_plan(SHAPE, "one_expert")
    expected = {name: grad.clone() for name, grad in step(inputs, plan, 1).items()}
    for grad in step(inputs, plan, 1).values():
        grad.fill_(float("nan"))
    del grad
    for name, grad in step(inputs, plan, 1).items():
        assert torch.equal(grad, expected[name])
    idle = plan.expert_offsets.diff() == 0
    assert idle.any()
    assert all((grad[idle] == 0).all() for grad in expected.values())


def test_a_gradient_is_a_tensor_like_others(inputs):
    grads = step(inputs, make_plan(SHAPE, "zipf"), 1)
    for name, grad in grads.items():
        assert grad.is_contiguous()
        assert grad.shape == inputs[name].shape
        assert grad.dtype == torch.float32
        assert grad.device == torch.device("cpu")
    torch.nn.utils.clip_grad_norm_(list(inputs.values()), 1.0)
    torch.optim.SGD(inputs.values(), lr=0.1).step()
