"""gpu-check without a GPU: what it skips and says, how it stops what takes too long, and its benchmarks on the CPU."""

import json
import signal
import sys
import time
from types import SimpleNamespace

import bench_gpu
import gpu_check
import gpu_parts
import gpu_small
import gpu_summary
import gpu_time
import pytest
import torch
from gpu_parts import Outcome

from torch_moe.cli import machine, main

LAYER = "layer (32768, 4096, 1024, 128, 8) uniform forward"


def test_without_a_gpu_every_part_that_needs_one_says_so(capsys, monkeypatch):
    monkeypatch.setattr(gpu_check, "ask_driver", lambda what: "")
    assert gpu_check.main(["--only", "bench,tests,kernels,sanitizer"]) == 0
    printed = capsys.readouterr().out
    assert "GPU: none: what needs one is skipped" in printed
    assert printed.count("skipped: there is no GPU") >= 4
    places = [printed.index(f"== {part}") for part in ("kernels", "tests", "sanitizer", "bench")]
    assert places == sorted(places)
    assert "written to" not in printed


def test_the_command_line_hands_its_options_over(capfd, tmp_path, monkeypatch):
    assert main(["gpu-check", "--only", "sanitizer", "--quick"]) == 0
    printed = capfd.readouterr().out
    assert "== sanitizer" in printed
    assert "== bench" not in printed
    with pytest.raises(SystemExit):
        main(["explain", "--quick"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["gpu-check"])
    assert "runs in a checkout of torch-moe" in capfd.readouterr().err


def test_unknown_parts_are_refused(capsys):
    with pytest.raises(SystemExit):
        gpu_check.main(["--only", "build,paint"])
    assert "must be among build,kernels,tests,sanitizer,bench, got 'paint'" in capsys.readouterr().err


def test_what_cannot_be_built_is_not_tested(monkeypatch):
    monkeypatch.setattr(gpu_parts, "BUILD_MODULES", ("pip", "no_such_module"))
    outcomes = gpu_check.check(("build", "tests", "bench"), quick=True, gpu="a GPU")
    assert outcomes["build"].status == "skipped"
    assert "needs no_such_module" in outcomes["build"].reason
    assert {outcomes[part].reason for part in ("tests", "bench")} == {"the package was not built"}


def test_what_a_machine_lacks_is_named(monkeypatch):
    there = {"cmake", "make"}
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(gpu_parts.shutil, "which", lambda name: name if name in there else None)
    told = gpu_check.check(("build", "kernels"), quick=True, gpu="a GPU")
    for part in ("build", "kernels"):
        assert told[part].status == "skipped"
        assert "a C++20 compiler (g++, or CXX), nvcc >= 12.4" in told[part].reason
    there |= {"g++", "nvcc"}
    assert gpu_parts.missing_tools() == []


def test_the_programs_of_this_python_and_of_cuda_are_found(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    folders = gpu_parts.with_tools("/first:/second").split(":")
    assert folders[:2] == ["/first", "/second"]  # what the caller put there wins
    assert {str(gpu_parts.Path(sys.executable).parent), str(tmp_path / "bin")} <= set(folders)
    assert gpu_parts.with_tools(":".join(folders)).split(":") == folders


@pytest.mark.parametrize(
    ("ends", "ran", "status"),
    [((0, 0, 0), 3, "passed"), ((1, 0, 0), 1, "failed"), ((0, 1, 0), 3, "failed"), ((0, None, 0), 2, "timed out")],
)
def test_kernel_tests_that_were_built_run_though_others_were_not(ends, ran, status, monkeypatch):
    commands = []

    def run(command, limit):
        commands.append(command)
        return ends[len(commands) - 1], "why"

    monkeypatch.setattr(gpu_parts, "run", run)
    monkeypatch.setattr(gpu_parts, "missing_tools", list)
    told = gpu_parts.kernels(gpu_parts.Check(quick=False, limit=lambda part: 9.0, gpu="a GPU"))
    assert (len(commands), told.status) == (ran, status)


@pytest.mark.parametrize("there", [set(), {"xdist", "pytest_timeout"}])
def test_other_plugins_and_warnings_do_not_end_the_python_tests(there, monkeypatch):
    ran = {}

    def run(command, limit, env):
        ran.update(command=[str(part) for part in command], env=env)
        return 0, f"..F\n{gpu_parts.FAILED}tests/a.py::b: why\n3 passed, 1 skipped in 2 s"

    monkeypatch.setattr(gpu_parts, "run", run)
    find = gpu_parts.importlib.util.find_spec
    optional = {"xdist", "pytest_timeout"}
    monkeypatch.setattr(
        gpu_parts.importlib.util, "find_spec", lambda name: (name in there or None) if name in optional else find(name)
    )
    told = gpu_parts.Check(quick=False, limit=lambda part: 9.0, gpu="a GPU", cores=4)
    assert gpu_parts.tests(told).records == [{"passed": 3, "skipped": 1}, {"failed_test": "tests/a.py::b: why"}]
    command = " ".join(ran["command"])
    assert ran["env"]["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] == "1"
    assert "-W default --continue-on-collection-errors -p gpu_failures" in command
    assert ("-p xdist -n 4" in command, "-p timeout --timeout 60" in command) == (bool(there), bool(there))


@pytest.mark.parametrize(
    ("workers", "pause"), [((), 0), pytest.param(("-p", "xdist", "-n", "1"), 10, marks=pytest.mark.slow)]
)
def test_a_failed_test_is_told_of_at_once(workers, pause, tmp_path):
    """The second test stops everything, with workers once the first one's report has had time to come from there."""
    if workers:
        pytest.importorskip("xdist")
    (tmp_path / "test_two.py").write_text(
        "import os, time\n\n\ndef test_a():\n    raise ValueError('first\\nsecond')\n\n\n"
        f"def test_b():\n    time.sleep({pause})\n    os.killpg(0, {signal.SIGKILL:d})\n"
    )
    environment = {**gpu_parts.environment(), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    environment["PYTHONPATH"] += ":" + str(gpu_parts.ROOT / "benchmarks")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "gpu_failures", *workers, "--rootdir", tmp_path, tmp_path]
    status, output = gpu_parts.run(command, 120, environment)
    assert status == -signal.SIGKILL  # it never came to a summary
    assert output.count(gpu_parts.FAILED) == 1
    assert f"{gpu_parts.FAILED}test_two.py::test_a: ValueError: first\n" in output


def test_a_command_is_stopped_at_its_limit_with_its_children():
    code = "import subprocess; print('begun', flush=True); subprocess.run(['sleep', '60'])"
    for limit in (1.5, 6.0, 24.0):  # on a busy machine it may take a while to begin
        start = time.monotonic()
        status, output = gpu_parts.run([sys.executable, "-c", code], limit)
        seconds = time.monotonic() - start
        assert status is None
        if output:
            break
    assert output == "begun\n"
    assert seconds < limit + 9  # it does not wait for the child, which holds the output open
    stopped = gpu_parts.outcome(status, output, 1.5)
    assert (stopped.status, stopped.reason) == ("timed out", "stopped after 2 s")


def test_the_last_line_of_a_failure_is_its_reason():
    status, output = gpu_parts.run([sys.executable, "-c", "print('first'); raise SystemExit('boom')"], 30)
    failed = gpu_parts.outcome(status, output, 30)
    assert (failed.status, failed.reason) == ("failed", "boom")
    assert gpu_parts.outcome(3, "", 30).reason == "exit status 3"


def test_parts_leave_time_for_those_after_them(monkeypatch):
    limits = {}
    for part in gpu_parts.PARTS:
        monkeypatch.setitem(
            gpu_parts.PARTS, part, lambda told, part=part: limits.update({part: told.limit(part)}) or Outcome("passed")
        )
    monkeypatch.setattr(gpu_check, "time", SimpleNamespace(monotonic=lambda: 7.0))  # nothing takes any time
    gpu_check.check(tuple(gpu_parts.PARTS), quick=False, budget=300.0, gpu="a GPU")
    assert limits["build"] == 300 - 60 - 80 - 20 - 120
    assert limits["bench"] == 300
    gpu_check.check(("bench",), quick=False, budget=100.0, gpu="a GPU")
    assert limits["bench"] == 100


def test_only_the_architecture_of_the_gpu_is_compiled():
    assert [gpu_check.architectures(text) for text in ("9.0", "8.6", "12.0", "", "[N/A]")] == [
        "90a-real", "80", "80", "", "",
    ]  # fmt: skip
    told = gpu_parts.Check(quick=False, limit=lambda part: 1.0, gpu="a GPU", architectures="90a-real")
    assert gpu_parts.architectures(told) == ["-DCMAKE_CUDA_ARCHITECTURES=90a-real"]


def bench(path, *arguments):
    command = ["bench_gpu.py", "--device", "cpu", "--tiny", "--rounds", "2", "--budget", "3600"]
    command += ["--output", str(path), *arguments]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as end:
            bench_gpu.main()
    return end.value.code, [json.loads(line) for line in path.read_text().splitlines()]


def test_the_benchmarks_run_on_the_cpu(tmp_path):
    code, lines = bench(tmp_path / "lines.jsonl")
    assert code == 0
    assert {line["status"] for line in lines} <= {"ok", "skipped"}
    cases = {line["case"] for line in lines}
    operators = {"route", "plan", "permute", "combine", "activation", "grouped_gemm"}
    operators |= {"route backward", "combine backward", "activation backward", "gather"}
    operators |= {"ep_plan", "ep_pack", "ep_index", "ep_reduce", "grouped_gemm dgrad", "grouped_gemm wgrad"}
    assert cases >= {*operators, "decode 1 tokens", "decode 32 tokens"}
    assert sum(case.startswith("layer") for case in cases) >= 4
    ours = [line for line in lines if line["candidate"] == "torch_moe"]
    assert len(ours) == len(cases)
    assert all(line["median_ms"] > 0 and line["relative_error"] < bench_gpu.TOLERATED for line in ours)
    assert all("reason" in line for line in lines if line["status"] == "skipped")


def test_every_target_names_a_case_and_a_candidate_that_are_measured(tmp_path):
    """A target that nothing is compared with would say "not measured" for ever."""
    _, lines = bench(tmp_path / "lines.jsonl")
    tiny, fine = (tuple(shape) for shape in (bench_gpu.TINY, bench_gpu.TINY._replace(num_tokens=7)))
    names = {str(tuple(bench_gpu.LAYER)): str(tiny), str(tuple(bench_gpu.FINE)): str(fine)}
    records = {(line["case"], line["candidate"]): line for line in lines}
    for case, figure, *_ in gpu_summary.TARGETS:
        for large, small in names.items():
            case = case.replace(large, small)
        if figure == "backward_tflops":  # may have no value: on these sizes a backward can seem to take no time
            assert (case, "torch_moe") in records
        else:
            assert gpu_summary.measured(records, case, figure) is not None, (case, figure)


def test_a_wrong_result_fails_the_benchmark(tmp_path, monkeypatch):
    right = torch.ops.moe.activation
    monkeypatch.setattr("gpu_cases.ops.activation", lambda x: 1.1 * right(x))
    code, lines = bench(tmp_path / "lines.jsonl")
    assert code == 1
    assert [line["case"] for line in lines if line["status"] == "wrong"] == ["activation"]


def test_an_operator_that_refuses_is_a_record_and_the_rest_goes_on(tmp_path, monkeypatch):
    def refuse(*_):
        raise RuntimeError("plan: no kernel")

    monkeypatch.setattr("gpu_cases.ops.plan", refuse)
    code, lines = bench(tmp_path / "lines.jsonl", "--quick")
    assert code == 1
    assert any(line["status"] == "failed" and line["reason"] == "plan: no kernel" for line in lines)
    assert any(line["case"] == "grouped_gemm wgrad" and line["status"] == "ok" for line in lines)


def test_a_guest_that_fails_is_skipped_and_we_are_measured(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise NotImplementedError("grouped_mm: not here")

    monkeypatch.setattr("gpu_cases.functional.grouped_mm", refuse)
    code, lines = bench(tmp_path / "lines.jsonl", "--quick")
    assert code == 0
    guests = [line for line in lines if line["candidate"] == "grouped_mm"]
    assert {line["status"] for line in guests} == {"skipped"}
    assert {line["reason"] for line in guests} == {"NotImplementedError: grouped_mm: not here"}
    assert any(line["case"] == "grouped_gemm wgrad" and line["candidate"] == "torch_moe" for line in lines)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_benchmark_says_how_to_try_it(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench_gpu.py"])
    with pytest.raises(SystemExit):
        bench_gpu.main()
    assert "--device cuda: torch sees no CUDA device (--device cpu --tiny tries" in capsys.readouterr().err


def test_small_shapes_run_on_the_cpu(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu_small.py", "--device", "cpu"])
    gpu_small.main()
    assert capsys.readouterr().out == "all finite\n"


def test_relative_error_is_that_of_the_norms():
    expected = torch.tensor([3.0, 4.0])
    assert gpu_time.relative_error(torch.tensor([3.0, 4.5]), expected) == pytest.approx(0.1)
    assert gpu_time.relative_error(torch.tensor([3.0, float("nan")]), expected) == float("inf")


def records(candidate, case=LAYER, **figures):
    return {"case": case, "candidate": candidate, "copy_gbytes_per_s": 4300, "dense_tflops": 790, **figures}


def test_the_summary_judges_targets_and_names_what_is_faster():
    lines = [
        records("torch_moe", median_ms=12.0, tflops=550.0),
        records("cublas_equal_flops", median_ms=9.6),
        records("grouped_mm", median_ms=10.0, time_of_torch_moe_over_this=1.2),
        records("torch_moe", LAYER + "+backward", median_ms=42.0, tflops=471.0),
        records("torch_moe", "decode 1 tokens", median_ms=0.2),
    ]
    page = gpu_summary.summary({"build": Outcome("passed"), "bench": Outcome("passed", "", lines)}, "NVIDIA H200")
    assert f"{LAYER}: tflops at least 500: 550 (reached)" in page
    assert f"{LAYER}: share_of_cublas_equal_flops at least 0.85: 0.8 (MISSED)" in page
    assert f"{LAYER}+backward: backward_tflops at least 450: {471 * 42 * 2 / 3 / 30:.4g} (MISSED)" in page
    assert "decode 1 tokens: median_ms at most 0.185: 0.2 (MISSED), aim 0.04" in page
    assert "decode 8 tokens: median_ms at most 0.204: not measured" in page
    assert f"instead: {LAYER} (grouped_mm: 1.20)" in page


def test_the_commit_is_that_of_other_records(monkeypatch):
    """The program cannot ask the package, which is not built yet."""
    monkeypatch.chdir(gpu_parts.ROOT)
    assert gpu_check.commit() == machine.source_commit()


def test_results_are_written_under_the_name_of_the_gpu(tmp_path):
    outcomes = {"build": Outcome("passed", "", [{"seconds": 1.5}]), "bench": Outcome("failed", "no")}
    path = gpu_check.write(outcomes, "NVIDIA H200", tmp_path)
    assert path.name.startswith("gpu-nvidia-h200-20")
    (line,) = [json.loads(line) for line in path.read_text().splitlines()]
    assert (line["part"], line["seconds"], line["gpu"]) == ("build", 1.5, "NVIDIA H200")
    assert "bench      failed: no" in path.with_suffix(".txt").read_text()
