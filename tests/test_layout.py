"""The tree: one stem per stage in every folder, torch headers in one folder only, no file too long."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STAGES = ("route", "plan", "permute", "grouped_gemm", "activation", "combine", "experts")
STAGES += ("ep_plan", "ep_pack", "ep_index", "ep_reduce")
FOLDERS = (
    "cpp/include/moe/{}.h", "cpp/cpu/{}.cpp", "cuda/{}.cu", "python/torch_moe/ops/{}.py", "tests/test_{}.py",
)  # fmt: skip
SOURCES = [
    path
    for folder in ("cpp", "cuda", "python", "tests", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in {".h", ".cuh", ".cpp", ".cu", ".inc", ".py", ".pyi"}
]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("pattern", FOLDERS)
def test_every_stage_is_in_every_folder(pattern, stage):
    assert (ROOT / pattern.format(stage)).is_file()


def test_torch_headers_are_included_in_one_folder_only():
    torch_include = re.compile(r'^\s*#\s*include\s*[<"](torch|ATen|c10|pybind11)/', re.MULTILINE)
    including = {path.relative_to(ROOT).parts[:2] for path in SOURCES if torch_include.search(path.read_text())}
    assert including == {("cpp", "torch")}


def test_contract_headers_name_no_cuda():
    headers = list((ROOT / "cpp/include/moe").glob("*.h"))
    assert headers
    assert not [path.name for path in headers if re.search(r"#\s*include\s*<cuda", path.read_text())]


def test_no_file_is_too_long():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in SOURCES}
    assert {path: length for path, length in lengths.items() if length > 450} == {}
    assert sorted(lengths.values())[len(lengths) // 2] <= 150


def test_every_schema_is_in_one_file():
    defining = [path.name for path in SOURCES if path.suffix == ".cpp" and "m.def(" in path.read_text()]
    assert [name for name in defining if name != "module.cpp"] == ["library.cpp"]


# What a CPU build of the kernels cannot parse, and what has a name in cuda/ptx: see its launch.cuh.
@pytest.mark.parametrize("banned", [r"\basm\b", "<<<", r"\b__shared__\b"])
def test_kernels_reach_the_device_through_ptx(banned):
    kernels = [path for path in (ROOT / "cuda").glob("*") if path.suffix in {".cu", ".cuh", ".h"}]
    assert kernels
    code = {path.name: re.sub(r"//.*", "", path.read_text()) for path in kernels}
    assert [name for name, text in code.items() if re.search(banned, text)] == []


def test_kernels_neither_print_nor_end_the_process():
    """Nor do they read the environment, but for the instruction set, once, where it is chosen."""
    banned = re.compile(r"\b(printf|fprintf|puts|abort|exit|_Exit|terminate|getenv)\s*\(|<iostream>|<cstdio>")
    folders = ("cpp/include", "cpp/cpu", "cpp/torch", "cuda")
    code = {str(path.relative_to(ROOT)): path.read_text() for path in SOURCES if path.suffix not in {".py", ".pyi"}}
    found = {path: banned.findall(text) for path, text in code.items() if path.startswith(folders)}
    assert {path for path, calls in found.items() if calls} == {"cpp/cpu/gemm/dispatch.cpp"}
    assert found["cpp/cpu/gemm/dispatch.cpp"] == ["getenv"]


# What each folder of C++ may include, beside itself; cuda/ptx names the emulator, for the build on the CPU.
BELOW = {"cpp/include": (), "cpp/cpu": ("cpp/include",), "cuda": ("cpp/include", "tests/cuda")}


@pytest.mark.parametrize("folder", BELOW)
def test_headers_are_included_from_below_alone(folder):
    places = [ROOT / name for name in (*BELOW[folder], folder)]
    for path in SOURCES:
        if (ROOT / folder) in path.parents:
            for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(), re.MULTILINE):
                found = [(place / name).resolve() for place in (path.parent, *places) if (place / name).is_file()]
                allowed = found and any(place in found[0].parents for place in places)
                assert allowed, f"{path.name} includes {name}"


# Packages that a package may import from; the modules beside them are for all but ops.
ABOVE = {"ops": ("nn", "distributed", "integrations", "cli"), "nn": ("distributed", "integrations", "cli")}
ABOVE |= {"distributed": ("integrations", "cli"), "integrations": ("cli",)}


@pytest.mark.parametrize("package", ABOVE)
def test_packages_import_from_below_alone(package):
    imports = re.compile(r"^\s*(?:from|import) torch_moe\.(\w+)|^\s*from torch_moe import (\w+)", re.MULTILINE)
    files = list((ROOT / "python/torch_moe" / package).rglob("*.py"))
    assert files
    for path in files:
        named = {a or b for a, b in imports.findall(path.read_text())}
        assert not named & set(ABOVE[package]), path.name
