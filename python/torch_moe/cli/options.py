"""The command line, and what makes an option invalid."""

from __future__ import annotations

import argparse
from pathlib import Path

from torch_moe.cli.problem import DTYPES
from torch_moe.cli.shapes import SHAPES
from torch_moe.presets import PRESETS
from torch_moe.testing.routings import ROUTINGS

DEVICES = ("cpu",)


def add_bench_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare `torch-moe bench`."""
    parser = subparsers.add_parser(
        "bench",
        help="time the MoE layer against what one would otherwise run, on real text",
        description="Time a Mixture-of-Experts layer on real text against dense FFNs, a loop over experts and "
        "grouped_mm. Every result is verified against the fp64 reference first, and every time is "
        "shown next to this machine's measured floor.",
        epilog="Exit codes: 0 measured, 1 a result was wrong, 2 bad options.",
    )
    described = "; ".join(f"{shape.name}: {shape.source}" for shape in SHAPES.values())
    parser.add_argument("--shape", choices=tuple(SHAPES), default="seed", help=described)
    parser.add_argument("--tokens", type=_positive, help="tokens per call (default: 512)")
    parser.add_argument("--dtype", type=_dtypes, default=("fp32",), help=f"one or several of {','.join(DTYPES)}")
    parser.add_argument("--device", choices=DEVICES, default="cpu", help="where to run (default: cpu)")
    parser.add_argument(
        "--experts",
        type=_positives,
        default=(),
        help="one number: as many experts; several (8,16,32): also a table over them, where capacity grows and "
        "work stays",
    )
    parser.add_argument(
        "--routing",
        choices=("text", *ROUTINGS),
        help="text: the router decides on real text (default); others replace its choice (--ranks: default uniform)",
    )
    parser.add_argument(
        "--backward",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also time forward+backward (default: yes)",
    )
    parser.add_argument(
        "--transformers",
        action="store_true",
        help="time a Mixtral of two such layers in Hugging Face transformers, on torch-moe and on its own "
        "implementations, instead of a lone layer",
    )
    parser.add_argument(
        "--ep",
        action="store_true",
        help="expert parallelism: time the layer over the ranks that torchrun started",
    )
    parser.add_argument("--ranks", type=_positive, help="with --ep: count the traffic of so many ranks, send nothing")
    parser.add_argument("--chunks", type=_positive, default=1, help="with --ep: parts of an exchange (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, text and routing (default: 0)")
    parser.add_argument("--rounds", type=_positive, help="samples per candidate (default: as --budget allows, 3 to 25)")
    parser.add_argument(
        "--budget",
        type=_seconds,
        default=10.0,
        help="seconds for the rounds of one table, when --rounds is not given (default: 10)",
    )
    parser.add_argument("--threads", type=_positive, help="threads (default: torch's choice)")
    parser.add_argument("--realtime", action="store_true", help="timed calls in the real-time class; says if refused")
    parser.add_argument("--output", type=Path, metavar="FILE", help="append the results to FILE as JSON lines")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw a PNG (needs matplotlib)")
    parser.add_argument("--json", action="store_true", help="print JSON alone on stdout; the rest goes to stderr")


def add_plan_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare `torch-moe plan`."""
    parser = subparsers.add_parser(
        "plan",
        help="tell how parameters, operations, memory and traffic grow with the number of experts",
        description="Count a model at several numbers of experts: a published one (--preset), or layers of given "
        "sizes. Nothing is allocated.",
        epilog="Exit codes: 0 counted, 2 bad options.",
    )
    described = "; ".join(f"{preset.name}: {preset.source}" for preset in PRESETS.values())
    parser.add_argument("--preset", choices=tuple(PRESETS), metavar="NAME", help=described)
    parser.add_argument("--hidden-size", type=_positive, help="without --preset: width of a token")
    parser.add_argument("--intermediate-size", type=_positive, help="without --preset: width of an expert")
    parser.add_argument("--top-k", type=_positive, help="experts per token (default: the preset's)")
    parser.add_argument("--layers", type=_positive, help="without --preset: number of MoE layers (default: 1)")
    parser.add_argument(
        "--experts",
        type=_positives,
        default=(),
        help="numbers of experts (default: a quarter to four times the preset's)",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of weights and activations (default: bf16)")
    parser.add_argument("--ep-size", type=_positive, default=8, help="ranks that share the experts (default: 8)")
    parser.add_argument("--tokens", type=_positive, default=4096, help="tokens per rank and call (default: 4096)")
    parser.add_argument("--json", action="store_true", help="print JSON alone on stdout")


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return value


def _positives(text: str) -> tuple[int, ...]:
    return tuple(_positive(part) for part in text.split(","))


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected seconds above 0, got {text!r}")
    return value


def _dtypes(text: str) -> tuple[str, ...]:
    parts = tuple(dict.fromkeys(text.split(",")))
    for part in parts:
        if part not in DTYPES:
            raise argparse.ArgumentTypeError(f"expected some of {','.join(DTYPES)}, got {part!r}")
    return parts
