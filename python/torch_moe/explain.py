"""explain: which kernels run here, in words."""

import os
from collections.abc import Iterable

import torch
from torch import nn

from torch_moe import _C


def explain(
    rows_per_expert: Iterable[int] = (1, 8, 64, 512),
    weight_layout: str = "out_in",
    dtype: torch.dtype = torch.float32,
    *,
    model: nn.Module | None = None,
) -> str:
    """Tell how this build computes on this machine.

    Parameters
    ----------
    rows_per_expert : iterable of int, default=(1, 8, 64, 512)
        Rows an expert might get, ``Plan.tokens_per_expert``: the GEMM kernel depends on them.
    weight_layout : {"out_in", "in_out"}, default="out_in"
        How the weights are stored.
    dtype : torch.dtype, default=torch.float32
        Of the layer: bfloat16 runs on matrix units where the processor has them and the contracted width is a multiple
        of 32.
    model : Module, default=None
        A model of transformers: also tell which of its experts run on torch-moe, fused or not, and why.

    Returns
    -------
    str
        Build, instruction sets (in use, and available, best first), threads, and one line per entry of
        ``rows_per_expert`` with the kernel that such an expert takes.
    """
    build = ", ".join(f"{name} {value}" for name, value in _C.build_info().items())
    lines = [
        f"build: {build}; running on torch {torch.__version__}",
        f"ISA: {_C.isa()} (available: {', '.join(_C.available_isas())}; the variable MOE_ISA picks one at load)",
        f"threads: {_C.num_threads()}",
        "dtypes: float32, bfloat16 and float16 accumulate in float32; float64 in float64",
    ]
    forced = os.environ.get("MOE_ISA", _C.isa())
    if forced not in _C.available_isas():
        lines.append(f"MOE_ISA={forced} was ignored: this build or this processor has no such instruction set")
    name = str(dtype).removeprefix("torch.")
    lines += [
        f"grouped_gemm, {m} rows, {weight_layout}, {name}: {_C.kernel(m, weight_layout, name)}" for m in rows_per_expert
    ]
    if model is not None:
        from torch_moe.integrations import transformers as engine  # an integration is imported by those who use it

        lines.append(engine.explain(model))
    return "\n".join(lines)
