"""The CUDA half of the extension, as far as it shows without a GPU: what it needs to load, and what it says."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import torch_moe
import torch_moe.distributed  # its operators are registered when it is imported
from torch_moe import _C

ROOT = Path(__file__).parent.parent
BUILT = _C.build_info()["cuda"]
CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)


def refused(op, *args, **kwargs):
    """Return what the CUDA side of an operator says to tensors that are on no GPU."""
    with pytest.raises(RuntimeError) as error:
        getattr(torch.ops.moe, op).default.redispatch(CUDA, *args, **kwargs)
    return str(error.value)


@pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf lists the libraries; it comes with binutils")
def test_needs_no_cuda_library_to_load():
    """So one binary loads beside a torch without CUDA, and beside any version of the CUDA runtime."""
    listing = subprocess.run(["readelf", "--dynamic", _C.__file__], capture_output=True, text=True, check=True).stdout
    libraries = re.findall(r"NEEDED.*\[(.+?)\]", listing)
    assert "libtorch_cpu.so" in libraries
    assert not [name for name in libraries if re.search(r"cuda|cudart|nvrtc|cublas", name)]


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm lists the symbols; it comes with binutils")
def test_symbols_of_cuda_are_neither_needed_nor_shown():
    """A CUDA runtime that others could bind to would be shared by accident."""
    listing = subprocess.run(["nm", "--dynamic", _C.__file__], capture_output=True, text=True, check=True).stdout
    symbols = [line.split()[-1] for line in listing.splitlines()]
    assert "PyInit__C" in symbols
    assert not [name for name in symbols if re.match(r"_*(cu[A-Z]|cuda[A-Z]|nv[A-Z])", name)]


def test_every_operator_is_registered_for_cuda():
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("moe::")]
    computed = torch._C._dispatch_has_computed_kernel_for_dispatch_key  # also of operators made of others
    assert [name for name in names if not computed(name, "CUDA")] == []


def test_no_operator_and_no_kernel_is_for_one_device_only():
    """A schema has kernels for CPU and CUDA, or is made of operators that have; a stage declares both functions."""
    registered = torch._C._dispatch_has_kernel_for_dispatch_key
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("moe::")]
    on = {key: {n for n in names if registered(n, key)} for key in ("CPU", "CUDA", "CompositeExplicitAutograd")}
    assert on["CPU"] == on["CUDA"]
    assert on["CPU"] | on["CompositeExplicitAutograd"] == set(names)
    schemas = set(re.findall(r'"(\w+)\(', (ROOT / "cpp/torch/library.cpp").read_text()))
    assert schemas == {name.removeprefix("moe::") for name in names}
    headers = "".join(path.read_text() for path in (ROOT / "cpp/include/moe").glob("*.h"))
    cpu, cuda = (set(re.findall(rf"Status (\w+)_{device}\(", headers)) for device in ("cpu", "cuda"))
    assert cpu - cuda == {"placement"}  # a solver for the host, and no operator
    assert cuda <= cpu


@pytest.mark.skipif(bool(BUILT), reason="this build has CUDA kernels")
def test_a_build_without_cuda_names_the_fix():
    message = refused("plan", torch.zeros(4, 2, dtype=torch.int32), 4)
    assert message.startswith("plan: this build of torch-moe has no CUDA kernels (build it again with nvcc")
    assert "pip install --no-build-isolation ." in message


@pytest.mark.skipif(not BUILT, reason="this build has no CUDA kernels")
@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_a_torch_without_cuda_names_the_fix():
    message = refused("activation", torch.zeros(4, 2), "swiglu")
    assert re.fullmatch(
        r"activation: .*aoti_torch_get_current_cuda_stream.*\(install torch >= 2.10 built with CUDA\)", message
    )


def test_checks_come_before_the_device():
    assert refused("plan", torch.zeros(4, 2), 4).startswith("plan: topk_ids must be int32, got float32")


def test_build_info_says_for_what_it_was_built():
    info = _C.build_info()
    assert ("cuda_architectures" in info) == bool(info["cuda"])
    if info["cuda"]:
        assert re.fullmatch(r"\d+\.\d+\.\d+", info["cuda"])
        assert re.search(r"\b80\b", info["cuda_architectures"])
        assert info["cuda"] in torch_moe.explain()


def refuse_serialised(output, status=0):
    script = f"echo '{output}' >&2; exit {status}"
    command = ["sh", str(ROOT / "cuda/refuse_serialised.sh"), "sh", "-c", script]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_build_refuses_serialised_matrix_products():
    plain = refuse_serialised("ptxas info    : 0 bytes gmem")
    assert (plain.returncode, plain.stderr) == (0, "ptxas info    : 0 bytes gmem\n")
    assert refuse_serialised("error: expected a ;", status=2).returncode == 2
    told = refuse_serialised("ptxas info : (C7511) Potential Performance Loss: instructions are serialized")
    assert told.returncode == 1
    assert "refused: ptxas serialised a wgmma" in told.stderr
