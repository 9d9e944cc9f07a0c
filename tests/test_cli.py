"""torch-moe bench: runs on every published layer (made small), refuses what it cannot do, reports no wrong result."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from torch_moe.cli import baselines, display, floor, machine, main, plot
from torch_moe.cli.candidates import K_DENSE, LABELS
from torch_moe.cli.limits import Limits
from torch_moe.cli.results import FORWARD, FORWARD_BACKWARD
from torch_moe.cli.shapes import SHAPES

PUBLISHED = tuple(SHAPES)


@pytest.fixture(autouse=True)
def small(monkeypatch, one_thread):
    """Every published layer with its options but small sizes, one thread, and a floor that is read in no time."""
    for name, shape in list(SHAPES.items()):
        experts = 16 if shape.num_experts > 16 else 8
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_experts": experts, "num_tokens": 200}
        monkeypatch.setitem(SHAPES, name, replace(shape, **sizes))
    monkeypatch.setattr(floor, "SECONDS", 0.001)
    monkeypatch.setattr(floor, "BANDWIDTH_MEBIBYTES", 64)
    monkeypatch.setattr(floor, "MATMUL_SIZE", 64)


def bench_json(capsys, *arguments):
    assert main(["bench", "--json", "--rounds", "1", *arguments]) == 0
    captured = capsys.readouterr()
    return json.loads(captured.out), captured.err


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("shape", PUBLISHED)
def test_every_shape_is_verified_and_measured(capsys, shape, dtype):
    lines, words = bench_json(capsys, "--shape", shape, "--dtype", dtype, "--budget", "1000")
    assert "verified: outputs and gradients" in words
    skipped = {name for name, label in LABELS.items() if f"not run: {label}" in words}
    for direction in (FORWARD, FORWARD_BACKWARD):
        measured = {line["candidate"]: line for line in lines if line["direction"] == direction}
        assert set(LABELS) - skipped <= set(measured)
        assert measured[K_DENSE]["ratio_to_k_dense"] == 1.0
    assert skipped <= {"grouped_mm"}  # the only one that torch may refuse
    stages = [line["candidate"] for line in lines if line["candidate"].startswith("stage:")]
    assert [stage.split()[0] for stage in stages] == [
        f"stage:{name}" for name in ("route", "plan", "permute", "GEMM", "activation", "GEMM", "combine")
    ]
    assert {line["shape"] for line in lines} == {shape}
    assert all(line["median_ms"] > 0 and line["cpu"] and line["isa"] for line in lines)


@pytest.mark.parametrize("routing", ["uniform", "zipf", "one_expert"])
def test_forced_routings(capsys, routing):
    lines, _ = bench_json(capsys, "--routing", routing, "--no-backward")
    load = lines[0]["max_over_mean_load"]
    assert lines[0]["routing"] == routing
    assert {"uniform": 1.0 <= load < 1.6, "zipf": 1.6 < load < 4, "one_expert": load == 4.0}[routing]


def test_scaling_table(capsys):
    assert main(["bench", "--experts", "4,8", "--rounds", "1", "--no-backward"]) == 0
    printed = capsys.readouterr().out
    assert "more experts, same work" in printed
    rows = [line.replace("│", " ").split() for line in printed.splitlines()]
    assert [row[0] for row in rows if row and row[0] in {"4", "8"}] == ["4", "8"]


def test_one_number_of_experts_is_the_layers(capsys):
    lines, _ = bench_json(capsys, "--experts", "4", "--no-backward")
    assert {line["num_experts"] for line in lines} == {4}


def test_output_is_appended_and_plot_is_drawn(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    output, picture = tmp_path / "new" / "bench.jsonl", tmp_path / "new" / "bench.png"
    arguments = ["bench", "--experts", "4,8", "--rounds", "1", "--output", str(output), "--plot", str(picture)]
    assert main(arguments) == 0
    first = output.read_text().splitlines()
    assert main(arguments) == 0
    assert output.read_text().splitlines()[: len(first)] == first
    assert len(output.read_text().splitlines()) == 2 * len(first)
    assert {"date", "commit", "cpu", "torch", "spread", "percent_of_floor"} <= set(json.loads(first[0]))
    assert picture.read_bytes().startswith(b"\x89PNG")


def wrong_output(hidden_states, *arguments):
    return 1.1 * baselines.loop_over_experts(hidden_states, *arguments)


def wrong_gradient(hidden_states, *arguments):
    return baselines.loop_over_experts(hidden_states.detach(), *arguments) + 0 * hidden_states


def wrong_weight_gradient(hidden_states, topk_weights, topk_ids, weights, shape):
    frozen = replace(weights, down_proj=weights.down_proj.detach() + 0 * weights.down_proj)
    return baselines.loop_over_experts(hidden_states, topk_weights, topk_ids, frozen, shape)


@pytest.mark.parametrize("wrong", [wrong_output, wrong_gradient, wrong_weight_gradient])
def test_a_wrong_result_ends_the_run(capsys, monkeypatch, tmp_path, wrong):
    monkeypatch.setattr(baselines, "grouped_mm", wrong)
    output = tmp_path / "bench.jsonl"
    assert main(["bench", "--rounds", "1", "--output", str(output)]) == 1
    assert "wrong result: torch grouped_mm differs from the fp64 reference" in capsys.readouterr().err
    assert not output.exists()


def test_a_wrong_dense_baseline_ends_the_run(capsys, monkeypatch):
    right = baselines.merge_experts

    def without_the_last(weights, num_experts, shape):
        return right(weights, num_experts - 1, shape)

    monkeypatch.setattr(baselines, "merge_experts", without_the_last)
    assert main(["bench", "--rounds", "1", "--no-backward"]) == 1
    assert "wrong result: dense, active size" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "0"], "--tokens: expected a whole number of at least 1, got '0'"),
        (["--rounds", "many"], "--rounds: expected a whole number of at least 1, got 'many'"),
        (["--dtype", "fp32,fp8"], "--dtype: expected some of fp32,bf16,fp16, got 'fp8'"),
        (["--budget", "-1"], "--budget: expected seconds above 0, got '-1'"),
        (["--experts", "8,x"], "--experts: expected a whole number of at least 1, got 'x'"),
        (["--experts", "1"], "seed cannot have 1 experts: RouterConfig: top_k must be in [1, num_experts = 1], got 2"),
        (
            ["--shape", "deepseek-v3", "--experts", "16,12"],
            "deepseek-v3 cannot have 12 experts: RouterConfig: num_groups must divide",
        ),
        (["--shape", "deepseek-v3", "--experts", "8"], "8 experts: RouterConfig: top_k must be at most 4"),
        (["--shape", "huge"], "--shape: invalid choice: 'huge'"),
        (["--device", "cuda"], "--device: invalid choice: 'cuda'"),
        (["--plot", "picture.pdf"], "name a file that ends in .png, got 'picture.pdf'"),
    ],
)
def test_bad_options_exit_with_2_and_a_reason(capsys, arguments, message):
    with pytest.raises(SystemExit) as exit_:
        main(["bench", *arguments])
    assert exit_.value.code == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


def test_too_little_memory_reduces_the_layer_and_says_so(capsys, monkeypatch):
    name = "qwen3-30b-a3b"
    limits = Limits(memory=0, seconds=1, gflops=1, backward=False)
    monkeypatch.setattr(machine, "memory_budget", lambda: limits.bytes_needed(SHAPES[name], 4))
    _, words = bench_json(capsys, "--no-backward", "--shape", name)
    assert "reduced" not in words
    assert "not run: dense, total size (E*I): would need" in words
    monkeypatch.setattr(machine, "memory_budget", lambda: limits.bytes_needed(SHAPES[name], 4) - 1)
    lines, words = bench_json(capsys, "--no-backward", "--shape", name)
    assert f"reduced: {name} to 8 of 16 experts" in words
    assert {line["num_experts"] for line in lines} == {8}


def test_a_layer_that_cannot_fit_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(machine, "memory_budget", lambda: 1000)
    with pytest.raises(SystemExit) as exit_:
        main(["bench"])
    assert exit_.value.code == 2
    assert "0.0 GiB may be used, and fewer experts cannot be" in capsys.readouterr().err


def test_without_rich_and_matplotlib_it_runs_and_says_what_is_missing(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(display.importlib.util, "find_spec", lambda name: None)
    assert plot.why_not_plot() is not None
    picture = tmp_path / "bench.png"
    assert main(["bench", "--rounds", "1", "--no-backward", "--plot", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert "rich is not installed: plain tables (pip install 'torch-moe[bench]')" in printed
    assert "matplotlib is not installed: no plot (pip install 'torch-moe[bench]')" in printed
    assert "torch_moe layer  " in printed
    assert not picture.exists()


def test_threads_are_set(capsys):
    lines, _ = bench_json(capsys, "--threads", "2", "--no-backward")
    assert torch.get_num_threads() == 2
    assert {line["threads"] for line in lines} == {2}


def test_explain_as_a_module():
    run = subprocess.run([sys.executable, "-m", "torch_moe", "explain"], capture_output=True, text=True, check=True)
    assert "ISA" in run.stdout


def test_no_command_is_an_error(capsys):
    with pytest.raises(SystemExit) as exit_:
        main([])
    assert exit_.value.code == 2
    assert "the following arguments are required: command" in capsys.readouterr().err
