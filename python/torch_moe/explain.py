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
        Build, instruction sets (in use, and available, best first), threads; whether there are CUDA kernels, the GPUs,
        which GEMM kernel each of them takes, and what to do where something is missing; and one line per entry of
        ``rows_per_expert`` with the kernel that such an expert takes on the CPU.
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
    lines += _cuda_lines()
    name = str(dtype).removeprefix("torch.")
    lines += [
        f"grouped_gemm, {m} rows, {weight_layout}, {name}: {_C.kernel(m, weight_layout, name)}" for m in rows_per_expert
    ]
    if model is not None:
        from torch_moe.integrations import transformers as engine  # an integration is imported by those who use it

        lines.append(engine.explain(model))
    return "\n".join(lines)


OLDEST_GPU = 80  # compute capability 8.0: Ampere
# The operators whose CUDA kernels do not depend on the GPU; `experts` is made of grouped_gemm's.
_ONE_KERNEL = (
    "route", "plan", "permute", "activation", "combine", "ep_plan", "ep_pack", "ep_index", "ep_reduce",
)  # fmt: skip
FEW_ROWS, MANY_ROWS = 64, 512  # per expert, of a GEMM on a GPU


def _cuda_lines() -> list[str]:
    """Tell whether GPUs can be used and with which kernels, or what is missing and how to get it."""
    info = _C.build_info()
    if not info["cuda"]:
        return ["CUDA: this build has no CUDA kernels; for them, build again with nvcc >= 12.4 on the PATH: "
                "pip install --no-build-isolation ."]  # fmt: skip
    lines = [f"CUDA: kernels built by nvcc {info['cuda']} for the architectures {info['cuda_architectures']}"]
    if torch.version.cuda is None:
        return [*lines, f"GPUs: torch {torch.__version__} was built without CUDA; install one that has it"]
    if not torch.cuda.is_available():
        return [*lines, "GPUs: torch sees none; nvidia-smi tells whether the driver does"]
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        device = f"cuda:{index}: {torch.cuda.get_device_name(index)}, compute capability {major}.{minor}"
        supported = 10 * major + minor >= OLDEST_GPU
        lines.append(device if supported else f"{device}: too old, the kernels need 8.0 or newer; use the CPU")
        lines += _cuda_kernel_lines(10 * major + minor) if supported else []
    return lines


def _cuda_kernel_lines(architecture: int) -> list[str]:
    """Tell which GEMM kernel takes each dtype, by rows per expert and whether the widths let rows start on 16 bytes."""
    allow_tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    lines = []
    for dtype in ("bfloat16", "float16", "float32", "float64"):
        shapes = ((MANY_ROWS, 1024), (FEW_ROWS, 1024), (MANY_ROWS, 1023))
        many, few, odd = (_C.cuda_kernel(architecture, dtype, rows, n, n, allow_tf32) for rows, n in shapes)
        rows = "" if many == few else f", up to {FEW_ROWS} rows per expert: {few or 'none'}"
        other = "" if many == odd else f", other widths: {odd or 'none'}"
        tf32 = ", tf32 allowed" if allow_tf32 and dtype == "float32" else ""
        lines.append(f"  grouped_gemm, {dtype}{tf32}: {many or 'none'}{rows}{other}")
    for dtype in ("bfloat16", "float16"):
        if slots := _C.cuda_few_slots(architecture, dtype):
            lines.append(f"  experts given topk_ids, {dtype}: two kernels in all, no plan, up to {slots} slots")
    return [*lines, f"  {', '.join(_ONE_KERNEL)}: one kernel each for every dtype"]
