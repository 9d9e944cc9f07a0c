"""What the benchmark must know of the machine: its name for the record, its caches, its free memory."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import torch_moe
from torch_moe import _C

GIB = 1 << 30
# Assumed where the operating system does not tell.
UNKNOWN_MEMORY = 4 * GIB
# Share of the free memory that the benchmark may plan with; the rest is for temporaries and for others.
MEMORY_SHARE = 0.7


def describe() -> dict[str, Any]:
    """Return what every record says of the run: date, commit, versions, machine."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": source_commit(),
        "version": torch_moe.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": cpu_model(),
        "cores": num_cores(),
        "threads": torch.get_num_threads(),
        "isa": _C.isa(),
    }


def cpu_model() -> str:
    """Return the processor's name, as good as the operating system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def num_cores() -> int:
    """Return the number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def last_level_cache_bytes(root: Path = Path("/sys/devices/system/cpu")) -> int:
    """Return the size of the largest cache, 0 where the operating system does not tell.

    Parameters
    ----------
    root : Path, default=Path("/sys/devices/system/cpu")
        Where the kernel describes the processors.
    """
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    sizes = [0]
    for file in root.glob("cpu0/cache/index*/size"):
        try:
            text = file.read_text().strip()
            sizes.append(int(text[:-1]) * units[text[-1]])
        except (OSError, KeyError, ValueError, IndexError):
            continue
    return max(sizes)


def available_memory(root: Path = Path("/")) -> int:
    """Return how many bytes a new allocation may take before the machine swaps or a container limit kills us.

    Parameters
    ----------
    root : Path, default=Path("/")
        Where `proc` and `sys` are mounted.
    """
    limits = []
    try:
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                limits.append(int(line.split()[1]) * 1024)
    except OSError:
        pass
    for limit_file, usage_file in (
        ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory.current"),
        ("sys/fs/cgroup/memory/memory.limit_in_bytes", "sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            limits.append(int((root / limit_file).read_text()) - int((root / usage_file).read_text()))
        except (OSError, ValueError):  # absent, or "max"
            continue
    return max(0, min(limits)) if limits else UNKNOWN_MEMORY


def memory_budget() -> int:
    """Return how many bytes the benchmark may plan to hold at once."""
    return int(MEMORY_SHARE * available_memory())


def source_commit() -> str:
    """Return the short commit of the checkout the command runs in, or "" outside of one."""
    if not Path("cpp/include/moe").is_dir():
        return ""
    try:
        commit = _git("rev-parse", "--short=12", "HEAD")
        return commit + ("+changes" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], check=True, capture_output=True, text=True).stdout.strip()
