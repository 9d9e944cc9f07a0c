"""The benchmark over simulated machines: it runs, its results are right, or it says why it cannot run."""

import json
import subprocess
import sys
from pathlib import Path

import ep_network
import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "bench_expert_parallel_network.py"


def test_missing_tools_are_named(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert ep_network.why_not() == "ip is not installed (package iproute2)"


@pytest.mark.slow
def test_all_schedules_between_two_machines(tmp_path):
    """Every rank verifies every schedule, output and gradient, against the whole layer and fails otherwise."""
    reason = ep_network.why_not()
    if reason is not None:
        pytest.skip(f"cannot simulate machines: {reason}")
    output = tmp_path / "network.jsonl"
    command = [sys.executable, str(SCRIPT), "--mbit", "1000", "--rounds", "1", "--intermediate", "64"]
    command += ["--tokens", "64", "--hidden", "32", "--experts", "8"]
    subprocess.run([*command, "--output", str(output)], check=True, timeout=240)
    record = json.loads(output.read_text())
    assert record["mbit"] == 1000
    for name in ("forward", "forward_backward"):
        times = record[name]["ms"]
        assert all(milliseconds > 0 for milliseconds in times.values())
        assert {"serial", "chunks-8", "k-copies", "all-gather"} <= times.keys()
        assert record[name]["tuned_chunks"] >= 1
