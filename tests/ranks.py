"""Runs a script of tests/distributed once per rank, and shows what a rank that failed has to say."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent / "distributed"
# What pyproject.toml asks of the tests; the second is what torch says on Python 3.13.0 of whatever it compiles.
PYTHON = [sys.executable, "-W", "error", "-W", "ignore:Guards may run slower on Python 3.13.0:RuntimeWarning"]
needs_distributed = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this torch was built without torch.distributed"
)


def run_ranks(script: str, world_size: int, path: Path, *arguments: str, timeout: int = 900) -> None:
    """Run ``script`` with the arguments rank, world_size, a path for the store, and ``arguments``; one thread each.

    The timeout is for ranks that wait for ever: on a busy machine those that do not have taken 213 s.
    """
    command = [*PYTHON, str(FOLDER / script)]
    options = {"stderr": subprocess.PIPE, "text": True, "env": {**os.environ, "OMP_NUM_THREADS": "1"}}
    ranks = [
        subprocess.Popen([*command, str(rank), str(world_size), str(path / "store"), *arguments], **options)
        for rank in range(world_size)
    ]
    try:
        errors = [rank.communicate(timeout=timeout)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * world_size, "\n".join(errors)
