"""What the compiler gives the wgmma kernels: registers, stack, spills and serialised instructions."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NVCC = shutil.which("nvcc")

# Bytes of stack that a kernel may have, by the epilogue in its mangled name: the activations other than SiLU loop over
# a copy of the accumulators (128 or 64 floats) in local memory. All kernels start with 65536 / 384 registers, and take
# what they need of each other by setmaxnreg.
MOST_REGISTERS = 168
STACK = {"EpilogueE0": 0, "EpilogueE1": 512, "EpilogueE2": 272, "wgrad": 0, "few_rows_sm90": 96}
STACK |= {"few_rows_of_slots": 144}

REPORT = re.compile(
    r"Function properties for (?P<name>\S+)\n\s*(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads\n.*?Used (?P<registers>\d+) registers"
)


def compile_source(source, *options):
    """Run nvcc for sm_90a."""
    includes = ["-I", ROOT / "cpp/include", "-I", ROOT / "cuda"]
    command = [NVCC, "-std=c++20", "-O3", *includes, "-gencode", "arch=compute_90a,code=sm_90a", *options, source]
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="needs nvcc (it needs no GPU)")
@pytest.mark.parametrize("source", sorted(ROOT.glob("cuda/*_sm90*.cu")), ids=lambda path: path.stem)
def test_no_spill_and_nothing_serialised(source, tmp_path):
    """Compile for sm_90a and read the assembler's report."""
    result = compile_source(source, "-Xptxas", "-v", "-c", "-o", tmp_path / "out.o")
    report = result.stdout + result.stderr
    assert result.returncode == 0, report
    assert "(C75" not in report, f"ptxas serialised a wgmma or ignored a setmaxnreg:\n{report}"
    kernels = list(REPORT.finditer(report))
    assert kernels, report
    for kernel in kernels:
        name = kernel["name"]
        allowed = [stack for part, stack in STACK.items() if part in name]
        assert len(allowed) == 1, f"{name} is not in the table of this test"
        assert int(kernel["registers"]) <= MOST_REGISTERS, name
        assert int(kernel["stack"]) <= allowed[0], f"{name}: {kernel['stack']} bytes of stack"
        assert int(kernel["stores"]) == int(kernel["loads"]) == 0, f"{name} spills"


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="needs nvcc (it needs no GPU)")
@pytest.mark.parametrize("name", ["grouped_gemm_sm90_few", "experts_sm90_few"])
def test_what_is_read_once_is_evicted_first(name, tmp_path):
    """Every load of a weight has the policy; no emulator and no result tells."""
    result = compile_source(ROOT / f"cuda/{name}.cu", "-ptx", "-o", tmp_path / "out.ptx")
    assert result.returncode == 0, result.stderr
    instructions = (tmp_path / "out.ptx").read_text().replace("\n", " ").split(";")
    loads = [line for line in instructions if "cp.async.bulk.tensor.3d.shared" in line]
    assert loads
    assert all(".L2::cache_hint" in line for line in loads)
    policies = [line for line in instructions if "createpolicy" in line]
    assert policies
    assert all("createpolicy.fractional.L2::evict_first.b64" in line and " 1.0" in line for line in policies)


DEVICE_TESTS = {"test_layouts", "test_copies", "test_barriers"}  # with kernels of their own


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="needs nvcc (it needs no GPU)")
@pytest.mark.parametrize("source", sorted(ROOT.glob("tests/cuda/test_*.cpp")), ids=lambda path: path.stem)
def test_kernel_tests_compile_for_a_gpu(source, tmp_path):
    """Without the header that the emulator includes before everything, which includes half of the standard library."""
    folders = [part for name in ("tests/cuda", "tests/cpp", "cpp/cpu") for part in ("-I", ROOT / name)]
    language = ["-x", "cu"] if source.stem in DEVICE_TESTS else []
    result = compile_source(source, *folders, *language, "-c", "-o", tmp_path / "out.o")
    assert result.returncode == 0, result.stderr
