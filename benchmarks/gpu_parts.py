"""The parts of gpu_check.py: build, kernel tests, Python tests, sanitizer, benchmarks. Each is commands with a limit.

Only the standard library: it runs before anything is built, on a machine where nothing can be installed.
"""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "gpu-check"
SITE = BUILD / "site"  # the package, apart from whatever is installed
NATIVE = BUILD / "native"  # the kernel tests
BUILD_MODULES = ("pip", "scikit_build_core", "pybind11", "torch")
FAILED = "failed at once: "  # how gpu_failures.py begins the line about a test that failed
QUICK_TESTS = ("tests/test_cuda.py", "tests/test_experts.py", "tests/test_opcheck.py")


@dataclass
class Outcome:
    """What became of a part."""

    status: str  # passed, failed, skipped, timed out
    reason: str = ""
    records: list[dict[str, object]] = field(default_factory=list)


@dataclass(frozen=True)
class Check:
    """What the parts are told: how much there is to do and until when."""

    quick: bool
    limit: Callable[[str], float]  # seconds that a part may take from now
    gpu: str  # its name, or "" without one
    architectures: str = ""  # CMAKE_CUDA_ARCHITECTURES of that GPU alone: half the time to compile; "": the default
    cores: int = os.cpu_count() or 1


def with_tools(path: str) -> str:
    """Return a PATH with the places where this Python's programs and CUDA's usually are, behind those that it has."""
    cuda = [os.environ.get("CUDA_HOME", ""), os.environ.get("CUDA_PATH", ""), "/usr/local/cuda"]
    folders = [Path(sys.executable).parent, Path(sysconfig.get_path("scripts"))]
    folders += [Path(home, "bin") for home in cuda if home]
    return os.pathsep.join(dict.fromkeys([*path.split(os.pathsep), *(str(f) for f in folders if f.is_dir())]))


def environment() -> dict[str, str]:
    """Return the environment of the commands: the package just built comes first."""
    path = os.pathsep.join(filter(None, (str(SITE), os.environ.get("PYTHONPATH", ""))))
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def run(command: Sequence[str | Path], limit: float, env: Mapping[str, str] | None = None) -> tuple[int | None, str]:
    """Run a command, print what it says as it comes, and stop it with all its children at the limit.

    Returns
    -------
    status : int or None
        The exit status; None when it was stopped.
    output : str
        What it printed.
    """
    print("$", *command, flush=True)
    process = subprocess.Popen(
        [str(part) for part in command], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace", start_new_session=True,
    )  # fmt: skip
    lines: list[str] = []

    def read() -> None:
        with process.stdout as stream:
            for line in stream:
                lines.append(line)
                print("  " + line, end="", flush=True)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        status: int | None = process.wait(max(1.0, limit))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # its own session: nothing else is in that group
        process.wait()
        status = None
    reader.join(10)
    return status, "".join(lines)


def outcome(status: int | None, output: str, limit: float, records: list[dict[str, object]] | None = None) -> Outcome:
    """Turn a command's end into a part's."""
    if status is None:
        return Outcome("timed out", f"stopped after {limit:.0f} s", records or [])
    if status:
        last = [line for line in output.splitlines() if line.strip()]
        return Outcome("failed", last[-1].strip() if last else f"exit status {status}", records or [])
    return Outcome("passed", "", records or [])


def architectures(check: Check) -> list[str]:
    """Return CMake's option for them, if the GPU is known."""
    return [f"-DCMAKE_CUDA_ARCHITECTURES={check.architectures}"] if check.architectures else []


def options(check: Check) -> list[str]:
    """Return CMake's options for the kernels."""
    return ["-DMOE_CUDA=ON", *architectures(check)]


def missing_tools() -> list[str]:
    """Return what compiling needs and this machine lacks, in words that say what to install."""
    compilers = [os.environ.get("CXX"), "c++", "g++", "clang++"]
    needed = {
        "a C++20 compiler (g++, or CXX)": compilers,
        "cmake": ["cmake"],
        "ninja or make": ["ninja", "make"],
        "nvcc >= 12.4 (the CUDA toolkit's bin folder on the PATH)": ["nvcc"],
    }
    return [what for what, names in needed.items() if not any(name and shutil.which(name) for name in names)]


def build(check: Check) -> Outcome:
    """Install the package into a folder of its own, with the torch and the nvcc that are there."""
    missing = [name for name in BUILD_MODULES if importlib.util.find_spec(name) is None]
    missing += missing_tools()
    if missing:
        return Outcome("skipped", f"to build, {sys.executable} needs {', '.join(missing)}")
    shutil.rmtree(SITE, ignore_errors=True)
    limit = check.limit("build")
    command = [
        sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "--quiet",
        "--target", SITE, *(f"--config-settings=cmake.define.{option.removeprefix('-D')}" for option in options(check)),
        ROOT,
    ]  # fmt: skip
    start = time.monotonic()
    status, output = run(command, limit, {**os.environ, "CMAKE_BUILD_PARALLEL_LEVEL": str(check.cores)})
    seconds = round(time.monotonic() - start, 1)
    if status == 0:
        status, output = run([sys.executable, "-m", "torch_moe", "explain"], 60, environment())
    return outcome(status, output, limit, [{"seconds": seconds}])


def kernels(check: Check) -> Outcome:
    """Build the kernel tests that `make test-cuda` executes on the CPU for the device, and run them there."""
    if not check.gpu:
        return Outcome("skipped", "there is no GPU")
    missing = missing_tools()
    if missing:
        return Outcome("skipped", f"to build, it needs {', '.join(missing)}")
    end = time.monotonic() + check.limit("kernels")
    ninja = shutil.which("ninja") is not None
    generator = ["-G", "Ninja"] if ninja else []  # CMake's own choice is make, there or not
    keep_going = ["--", "-k", "0"] if ninja else ["--", "-k"]
    failed = None
    for command in (
        ["cmake", "-S", ROOT, "-B", NATIVE, *generator, "-DMOE_GPU_TESTS=ON", *options(check)],
        ["cmake", "--build", NATIVE, "--parallel", str(check.cores), "--target", "moe_cuda_native", *keep_going],
        # Several at a time: one that hangs until ctest stops it does not hold up the others.
        ["ctest", "--test-dir", NATIVE, "--output-on-failure", "--label-regex", "native", "--parallel", "4"],
    ):
        limit = end - time.monotonic()
        status, output = run(command, limit)
        if status != 0:
            failed = failed or outcome(status, output, limit)
        if status is None or (status and "-S" in command):  # programs that were built run, though others were not
            break
    return failed or Outcome("passed")


def tests(check: Check) -> Outcome:
    """Run the Python tests that use a device on the GPU: against the reference, opcheck, gradcheck, compile, graphs."""
    if not check.gpu:
        return Outcome("skipped", "there is no GPU")
    if importlib.util.find_spec("pytest") is None or importlib.util.find_spec("hypothesis") is None:
        return Outcome("skipped", f"{sys.executable} has no pytest or no hypothesis")
    limit = check.limit("tests")
    # What other versions warn of is no failure here, and whatever plugins there are have no say. A worker that waits
    # for a kernel that hangs ends itself, and another one goes on with the next test.
    command = [sys.executable, "-m", "pytest", "--device", "cuda", "-q", "-m", "not slow", "--maxfail", "40"]
    command += ["-W", "default", "--continue-on-collection-errors", "-p", "gpu_failures"]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-p", "xdist", "-n", str(min(8, check.cores))]
    if importlib.util.find_spec("pytest_timeout") is not None:
        command += ["-p", "timeout", "--timeout", "60", "--timeout-method", "thread"]
    alone = {**environment(), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    alone["PYTHONPATH"] += os.pathsep + str(ROOT / "benchmarks")
    status, output = run([*command, *(QUICK_TESTS if check.quick else ("tests",))], limit, alone)
    counts = re.findall(r"(\d+) (passed|failed|skipped|error)", output[-2000:])
    failed = [{"failed_test": test} for test in re.findall(f"^{FAILED}(.*)", output, re.MULTILINE)]
    return outcome(status, output, limit, [{name: int(count) for count, name in counts}, *failed])


def sanitizer(check: Check) -> Outcome:
    """Run compute-sanitizer on small shapes of every operator: memory accesses, then races in shared memory."""
    if not check.gpu:
        return Outcome("skipped", "there is no GPU")
    if shutil.which("compute-sanitizer") is None:
        return Outcome("skipped", "there is no compute-sanitizer on the PATH (it comes with the CUDA toolkit)")
    end = time.monotonic() + check.limit("sanitizer")
    records: list[dict[str, object]] = []
    for tool in ("memcheck",) if check.quick else ("memcheck", "racecheck"):
        limit = end - time.monotonic()
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable]
        status, output = run([*command, ROOT / "benchmarks/gpu_small.py"], limit, environment())
        if "not supported" in output:
            return Outcome("skipped", "compute-sanitizer does not support this machine", records)
        records.append({"tool": tool, "status": "passed" if status == 0 else "failed"})
        if status != 0:
            return outcome(status, output, limit, records)
    return Outcome("passed", "", records)


def bench(check: Check) -> Outcome:
    """Time each operator and the layer, with the ceilings measured in the same run."""
    if not check.gpu:
        return Outcome("skipped", "there is no GPU")
    limit = check.limit("bench")
    lines = BUILD / "bench.jsonl"
    lines.unlink(missing_ok=True)
    command = [sys.executable, ROOT / "benchmarks/bench_gpu.py", "--output", lines]
    command += ["--budget", f"{max(10.0, limit - 20):.0f}", *(["--quick"] if check.quick else [])]
    status, output = run(command, limit, environment())
    records = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    return outcome(status, output, limit, records)


PARTS: dict[str, Callable[[Check], Outcome]] = {
    "build": build,
    "kernels": kernels,
    "tests": tests,
    "sanitizer": sanitizer,
    "bench": bench,
}
