"""bench_layer.py: every case runs when made small, is verified, and is compared with the right floor and target."""

import json
from dataclasses import replace

import bench_layer
import layer_cases
import layer_claims
import layer_machine
import layer_report
import layer_runs
import pytest
import torch
from layer_cases import CASES
from layer_claims import CLAIMS
from layer_machine import Bench, using_isa

from torch_moe import _C
from torch_moe.cli import floor
from torch_moe.cli.baselines import Weights
from torch_moe.cli.display import Display
from torch_moe.cli.errors import WrongResult
from torch_moe.cli.floor import Machine, Work
from torch_moe.testing.timing import Timing


@pytest.fixture(autouse=True)
def small(monkeypatch, one_thread):
    """Every case with its options but small sizes, one thread, and a floor that is read in no time."""
    for name, case in list(CASES.items()):
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_experts": max(8, case.shape.top_k)}
        monkeypatch.setitem(CASES, name, replace(case, shape=replace(case.shape, **sizes)))
    monkeypatch.setattr(floor, "SECONDS", 0.001)
    monkeypatch.setattr(floor, "BANDWIDTH_MEBIBYTES", 64)
    monkeypatch.setattr(layer_machine, "LEAST_FLUSH_BYTES", 1 << 12)
    monkeypatch.setattr(layer_runs.machine, "last_level_cache_bytes", lambda: 0)


def run(tmp_path, *arguments):
    output = tmp_path / "bench.jsonl"
    bench_layer.main(["--case", ",".join(CASES), "--rounds", "1", "--output", str(output), *arguments])
    return [json.loads(line) for line in output.read_text().splitlines()]


def test_every_case_is_measured_in_each_routing_with_its_targets(tmp_path):
    lines = run(tmp_path)
    found = {(line["case"], line["dtype"], line["pass"], line["routing"]) for line in lines}
    expected = {
        (case.name, dtype, layer_cases.PASSES[name], routing)
        for case in CASES.values()
        for dtype, name in case.targets
        for routing in ("uniform", "zipf")
    }
    assert found == expected
    assert all(line["must"] < line["aim"] and line["must"] > line["peer"] for line in lines)
    assert all(line["caches_flushed"] == (line["num_tokens"] <= 16) for line in lines)
    assert all(line["percent_of_floor"] > 0 and 0 <= line["noise_kept"] <= 1 and line["cpu"] for line in lines)


def test_contenders_and_instruction_sets(tmp_path, capsys):
    isas = _C.available_isas()
    chosen = ["--case", "switch-t512,qwen3-t1", "--dtype", "fp32", "--routing", "zipf", "--isa", ",".join(isas)]
    lines = run(tmp_path, *chosen, "--compare", "--markdown")
    for case, name in (("switch-t512", "forward+backward"), ("qwen3-t1", "forward")):
        here = [line for line in lines if (line["case"], line["pass"]) == (case, name)]
        assert [line["isa"] for line in here if line["candidate"] == "torch_moe"] == isas
        assert {line["candidate"] for line in here} >= {"torch_moe", "k_dense", "loop"}
        assert all("ratio_to_k_dense" in line for line in here)
    assert _C.isa() == isas[0]
    printed = capsys.readouterr().out
    assert f"| switch-t512 {isas[0]} | forward+backward |" in printed.replace(" noisy", "")


def test_transformers_experts_are_contenders(tmp_path, capsys):
    pytest.importorskip("transformers")
    lines = run(tmp_path, "--case", "seed-t512,switch-t512", "--dtype", "fp32,bf16", "--routing", "zipf", "--compare")
    found = {(line["case"], line["dtype"], line["pass"]) for line in lines if line["candidate"] == "hf_grouped_mm"}
    assert len(found) == 2 * 2 * 2
    assert {line["case"] for line in lines if line["candidate"] == "hf_eager"} == {"seed-t512", "switch-t512"}
    assert "not run: hf" not in capsys.readouterr().out


def test_absent_transformers_are_told_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(layer_runs.layer_transformers.importlib.util, "find_spec", lambda name: None)
    run(tmp_path, "--case", "seed-t1,seed-t16", "--dtype", "fp32", "--compare")
    assert capsys.readouterr().out.count("not run: hf_eager, hf_grouped_mm: transformers is not installed") == 1


def test_a_wrong_result_ends_the_run(tmp_path, monkeypatch):
    right = layer_runs.make_problem

    def swapped_experts(*arguments):
        problem = right(*arguments)
        weights = {**vars(problem.weights), "down_proj": problem.weights.down_proj.flip(0)}
        return replace(problem, weights=Weights(**weights))

    monkeypatch.setattr(layer_runs, "make_problem", swapped_experts)
    with pytest.raises(WrongResult, match="torch_moe layer differs from the fp64 reference"):
        run(tmp_path, "--case", "seed-t16")


@pytest.mark.parametrize("name", ["gate_up_proj", "topk_weights"])
def test_a_wrong_gradient_ends_the_run(tmp_path, monkeypatch, name):
    right = layer_runs.make_candidates

    def doubled(problem, **options):
        candidates, skipped = right(problem, **options)
        place = 1 + ["topk_weights", "gate_up_proj"].index(name)

        class Wrong(type(candidates[0])):
            def gradients(self, *arguments):
                output, gradients = super().gradients(*arguments)
                return output, tuple(g * 2 if i == place else g for i, g in enumerate(gradients))

        return [Wrong(**vars(candidate)) for candidate in candidates], skipped

    monkeypatch.setattr(layer_runs, "make_candidates", doubled)
    with pytest.raises(WrongResult):
        run(tmp_path, "--case", "seed-t512", "--dtype", "fp32", "--pass", "backward")


def test_a_layer_too_large_is_left_out_and_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(layer_runs.machine, "memory_budget", lambda: 1000)
    bench_layer.main(["--case", "wide-t16", "--dtype", "fp32"])
    assert "not run: wide in fp32 needs 0.0 GiB, 0.0 GiB may be used" in capsys.readouterr().out


def test_percent_of_floor_takes_the_quiet_samples():
    timing = Timing((1.0, 9.0, 1.0, 9.0, 9.0), (0.0, 0.9, 0.0, 0.9, 0.9))
    assert row_of(timing).percent_of_floor == 50.0
    assert row_of(timing).percent_of_best_floor == 50.0
    assert row_of(timing).target == CASES["seed-t1"].targets["fp32", "forward"]


def test_percent_of_floor_is_that_of_the_moment_of_each_sample():
    """Slower memory, slower samples: the layer is as good as before, and the best reading says otherwise."""
    reads = (4.0, 1.0, 2.0, 2.0, 1.0)  # a floor of 0.25, 1, 0.5 .. seconds
    rates = tuple({"spin": 10.0, "cached": 9.0, "read": read} for read in reads)
    row = row_of(Timing(tuple(1.25 / read for read in reads), (0.0,) * 5, rates))
    row = replace(row, work=Work(1e9, 1e9), machine=Machine(10.0, 4.0))
    assert row.percent_of_floor == pytest.approx(80.0)
    assert row.percent_of_best_floor == pytest.approx(100 * 0.25 / 0.625)
    assert (row.moment, row.cached_gflops) == (Machine(10.0, 2.0), 9.0)
    slow_core = [{"spin": 0.5, "cached": 0.5, "read": 4.0}] * 5  # a floor of two seconds, of arithmetic
    assert replace(row, timing=Timing((2.5,) * 5, (0.0,) * 5, tuple(slow_core))).percent_of_floor == pytest.approx(80.0)


def row_of(timing, routing="zipf"):
    """A row whose floor is half a second, also at the moment of each sample."""
    timing = timing if timing.rates else replace(timing, rates=({"spin": 10.0, "read": 10.0},) * len(timing.samples))
    limits, work = Machine(gflops=10.0, read_gbytes=10.0), Work(5e9, 1e9)
    return layer_runs.Row(CASES["seed-t1"], "fp32", "forward", routing, "torch_moe", "", timing, work, (1,), limits)


@pytest.mark.parametrize(
    ("seconds", "noise", "verdict"),
    [(0.52, 0.0, "aim"), (0.58, 0.0, "must"), (0.7, 0.0, "MISSED"), (0.7, 0.9, "noisy"), (0.52, 0.9, "noisy")],
)
def test_targets_are_met_or_missed_on_a_machine_of_ones_own(seconds, noise, verdict):
    row = row_of(Timing((seconds,), (noise,)))
    assert layer_report.verdict(row, row.target) == verdict


def test_markdown_gives_the_worst_routing_first_and_the_peer():
    rows = [row_of(Timing((seconds,), (0.0,)), name) for name, seconds in (("uniform", 0.625), ("zipf", 1.0))]
    header, _, line = layer_report.markdown(rows, []).splitlines()
    assert header == "| case | pass | fp32 |"
    assert line == "| seed-t1 | forward | 50 to 80 (74) |"


def test_the_floor_is_that_of_the_best_instruction_set(monkeypatch):
    used = []
    monkeypatch.setattr(floor, "read", lambda dtype, memory: used.append((dtype, _C.isa())) or Machine(1.0, 1.0))
    bench = Bench(Display())
    with using_isa(_C.available_isas()[-1]):
        bench.read_floor()
        assert _C.isa() == _C.available_isas()[-1]
    assert used == [(torch.float32, _C.available_isas()[0])]


def test_the_floor_of_a_case_is_the_best_reading_around_it(monkeypatch):
    readings = iter([Machine(9.0, 9.0), Machine(3.0, 1.0), Machine(1.0, 3.0), Machine(1.0, 2.0), Machine(9.0, 9.0)])
    monkeypatch.setattr(floor, "read", lambda dtype, memory: next(readings))
    monkeypatch.setattr(floor, "spin", lambda: 2.0)
    bench = Bench(Display())
    monkeypatch.setattr(bench._memory.__class__, "read", lambda memory: 1.0, raising=False)
    bench.read_floor()
    options = {"passes": ["forward"], "routings": ["zipf"], "isas": [_C.isa()], "compare": False, "seed": 0}
    (row,) = layer_runs.run_cases(bench, [CASES["seed-t1"]], "fp32", rounds=6, **options)  # one more after five rounds
    assert row.machine == Machine(3.0, 3.0)
    assert len(row.timing.samples) == 6
    assert next(readings) == Machine(9.0, 9.0)


def test_spins_are_readings_too(monkeypatch):
    monkeypatch.setattr(floor, "spin", lambda: 4.0)
    bench = Bench(Display())
    bench.readings.clear()
    bench.paired(lambda: 1.0)
    spun, read = bench.readings[0], bench.readings[1]
    assert (spun, read.gflops) == (Machine(4.0, 0.0), 0.0)
    assert read.read_gbytes > 0
    assert [reading.gflops for reading in bench.readings] == [4.0, 0.0, 0.0, 4.0]


def test_list_names_every_case(capsys):
    bench_layer.main(["--list"])
    printed = capsys.readouterr().out
    assert all(f"{name} " in printed for name in (*CASES, *CLAIMS))


@pytest.fixture
def narrow(monkeypatch):
    """Layers of the claims made small, except for their experts; there is memory for their true sizes, too."""
    monkeypatch.setattr(layer_claims.machine, "memory_budget", lambda: 64 << 30)
    right = layer_claims.make_problem

    def make_problem(shape, *arguments):
        return right(replace(shape, hidden_size=16, intermediate_size=16, num_tokens=64), *arguments)

    monkeypatch.setattr(layer_claims, "make_problem", make_problem)


def test_every_claim_is_measured(tmp_path, narrow, capsys):
    lines = run(tmp_path, "--case", ",".join(CLAIMS), "--markdown")
    assert {line["case"] for line in lines} == set(CLAIMS)
    assert all(line["median_ms"] and line["ratio"] > 0 and line["must"] >= line["aim"] for line in lines)
    (growing,) = [x for x in lines if (x["case"], x["dtype"], x["routing"]) == ("experts-8-to-256", "fp32", "zipf")]
    assert list(growing["median_ms"]) == [f"{experts} experts" for experts in layer_claims.EXPERTS]
    printed = capsys.readouterr().out
    assert "stages-seed bf16 zipf: route + plan + combine / layer" in printed
    assert "| route-plan-linear |" in printed


def test_claims_are_ratios_of_their_medians(monkeypatch, narrow):
    seconds = {"layer": 2.0, "route": 0.5, "plan": 0.25, "combine": 0.25, "T, E": 1.0, "2T, E": 2.5, "T, 2E": 3.0}
    seconds |= {f"{experts} experts": float(experts) for experts in layer_claims.EXPERTS}
    monkeypatch.setattr(
        layer_claims, "interleave", lambda calls, **_: {name: Timing((seconds[name],), (0.0,)) for name in calls}
    )
    bench = Bench(Display())
    claims = layer_claims.run_claims(bench, tuple(CLAIMS), ["fp32"], ["uniform"], 1, 0)
    values = [(claim.case, claim.value) for claim in claims]
    stages = [(f"stages-{name}", 0.5) for name in ("seed", "mixtral", "qwen3")]
    rest = [("experts-8-to-256", 32.0), ("experts-2048", 0.375)]
    assert values == [*stages, *rest, ("route-plan-linear", 2.5), ("route-plan-linear", 3.0)]
    assert all(claim.verdict == "MISSED" for claim in claims)
    assert all(replace(claim, noise=0.5).verdict == "noisy" for claim in claims)


def test_a_claim_too_large_is_left_out_and_said(monkeypatch, capsys):
    monkeypatch.setattr(layer_claims.machine, "memory_budget", lambda: 1000)
    bench_layer.main(["--case", "experts-2048,experts-8-to-256", "--dtype", "fp32", "--routing", "zipf"])
    printed = capsys.readouterr().out
    assert "not run: experts-2048, 2048 experts in fp32 need 1." in printed
    assert "not run: experts-8-to-256, 256 experts in fp32 need 0." in printed


def test_unknown_names_are_refused(capsys):
    with pytest.raises(SystemExit):
        bench_layer.main(["--case", "seed-t1,seed-t2"])
    assert "expected some of " in capsys.readouterr().err
