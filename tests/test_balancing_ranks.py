"""Counts are summed over a process group: two real processes over gloo."""

from ranks import needs_distributed, run_ranks

pytestmark = needs_distributed


def test_two_ranks(tmp_path):
    run_ranks("balancing.py", 2, tmp_path)
