"""`torch-moe bench --ep`: the traffic of many ranks counted, and a run by torchrun."""

import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
import torch
from ranks import needs_distributed
from torch.testing._internal.distributed.fake_pg import FakeStore

from torch_moe import MoE
from torch_moe.cli import machine, main
from torch_moe.cli.expert_parallel import expected_ranks, group_copies
from torch_moe.distributed import ExpertParallel, exchange
from torch_moe.testing import routing


@contextmanager
def group_that_sends_nothing(ranks):
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield torch.distributed.group.WORLD
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture
def copies():
    """Skip where torch's group that sends nothing leaves what a rank receives as it was: no layer runs on that."""
    with group_that_sends_nothing(2):
        if not group_copies():
            pytest.skip(f"torch {torch.__version__} copies nothing in its fake group")


def assert_same_machine(record):
    """A record says of the run what every record does."""
    here = {name: value for name, value in machine.describe().items() if name != "date"}
    assert "date" in record
    assert {name: record[name] for name in here} == here


def count(capsys, *arguments):
    assert main(["bench", "--ep", "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)[0]


@pytest.mark.parametrize(("ranks", "fewer"), [(2, 4.0), (4, 2.2), (8, 1.5)])
def test_bytes_agree_with_the_formula(capsys, ranks, fewer):
    record = count(capsys, "--shape", "deepseek-v3", "--dtype", "bf16", "--tokens", "2048", "--ranks", str(ranks))
    assert record["ranks_per_token"] == pytest.approx(record["ranks_per_token_formula"], rel=0.01)
    assert round(record["fewer_rows_than_copies"], 1) == fewer


def test_1024_ranks_are_counted_in_seconds(capsys):
    start = time.process_time()
    record = count(capsys, "--shape", "deepseek-v3", "--tokens", "16", "--experts", "2048", "--ranks", "1024")
    assert time.process_time() - start < 30
    assert record["ranks_per_token"] == pytest.approx(record["ranks_per_token_formula"], rel=0.01)
    assert 1 <= record["received_rows_most_over_mean"] < 2


@needs_distributed
def test_a_layer_of_1024_ranks_is_built(capsys, copies):
    """What is counted agrees with what that layer holds, and hands to the exchange."""
    record = count(capsys, "--shape", "deepseek-v3", "--tokens", "16", "--experts", "2048", "--ranks", "1024")
    assert record["gate_up_proj_of_rank_0"] == [2, 4096, 7168]
    assert record["mib_of_experts_on_rank_0"] == 2 * 3 * 2048 * 7168 * 4 / 2**20
    assert record["rows_of_rank_0"] == pytest.approx(16 * record["ranks_per_token"], rel=0.02)
    assert record["bytes_per_row"] == 7168 * 4 + 8 * (4 + 4)
    there_and_back = record["bytes_per_row"] + 7168 * 4
    away = record["ranks_per_token"] * (1 - 1 / 1024)
    assert record["off_rank_bytes_per_token"] == pytest.approx(there_and_back * away, rel=1e-3)


@needs_distributed
def test_a_layer_of_1024_ranks_runs_on_one(copies):
    """Every rank is told, and sends, what rank 0 sends to itself."""
    ranks, local, tokens = 1024, 2, 512
    with group_that_sends_nothing(ranks) as group:
        layer = ExpertParallel(MoE(16, 8, ranks * local, 8), group, num_chunks=2)
        x = torch.randn(tokens, 16).requires_grad_()
        ids = routing("uniform", tokens, ranks * local, 8, seed=1)
        to_itself = ((ids < local).any(dim=1)).view(2, -1).sum(dim=1)
        assert (to_itself > 0).all()  # the group copies the first rank's rows
        sent = layer.experts.send(x, torch.rand(tokens, 8), ids)
        assert [len(exchange.wait(rows)) for rows in sent.received] == (ranks * to_itself).tolist()
        output = layer(x, route_override=ids)
        output.sum().backward()
        assert output.shape == x.grad.shape == x.shape
        assert layer.experts.down_proj.shape == (ranks * local, 16, 8)
        assert layer.experts.down_proj.grad.to_local().shape == (local, 16, 8)


def test_uneven_experts_in_the_formula():
    assert expected_ranks(3, 2, 1) == pytest.approx(1.0)
    assert expected_ranks(3, 2, 3) == pytest.approx(2.0)
    assert expected_ranks(5, 4, 5) == pytest.approx(3.0)  # the fourth rank has none


def test_without_ranks_it_says_how(capsys, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(SystemExit):
        main(["bench", "--ep"])
    assert "torchrun --nproc-per-node 4 -m torch_moe bench --ep" in capsys.readouterr().err


def test_the_output_may_be_in_a_new_folder(capsys, tmp_path):
    output = tmp_path / "new" / "ep.jsonl"
    record = count(capsys, "--tokens", "8", "--ranks", "2", "--output", str(output))
    assert json.loads(output.read_text()) == record
    assert_same_machine(record)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ep", "--ranks", "4", "--routing", "text"], "--routing must be uniform, zipf or one_expert, got text"),
        (["--ep", "--ranks", "4", "--dtype", "fp32,bf16"], "--ep takes one --dtype, got fp32,bf16"),
        (["--ep", "--ranks", "4", "--realtime"], "--ep goes with none of --plot, --transformers, --realtime"),
        (["--ranks", "4"], "--ranks and --chunks go with --ep"),
    ],
)
def test_options_that_do_not_fit_are_refused(capsys, arguments, words):
    with pytest.raises(SystemExit):
        main(["bench", *arguments])
    assert words in capsys.readouterr().err


@needs_distributed
def test_torchrun(tmp_path, one_thread):
    """GPT-OSS's activation and biases, routed by its own router on text."""
    output = tmp_path / "ep.jsonl"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command += ["torch_moe", "bench", "--ep", "--shape", "gpt-oss", "--experts", "4", "--tokens", "16"]
    command += ["--rounds", "1", "--chunks", "2", "--output", str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    record = json.loads(output.read_text())
    assert_same_machine(record)
    assert record["ranks"] == 2
    assert record["routing"] == "text"
    assert record["shape"] == "gpt-oss"
    assert record["ms"].keys() == {"forward", "forward+backward"}
