"""explain: what it says is what the extension does."""

import os
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


def test_matrix_units_are_for_bfloat16(isa):
    assert (_C.kernel(64, "out_in", "bfloat16") == "tiles") == (isa == "amx")
    assert _C.kernel(64, "out_in", "float16") == "tokens_in_lanes"
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
