"""explain: what it says is what the extension does."""

import os
import re
import subprocess
import sys

import pytest
import torch

import torch_moe
from torch_moe import _C


def test_names_build_isa_threads_and_dtypes():
    text = torch_moe.explain()
    assert torch_moe.__version__ in text
    assert torch.__version__ in text
    assert f"ISA: {_C.isa()} (available: {', '.join(_C.available_isas())}" in text
    assert f"threads: {torch.get_num_threads()}" in text
    assert all(name in text for name in ("float32", "bfloat16", "float16", "float64"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("weight_layout", ["out_in", "in_out"])
def test_names_the_kernel_of_each_number_of_rows(weight_layout, dtype):
    lines = torch_moe.explain([3, 200], weight_layout, getattr(torch, dtype)).splitlines()[-2:]
    for rows, line in zip((3, 200), lines, strict=True):
        assert line == f"grouped_gemm, {rows} rows, {weight_layout}, {dtype}: {_C.kernel(rows, weight_layout, dtype)}"


def test_the_kernel_is_that_of_the_isa(isa):
    assert (_C.kernel(64, "out_in", "bfloat16") == "tiles") == (isa == "amx")
    assert _C.kernel(64, "out_in", "float16") == "tokens_in_lanes"
    assert (_C.kernel(8, "out_in", "float32") == "dot_fours") == (isa != "scalar")
    with pytest.raises(ValueError, match=r"kernel: dtype must be .*got 'int8'"):
        _C.kernel(64, "out_in", "int8")


def test_follows_the_isa(isa):
    assert f"ISA: {isa} " in torch_moe.explain()


def test_says_when_the_forced_isa_is_missing(monkeypatch):
    assert "was ignored" not in torch_moe.explain()
    monkeypatch.setenv("MOE_ISA", "mmx")
    assert "MOE_ISA=mmx was ignored" in torch_moe.explain()


@pytest.mark.parametrize("forced", _C.available_isas())
def test_moe_isa_forces_the_isa(forced):
    code = "import torch_moe; print(torch_moe._C.isa())"
    run = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"MOE_ISA": forced}, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == forced


def test_unknown_isa_is_refused():
    with pytest.raises(ValueError, match=r"set_isa: name must be one of .*got 'mmx'"):
        _C.set_isa("mmx")


def test_a_build_without_cuda_names_the_fix(monkeypatch):
    info = _C.build_info() | {"cuda": False}
    monkeypatch.setattr(_C, "build_info", lambda: info)
    assert "CUDA: this build has no CUDA kernels; for them, build again with nvcc" in torch_moe.explain()


def fake_gpus(monkeypatch, *capabilities):
    info = _C.build_info() | {"cuda": "13.0.88", "cuda_architectures": "80 90a-real"}
    monkeypatch.setattr(_C, "build_info", lambda: info)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")


def test_a_torch_without_cuda_and_a_machine_without_a_gpu_are_told_apart(monkeypatch):
    fake_gpus(monkeypatch)
    assert "CUDA: kernels built by nvcc 13.0.88 for the architectures 80 90a-real" in torch_moe.explain()
    assert "GPUs: torch sees none" in torch_moe.explain()
    monkeypatch.setattr(torch.version, "cuda", None)
    assert f"GPUs: torch {torch.__version__} was built without CUDA" in torch_moe.explain()


def test_names_each_gpu_with_its_kernels(monkeypatch):
    fake_gpus(monkeypatch, (7, 5), (9, 0))
    kernels = {("bfloat16", 512, 1024): "wide", ("bfloat16", 64, 1024): "few"}
    kernels |= {("float32", rows, n): "exact" for rows in (64, 512) for n in (1024, 1023)}
    monkeypatch.setattr(_C, "cuda_few_slots", lambda arch, dtype: 256 if (arch, dtype) == (90, "bfloat16") else 0)
    monkeypatch.setattr(_C, "cuda_kernel", lambda arch, dtype, rows, n, k, tf32: kernels.get((dtype, rows, n), ""))
    lines = torch_moe.explain([1]).splitlines()
    old = lines.index("cuda:0: GPU 0, compute capability 7.5: too old, the kernels need 8.0 or newer; use the CPU")
    assert lines[old + 1] == "cuda:1: GPU 1, compute capability 9.0"
    assert lines[old + 2] == "  grouped_gemm, bfloat16: wide, up to 64 rows per expert: few, other widths: none"
    assert lines[old + 4] == "  grouped_gemm, float32: exact"
    assert lines[old + 6] == "  experts given topk_ids, bfloat16: two kernels in all, no plan, up to 256 slots"
    named = " ".join(lines[old + 2 : old + 8])
    schemas = {name.removeprefix("moe::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("moe::")}
    stages = {name for name in schemas if not re.search(r"_(backward|wgrad|bgrad)_?$|experts$|^ep_dispatch$", name)}
    assert all(re.search(rf"\b{stage}\b", named) for stage in stages)
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert "  grouped_gemm, float32, tf32 allowed: exact" in torch_moe.explain()
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.skipif(not _C.build_info()["cuda"], reason="this build has no CUDA kernels")
@pytest.mark.parametrize("architecture", [80, 90, 120])
@pytest.mark.parametrize("rows", [1, 1000])
@pytest.mark.parametrize("n", [1024, 1023])
def test_some_kernel_takes_every_gpu_since_ampere(architecture, rows, n):
    for dtype in ("float32", "float64", "bfloat16", "float16"):
        assert _C.cuda_kernel(architecture, dtype, rows, n, n)
    assert not _C.cuda_kernel(75, "float32", rows, n, n)


@pytest.mark.skipif("90a" not in _C.build_info().get("cuda_architectures", ""), reason="not built for sm_90a")
def test_few_slots_are_of_one_architecture_and_half_types():
    types = ("bfloat16", "float16", "float32", "float64")
    assert [_C.cuda_few_slots(90, dtype) for dtype in types] == [256, 256, 0, 0]
    assert [_C.cuda_few_slots(80, dtype) for dtype in types] == [0, 0, 0, 0]
