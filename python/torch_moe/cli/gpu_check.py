"""`torch-moe gpu-check`: hands over to the checkout's own program, which builds the kernels before it measures them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from torch_moe.cli.errors import UsageError

PROGRAM = Path("benchmarks/gpu_check.py")


def run(arguments: Sequence[str]) -> int:
    """Run the program of the checkout in the current folder with these arguments, and return its exit code.

    Raises
    ------
    UsageError
        Outside of a checkout: the tests and the sources to build are not in the installed package.
    """
    if not PROGRAM.is_file():
        raise UsageError(f"gpu-check runs in a checkout of torch-moe, where {PROGRAM} is, got {Path.cwd()}")
    return subprocess.run([sys.executable, str(PROGRAM), *arguments], check=False).returncode
