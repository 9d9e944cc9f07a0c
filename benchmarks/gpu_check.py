"""Prove and measure the CUDA kernels on this machine's GPU, in one command and within nine minutes.

    make gpu-check                                     # also: torch-moe gpu-check
    make gpu-check GPU_ARGS='--only build,bench'

Builds the package with the torch (>= 2.10) and the nvcc (>= 12.4) that are there, downloads nothing, then in order: the
instruction conformance and kernel tests on the device, the Python tests with --device cuda, compute-sanitizer on small
shapes, the benchmarks. What a machine lacks is skipped and says why. With a GPU the outcome is written to
benchmarks/results/gpu-<name>-<date>.jsonl, and a summary beside it.
"""

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import gpu_parts
from gpu_parts import ROOT, Check, Outcome
from gpu_summary import summary

BUDGET = 530.0  # seconds in all, a little under nine minutes
# Seconds that a part may take at most, and what the parts before it must leave it.
MOST = {"build": 200.0, "kernels": 120.0, "tests": 150.0, "sanitizer": 60.0, "bench": 300.0}
LEAST = {"build": 0.0, "kernels": 60.0, "tests": 80.0, "sanitizer": 20.0, "bench": 120.0}


def ask_driver(what: str) -> str:
    """Return what nvidia-smi says of the first GPU, or ""."""
    if shutil.which("nvidia-smi") is None:
        return ""
    command = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    return answer.stdout.splitlines()[0].strip() if answer.returncode == 0 and answer.stdout.strip() else ""


def architectures(capability: str) -> str:
    """Return what to compile for a compute capability: "9.0" has instructions of its own, others since 8.0 share."""
    if not re.fullmatch(r"\d+\.\d", capability):
        return ""
    return "90a-real" if capability == "9.0" else "80"


def commit() -> str:
    """Return the short commit of the checkout, marked where files differ from it, or "" outside of one."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--exclude=*", "--abbrev=12", "--dirty=+changes"]
    if shutil.which("git") is None:
        return ""
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    return answer.stdout.strip()


def only(text: str) -> tuple[str, ...]:
    """Parse the names of parts, and put them in their order."""
    names = text.split(",")
    unknown = [name for name in names if name not in gpu_parts.PARTS]
    if unknown:
        raise argparse.ArgumentTypeError(f"must be among {','.join(gpu_parts.PARTS)}, got {unknown[0]!r}")
    return tuple(name for name in gpu_parts.PARTS if name in names)


def check(parts: Sequence[str], *, quick: bool, gpu: str, budget: float = BUDGET) -> dict[str, Outcome]:
    """Run the parts, each within what the budget leaves it; a part that fails does not stop those after it."""
    end = time.monotonic() + budget
    later = {name: sum(LEAST[part] for part in parts[place + 1 :]) for place, name in enumerate(parts)}

    def limit(part: str) -> float:
        return max(5.0, min(MOST[part], end - time.monotonic() - later[part]))

    told = Check(quick=quick, limit=limit, gpu=gpu, architectures=architectures(ask_driver("compute_cap")))
    outcomes: dict[str, Outcome] = {}
    for name in parts:
        print(f"\n== {name}", flush=True)
        start = time.monotonic()
        if outcomes.get("build", Outcome("passed")).status != "passed" and name in ("tests", "sanitizer", "bench"):
            outcomes[name] = Outcome("skipped", "the package was not built")
        else:
            outcomes[name] = gpu_parts.PARTS[name](told)
        result = outcomes[name]
        reason = f": {result.reason}" if result.reason else ""
        print(f"== {name} {result.status} in {time.monotonic() - start:.0f} s{reason}", flush=True)
        result.records.append({"status": result.status, "reason": result.reason})
    return outcomes


def write(outcomes: dict[str, Outcome], gpu: str, folder: Path) -> Path:
    """Write one JSON object per line and the summary beside it; return the path of the lines."""
    day = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    stem = "-".join(["gpu", *gpu.lower().split(), day])
    folder.mkdir(parents=True, exist_ok=True)
    shared = {"date": day, "commit": commit(), "gpu": gpu}
    path = folder / f"{stem}.jsonl"
    with path.open("a", encoding="utf-8") as file:
        for part, result in outcomes.items():
            file.writelines(json.dumps({**shared, "part": part, **record}) + "\n" for record in result.records)
    path.with_suffix(".txt").write_text(summary(outcomes, gpu) + "\n", encoding="utf-8")
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what was asked for; 0 unless a part failed or ran out of time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ",".join(gpu_parts.PARTS)
    parser.add_argument("--only", type=only, default=tuple(gpu_parts.PARTS), help=f"some of {parts}")
    parser.add_argument("--quick", action="store_true", help="fewer tests, tools and cases")
    parser.add_argument("--budget", type=float, default=BUDGET, help=f"seconds in all (default: {BUDGET:.0f})")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results", help="folder of the results")
    options = parser.parse_args(arguments)
    os.environ["PATH"] = gpu_parts.with_tools(os.environ.get("PATH", os.defpath))
    gpu = ask_driver("name")
    print(f"GPU: {gpu or 'none: what needs one is skipped'}; Python {sys.version.split()[0]} at {sys.executable}")
    outcomes = check(options.only, quick=options.quick, budget=options.budget, gpu=gpu)
    print("\n" + summary(outcomes, gpu))
    if gpu:
        print(f"written to {write(outcomes, gpu, options.output)}")
    return int(any(result.status in ("failed", "timed out") for result in outcomes.values()))


if __name__ == "__main__":
    raise SystemExit(main())
