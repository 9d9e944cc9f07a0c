"""What the operators share: the fakes' shape check, gradients and what has none, the autocast dtype."""

from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from torch_moe import _C

# What torch hands to setup_context and backward, and what it returns; torch has no public type for them.
Context: TypeAlias = Any
# Options that a function only passes on.
Options: TypeAlias = Any

_Fake = TypeVar("_Fake", bound=Callable[..., object])


def register_fake(op: str) -> Callable[[_Fake], _Fake]:
    """Register the decorated function as the shape inference of ``torch.ops.moe.<op>``."""
    decorator: Callable[[_Fake], _Fake] = torch.library.register_fake(f"moe::{op}")
    return decorator


def has_kernels(device: torch.device) -> bool:
    """Tell whether the operators run on a device; on meta they give shapes."""
    return device.type in ("cpu", "meta") or (device.type == "cuda" and bool(_C.build_info()["cuda"]))


def check_rank(op: str, argument: str, tensor: Tensor, rank: int) -> None:
    """Raise unless ``tensor`` has ``rank`` dimensions; a fake can infer nothing from any other."""
    if tensor.dim() != rank:
        raise RuntimeError(f"{op}: {argument} must have {rank} dimensions, got shape {list(tensor.shape)}")


def empty_gradient(like: Tensor, of: Tensor | None, needed: bool) -> Tensor:
    """Return the fake of a gradient: of the shape of ``of``, or none of ``like``'s elements where it is not wanted."""
    return like.new_empty((0,)) if of is None or not needed else of.new_empty(of.shape)


class _ReverseMode(torch.library.Library):
    """Registers gradients that refuse what they are not: torch would call a missing tangent zero, without a word."""

    def impl(self, op_name: str, fn: Callable[..., Any], dispatch_key: str = "", **options: Options) -> None:
        def checked(keyset: object, *args: object, **kwargs: object) -> object:
            # Both are off in ordinary calls, of which this is all.
            if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
                _refuse_other_modes(op_name, [arg for arg in args if isinstance(arg, Tensor)])
            return fn(keyset, *args, **kwargs)

        super().impl(op_name, checked, dispatch_key, **options)  # type: ignore[no-untyped-call]


def _refuse_other_modes(op: str, tensors: list[Tensor]) -> None:
    unpack: Callable[[Tensor], forward_ad.UnpackedDualTensor] = forward_ad.unpack_dual
    if forward_ad._current_level >= 0 and any(unpack(tensor).tangent is not None for tensor in tensors):
        raise RuntimeError(f"{op}: forward-mode differentiation is not supported (use backward or torch.autograd.grad)")
    if torch._C._are_functorch_transforms_active() and any(tensor.requires_grad for tensor in tensors):
        raise RuntimeError(
            f"{op}: torch.func.grad, vjp and jacrev are not supported (use backward or torch.autograd.grad; "
            "torch.func.functional_call and vmap work)"
        )


_LIBRARY = _ReverseMode("moe", "FRAGMENT")  # type: ignore[no-untyped-call]


def register_autograd(
    op: str, backward: Callable[..., object], *, setup_context: Callable[..., None] | None = None
) -> None:
    """Register the gradient of ``torch.ops.moe.<op>``; forward mode and torch.func's derivatives are refused."""
    torch.library.register_autograd(f"moe::{op}", backward, setup_context=setup_context, lib=_LIBRARY)


def refuse_double_backward(op: str) -> None:
    """Make ``torch.ops.moe.<op>``, itself a gradient, raise when it is differentiated.

    Without a formula torch would only warn and leave the second derivative out.
    """

    def backward(ctx: Context, *grads: Tensor) -> None:
        raise RuntimeError(f"{op}: has no derivative of its own (double backward is not supported)")

    register_autograd(op, backward)


def other_layout(weight_layout: str) -> str:
    """Return the layout that reads the same weight transposed."""
    return "in_out" if weight_layout == "out_in" else "out_in"


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """Return the dtype autocast asks for on the tensor's device, or None; like torch's own, it leaves fp64 alone."""
    if not torch._C._is_any_autocast_enabled():  # one look-up, where the rest is seven: see _routed_experts
        return None
    device_type = tensor.device.type
    if tensor.dtype == torch.float64 or not is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def is_autocast_enabled(device_type: str) -> bool:
    """Tell whether autocast is on; torch's own raises for meta, which has no autocast."""
    # NOTE: not torch.amp.is_autocast_available, which torch 2.11 cannot compile.
    return device_type != "meta" and torch.is_autocast_enabled(device_type)
