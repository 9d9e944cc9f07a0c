"""The command `torch-moe`, also `python -m torch_moe`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from torch_moe.cli.errors import UsageError, WrongResult
from torch_moe.cli.options import add_bench_parser, add_plan_parser


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, run the command and return its exit code.

    Parameters
    ----------
    argv : sequence of str or None, default=None
        Arguments without the program's name; None takes them from the command line.

    Returns
    -------
    int
        0 done, 1 a result was wrong, 130 interrupted. Bad options raise SystemExit with code 2.
    """
    parser = argparse.ArgumentParser(prog="torch-moe", description="Mixture-of-Experts layers for PyTorch.")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="command")
    add_bench_parser(subparsers)
    add_plan_parser(subparsers)
    subparsers.add_parser("explain", help="tell which kernels, ISA and threads this machine takes")
    subparsers.add_parser(
        "gpu-check", help="build, prove and measure the CUDA kernels on this machine's GPU", add_help=False
    )
    options, rest = parser.parse_known_args(argv)
    if rest and options.command != "gpu-check":  # that one has options of its own
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if options.command == "explain":
        import torch_moe

        print(torch_moe.explain())
        return 0
    from torch_moe.cli import bench, gpu_check, plan

    try:
        if options.command == "gpu-check":
            return gpu_check.run(rest)
        return plan.run(options) if options.command == "plan" else bench.run(options)
    except UsageError as error:
        parser.error(str(error))
    except WrongResult as error:
        print(f"torch-moe: wrong result: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("torch-moe: interrupted", file=sys.stderr)
        return 130
