"""`torch-moe bench --ep`: the traffic of many ranks counted, and a run by torchrun."""

import json
import os
import subprocess
import sys
import time

import pytest
from ranks import needs_distributed

from torch_moe.cli import main
from torch_moe.cli.expert_parallel import expected_ranks


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


def test_uneven_experts_in_the_formula():
    assert expected_ranks(3, 2, 1) == pytest.approx(1.0)
    assert expected_ranks(3, 2, 3) == pytest.approx(2.0)
    assert expected_ranks(5, 4, 5) == pytest.approx(3.0)  # the fourth rank has none


def test_without_ranks_it_says_how(capsys, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(SystemExit):
        main(["bench", "--ep"])
    assert "torchrun --nproc-per-node 4 -m torch_moe bench --ep" in capsys.readouterr().err


@needs_distributed
def test_torchrun(tmp_path):
    output = tmp_path / "ep.jsonl"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "torch_moe",
    ]
    command += ["bench", "--ep", "--tokens", "16", "--rounds", "1", "--chunks", "2", "--output", str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    record = json.loads(output.read_text())
    assert record["ranks"] == 2
    assert record["ms"].keys() == {"forward", "forward+backward"}
