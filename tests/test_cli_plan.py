"""torch-moe plan: its table counts what it says, and refuses what has no answer."""

import json

import pytest

from torch_moe import param_report
from torch_moe.cli import main
from torch_moe.cli.plan import all_to_all_bytes
from torch_moe.cli.shapes import SHAPES
from torch_moe.presets import PRESETS


def plan_json(capsys, *arguments):
    assert main(["plan", "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("name", PRESETS)
def test_published_row_is_the_report(capsys, name):
    rows = {row["num_experts"]: row for row in plan_json(capsys, "--preset", name, "--dtype", "fp32")}
    router = PRESETS[name].moe.router
    assert len(rows) >= 3
    row, report = rows[router.num_experts], param_report(name)
    assert (row["total"], row["active"]) == (report.total, report.active)
    assert row["weight_bytes"] == 4 * report.total
    assert row["training_bytes"] == 16 * report.total


def test_capacity_grows_and_work_stays(capsys):
    rows = plan_json(capsys, "--preset", "mixtral-8x7b", "--experts", "8,16,64")
    routers = [32 * 4096 * number for number in (8, 16, 64)]
    assert len({row["active"] - router for row, router in zip(rows, routers, strict=True)}) == 1
    assert [row["total"] for row in rows] == sorted({row["total"] for row in rows})
    assert {row["all_to_all_bytes"] for row in rows} == {2 * 4096 * 2 * 4096 * 2 * 7 // 8}


def test_free_numbers(capsys):
    (row,) = plan_json(
        capsys, "--hidden-size", "64", "--intermediate-size", "32", "--experts", "6", "--top-k", "2", "--layers", "3",
        "--dtype", "fp16", "--ep-size", "4", "--tokens", "10",
    )  # fmt: skip
    expert = 3 * 64 * 32
    assert row["total"] == 3 * (6 * expert + 6 * 64)
    assert row["active"] == 3 * (2 * expert + 6 * 64)
    assert row["flops_per_token"] == 2 * row["active"]
    assert row["rank_weight_bytes"] == 2 * 3 * (2 * expert + 6 * 64)  # the largest of four ranks has two experts
    assert row["all_to_all_bytes"] == all_to_all_bytes(10, 2, 64, 2, 4) == 2 * 10 * 2 * 64 * 2 * 3 // 4
    assert all_to_all_bytes(10, 2, 64, 2, 1) == 0


def test_table(capsys):
    assert main(["plan", "--preset", "deepseek-v3"]) == 0
    printed = capsys.readouterr().out
    for part in ("671.026", "37.5", "256 *", "all-to-all MiB", "arXiv 2412.19437", "as published"):
        assert part in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --preset, or also --hidden-size, --intermediate-size, --top-k, --experts"),
        (["--hidden-size", "64", "--top-k", "2"], "or also --intermediate-size, --experts"),
        (["--preset", "mixtral-8x7b", "--layers", "3"], "--preset has its own --layers"),
        (["--preset", "mixtral-8x7b", "--experts", "1"], "top_k must be in"),
        (["--preset", "deepseek-v3", "--experts", "100"], "num_groups must divide num_experts = 100"),
        (["--preset", "gpt-4"], "invalid choice: 'gpt-4'"),
    ],
)
def test_bad_options(capsys, arguments, message):
    with pytest.raises(SystemExit) as raised:
        main(["plan", *arguments])
    assert raised.value.code == 2
    assert message in capsys.readouterr().err


def test_the_bench_reads_its_shapes_from_the_presets():
    for name, preset in (("mixtral", "mixtral-8x7b"), ("gpt-oss", "gpt-oss-20b"), ("switch", "switch-base-64")):
        shape, moe = SHAPES[name], PRESETS[preset].moe
        assert (shape.hidden_size, shape.intermediate_size) == (moe.experts.hidden_size, moe.experts.intermediate_size)
        assert (shape.num_experts, shape.top_k) == (moe.router.num_experts, moe.router.top_k)
        assert (shape.activation, shape.limit) == (moe.experts.activation, moe.experts.limit)
        assert shape.score_order == moe.router.score_order
