"""torch.library.opcheck on every operator that the library registers; one without a sample fails."""

import pytest
import torch
from helpers import make_plan
from samples import KERNEL_OPS, OPS, SHAPE, exchange_samples, samples

pytestmark = pytest.mark.usefixtures("group")  # some operators exchange

ALL_CHECKS = (
    "test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic",
)  # fmt: skip
# Its rows are in flight when it returns: the last check would compare them before anybody waits. The compiled layer in
# tests/distributed/expert_parallel.py stands for it.
CHECKS = {"ep_dispatch": ALL_CHECKS[:3]}


def samples_of(op):
    return samples()[op] if op in KERNEL_OPS else exchange_samples()[op]


def to(device, args):
    """The same arguments on another device; a leaf stays a leaf."""
    moved = [arg.detach().to(device).requires_grad_(arg.requires_grad) if torch.is_tensor(arg) else arg for arg in args]
    return tuple(moved)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch 2.15 of its copies
@pytest.mark.parametrize("op", OPS)
def test_opcheck(op, device):
    if device.type == "cuda" and op in ("ep_dispatch", "ep_experts", "ep_experts_backward"):
        pytest.skip("the group of this test exchanges tensors of the CPU")
    for args, kwargs in samples_of(op):
        args = to(device, args)
        torch.library.opcheck(getattr(torch.ops.moe, op).default, args, kwargs, test_utils=CHECKS.get(op, ALL_CHECKS))


CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


@pytest.mark.parametrize("op", KERNEL_OPS)
def test_tensors_of_two_devices_are_refused(op):
    """Each tensor in turn is elsewhere (on no device at all: it is refused before its memory would be read)."""
    for args, kwargs in samples()[op]:
        args = [arg.detach() if torch.is_tensor(arg) else arg for arg in args]
        places = [place for place, arg in enumerate(args) if torch.is_tensor(arg)]
        for place in places if len(places) > 1 else ():
            moved = [arg.to("meta") if i == place else arg for i, arg in enumerate(args)]
            with pytest.raises(
                RuntimeError, match=rf"^{op}: \w+ must be on (cpu|another device) like the other tensors"
            ):
                getattr(torch.ops.moe, op).default.redispatch(CPU, *moved, **kwargs)


def test_operators_are_discovered():
    """An empty discovery would make every check above pass."""
    assert set(KERNEL_OPS) == set(samples())
    assert set(OPS) - set(KERNEL_OPS) == set(exchange_samples())


@pytest.mark.parametrize("op", [op for op in OPS if op.endswith(("_backward", "_wgrad", "_bgrad"))])
def test_double_backward_is_refused(op):
    """The second derivative is an error, not a gradient that silently lacks a term."""
    args, kwargs = samples_of(op)[0]
    args = [arg.requires_grad_() if isinstance(arg, torch.Tensor) and arg.is_floating_point() else arg for arg in args]
    result = getattr(torch.ops.moe, op)(*args, **kwargs)
    result = result[0] if isinstance(result, tuple) else result
    with pytest.raises(RuntimeError, match=rf"{op}: .*double backward is not supported"):
        result.sum().backward()


def test_integer_tensors_refuse_requires_grad():
    with pytest.raises(RuntimeError, match="only Tensors of floating point"):
        make_plan(SHAPE).row_to_slot.requires_grad_()
