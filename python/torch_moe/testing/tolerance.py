r"""The one tolerance, derived from the type and the length of the sums.

A value is reached by a path of steps: a matmul is a step of length k (it adds k products), an elementwise function one
of length 1. The inputs are exact (the reference gets the same numbers, in fp64), so errors enter in two ways only:

- a step's sum of k terms rounds k times in the accumulator. Rounding errors are a random walk: relative to the size
  of the sum they grow like sqrt(k) * eps(accumulator);
- a step's result may be stored in the tensor's dtype: one more eps(dtype).

eps is the spacing at 1, twice the largest rounding error; the factor of two covers a product of two rounded factors
between steps, as in gate * up. So a path costs the sum over its steps of ``eps(dtype) + sqrt(k) * eps(accumulator)``,
relative to the size of the values. As size we take the largest expected magnitude, because rounding errors spread like
the values themselves: their maximum is to their mean what the values' maximum is to theirs, for any number of elements.
"""

import math

import torch
from torch import Tensor


def tolerance(dtype: torch.dtype, *lengths: int) -> float:
    """Return the error allowed after steps of the given lengths, relative to the largest expected magnitude.

    Parameters
    ----------
    dtype : torch.dtype
        The floating dtype in which values are stored; fp64 accumulates in fp64, the others in fp32.
    *lengths : int
        Per step from the inputs to the value, the number of terms of its sum.

    Returns
    -------
    float
        The sum over the steps of ``eps(dtype) + sqrt(length) * eps(accumulator)``.
    """
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    eps, eps_accumulator = torch.finfo(dtype).eps, torch.finfo(accumulator).eps
    return sum(eps + math.sqrt(length) * eps_accumulator for length in lengths)


def assert_close(actual: Tensor, expected: Tensor, *lengths: int, dtype: torch.dtype | None = None) -> None:
    """Raise unless ``actual`` is within :func:`tolerance` of the fp64 reference ``expected``.

    Parameters
    ----------
    actual : Tensor
        What was computed.
    expected : Tensor of the same shape, dtype=float64
        What the reference gives.
    *lengths : int
        The steps' lengths, as in :func:`tolerance`.
    dtype : torch.dtype, default=None
        The dtype that steps are stored in; None is that of ``actual``. To be given where they differ: bf16 steps lead
        to an fp32 gradient of ``topk_weights``, fp32 steps to a bf16 gradient of ``router_logits``.

    Raises
    ------
    AssertionError
        With the worst error in multiples of the allowed one, or on a shape mismatch or misplaced NaN.
    """
    if actual.shape != expected.shape:
        raise AssertionError(f"shape {list(actual.shape)} instead of {list(expected.shape)}")
    if actual.numel() == 0:
        return
    allowed = tolerance(dtype or actual.dtype, *lengths)
    if dtype is not None and dtype != actual.dtype:
        allowed += torch.finfo(actual.dtype).eps  # the conversion at the end
    scale = expected.abs().max().item()
    error = (actual.detach().double() - expected.detach().double()).abs().max().item()
    if not error <= allowed * scale:  # NaN fails, too
        ratio = error / (allowed * scale) if scale > 0 else math.inf
        raise AssertionError(f"error {error:.3g} at scale {scale:.3g} is {ratio:.2f} times the tolerance {allowed:.3g}")
