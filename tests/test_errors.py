"""Every argument of every operator that does not fit is refused, in the same words on every device.

``<op>: <argument> must <expectation>, got <what came>``, before anything is launched: so the CUDA side is tested
without a GPU.
"""

import functools
import re

import pytest
import torch
from samples import KERNEL_OPS, samples

# Sizes that the other arguments do not tell in each sample: an operator takes any. By operator: argument and dimension.
FREE = {
    "route": [("router_logits", 0), ("router_logits", 1)],
    "route_backward": [("router_logits", 1)],
    "plan": [("topk_ids", 0), ("topk_ids", 1)],
    "permute": [("hidden_states", 1), ("expert_offsets", 0), ("slot_to_row", 1)],
    "grouped_gemm": [("rows", 0), ("weight", 1)],
    "grouped_gemm_wgrad": [("lhs", 1), ("rhs", 1), ("expert_offsets", 0)],
    "grouped_gemm_bgrad": [("grad_output", 0), ("grad_output", 1), ("expert_offsets", 0)],
    "activation": [("pre_activation", 0), ("pre_activation", 1)],
    "combine": [("rows", 1), ("expert_offsets", 0), ("slot_to_row", 0), ("slot_to_row", 1)],
    "combine_backward": [("expert_offsets", 0)],
    "ep_plan": [("topk_ids", 0), ("topk_ids", 1), ("placement", 1)],
    "ep_pack": [("hidden_states", 0), ("hidden_states", 1), ("row_to_slot", 0)],
    "ep_index": [("rows", 0)],
    "ep_reduce": [("rows", 0), ("slot_to_row", 0), ("slot_to_row", 1), ("physical_ids", 1)],
}
KEYS = {name: torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name)) for name in ("CPU", "CUDA")}


@functools.cache
def cases(op):
    """Names and values of all arguments that are given, for each sample."""
    names = [arg.name for arg in getattr(torch.ops.moe, op).default._schema.arguments]
    return [
        {
            name: arg.detach() if torch.is_tensor(arg) else arg
            for name, arg in (*zip(names, args, strict=False), *kwargs.items())
        }
        for args, kwargs in samples()[op]
    ]


def refused(op, key, arguments):
    """What the operator says; the arguments must not be taken."""
    schema = getattr(torch.ops.moe, op).default._schema
    positional = [arg.name for arg in schema.arguments if not arg.kwarg_only and arg.name in arguments]
    args = [arguments[name] for name in positional]
    kwargs = {name: value for name, value in arguments.items() if name not in positional}
    with pytest.raises(RuntimeError) as error:
        getattr(torch.ops.moe, op).default.redispatch(KEYS[key], *args, **kwargs)
    return str(error.value)


def tensors(arguments):
    return [(name, value) for name, value in arguments.items() if torch.is_tensor(value)]


def shaped(arguments):
    """All but "like", which lends its dtype alone."""
    return [(name, value) for name, value in tensors(arguments) if name != "like"]


each_op = pytest.mark.parametrize("op", KERNEL_OPS)
each_key = pytest.mark.parametrize("key", KEYS)


@each_key
@each_op
def test_dtypes(op, key):
    for arguments in cases(op):
        for name, tensor in tensors(arguments):
            wrong = tensor.int() if tensor.is_floating_point() else tensor.float()
            said = refused(op, key, {**arguments, name: wrong})
            assert re.match(rf"{op}: {name} must be \w+.*, got (int32|float32)", said), said


@each_key
@each_op
def test_two_floating_dtypes(op, key):
    """Tensors go together: one alone in fp64 is refused, by its own name or that of another."""
    for arguments in cases(op):
        floating = [(name, tensor) for name, tensor in tensors(arguments) if tensor.is_floating_point()]
        for name, tensor in floating if len(floating) > 1 else ():
            said = refused(op, key, {**arguments, name: tensor.double()})
            assert re.match(rf"{op}: \w+ must be b?float\d\d, got \w+ \(call \.", said), (name, said)


@each_key
@each_op
def test_dimensions(op, key):
    for arguments in cases(op):
        for name, tensor in shaped(arguments):
            said = refused(op, key, {**arguments, name: tensor[None]})
            assert re.match(rf"{op}: \w+ must have .*, got .*\[1, ", said), (name, said)


@each_key
@each_op
def test_sizes(op, key):
    """One more and one less in each dimension, where other arguments tell its size."""
    for arguments in cases(op):
        for name, tensor in shaped(arguments):
            for dim, size in enumerate(tensor.shape):
                if (name, dim) in FREE.get(op, ()) or size == 0:
                    continue
                if name == "row_to_slot":  # a plan may lack the rows that no expert owns
                    others = [torch.cat([tensor, tensor])]
                else:
                    others = [tensor.narrow(dim, 0, size - 1), torch.cat([tensor, tensor.narrow(dim, 0, 1)], dim=dim)]
                for wrong in others:
                    said = refused(op, key, {**arguments, name: wrong})
                    assert re.match(rf"{op}: \w+ must .*, got ", said), (name, dim, said)


@each_key
@each_op
def test_choices(op, key):
    for arguments in cases(op):
        for name, value in arguments.items():
            if isinstance(value, str):
                said = refused(op, key, {**arguments, name: "nonsense"})
                assert re.match(rf"{op}: {name} must be one of '.*', got 'nonsense'$", said), said


@each_key
@each_op
def test_numbers(op, key):
    for arguments in cases(op):
        for name, value in arguments.items():
            if isinstance(value, int) and not isinstance(value, bool):
                said = refused(op, key, {**arguments, name: -1})
                assert re.match(rf"{op}: \w+ must .*, got ", said), (name, said)
