"""The MoE FFN layer in named cases: how near each comes to the machine's floor.

Weights and routing are given; a call is the plan and the experts. Floor = max(FLOPs / measured FMA rate, bytes of the
hit experts' weights / measured read bandwidth); both are read right before and right after each sample. The percent of
the floor is the median over samples of the floor at their moment over their time; beside it stands that of the floor
which the best readings of the case make. At 16 tokens and fewer, the caches are emptied before each call. Every result
is verified against the fp64 reference before it is timed.

    python benchmarks/bench_layer.py --list
    python benchmarks/bench_layer.py --case seed-t512,switch-t512 --dtype bf16 --compare
    python benchmarks/bench_layer.py --realtime --compare --output results.jsonl --plot results.png
"""

import argparse
from itertools import groupby
from pathlib import Path

import layer_report
import torch
from layer_cases import CASES, PASSES
from layer_claims import CLAIMS, Claim, run_claims
from layer_machine import Bench
from layer_runs import Row, run_cases

from torch_moe import _C
from torch_moe.cli import machine, plot, report
from torch_moe.cli.display import Display
from torch_moe.cli.problem import DTYPES
from torch_moe.testing import ROUTINGS


def some_of(names):
    """An option that takes some of these names, separated by commas."""

    def parse(text: str) -> tuple[str, ...]:
        chosen = tuple(dict.fromkeys(text.split(",")))
        unknown = [name for name in chosen if name not in names]
        if unknown:
            raise argparse.ArgumentTypeError(f"expected some of {','.join(names)}, got {','.join(unknown)}")
        return chosen

    return parse


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="name the cases and their targets, then stop")
    parser.add_argument("--case", type=some_of((*CASES, *CLAIMS)), default=(*CASES, *CLAIMS), help="default: all")
    parser.add_argument("--dtype", type=some_of(DTYPES), help="default: those for which a case has a target")
    parser.add_argument("--pass", dest="passes", type=some_of(PASSES), default=tuple(PASSES))
    parser.add_argument("--routing", type=some_of(ROUTINGS), default=("uniform", "zipf"))
    parser.add_argument(
        "--isa", type=some_of(_C.available_isas()), default=(_C.isa(),), help="compare instruction sets"
    )
    parser.add_argument(
        "--compare", action="store_true", help="also K dense FFNs, grouped_mm, a loop, and Hugging Face's experts"
    )
    parser.add_argument("--rounds", type=int, default=15, help="samples per timing; the quieter half counts")
    parser.add_argument("--quick", action="store_true", help="three rounds, one routing")
    parser.add_argument("--realtime", action="store_true", help="timed calls in the real-time class; says if refused")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, metavar="FILE", help="append JSON lines")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw percent of the floor per case")
    parser.add_argument("--markdown", action="store_true", help="also print the table of the README")
    options = parser.parse_args(argv)
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}")
    if options.quick:
        options.rounds, options.routing = 3, options.routing[:1]
    return options


def list_cases() -> None:
    for case in CASES.values():
        shape = case.shape
        sizes = f"H {shape.hidden_size}, I {shape.intermediate_size}, E {shape.num_experts}, K {shape.top_k}"
        print(f"{case.name:<13} {sizes}, {shape.activation}{', caches flushed' if case.flushed else ''}")
        for (dtype, name), target in case.targets.items():
            print(f"    {dtype} {PASSES[name]}: peer {target.peer:g}, must {target.must:g}, aim {target.aim:g} %")
    for claim in CLAIMS.values():
        print(f"{claim.name:<17} {claim.words}")


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    if options.list:
        return list_cases()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    display = Display()
    bench = Bench(display, realtime=options.realtime)
    if options.realtime:
        display.note(bench.quiet.words)
    rows: list[Row] = []
    claims: list[Claim] = []
    by_layer = groupby((CASES[name] for name in CASES if name in options.case), key=lambda case: case.shape.name)
    try:
        for cases in [list(same) for _, same in by_layer]:
            known = dict.fromkeys(dtype for case in cases for dtype in case.dtypes())
            for dtype in options.dtype or known:
                rows += run_cases(
                    bench,
                    [case for case in cases if options.dtype or dtype in case.dtypes()],
                    dtype,
                    passes=options.passes,
                    routings=options.routing,
                    isas=options.isa,
                    compare=options.compare,
                    rounds=options.rounds,
                    seed=options.seed,
                )
        names = [name for name in CLAIMS if name in options.case]
        claims += run_claims(
            bench, names, options.dtype or ("fp32", "bf16"), options.routing, options.rounds, options.seed
        )
    except KeyboardInterrupt:
        display.note("interrupted: what follows is what was measured until now")
    if not rows and not claims:
        return display.note("nothing was measured")
    if rows:
        layer_report.show(display, rows)
    if claims:
        layer_report.show_claims(display, claims)
    write(options, rows, claims, display)


def write(options: argparse.Namespace, rows: list[Row], claims: list[Claim], display: Display) -> None:
    environment = machine.describe()
    if options.markdown:
        print(layer_report.markdown(rows, claims))
    if options.output is not None:
        report.append_jsonl(options.output, layer_report.records(rows, claims, environment))
        display.note(f"appended to {options.output}")
    if options.plot is not None and rows:
        reason = plot.why_not_plot()
        if reason is None:
            layer_report.draw(options.plot, rows, f"{environment['cpu']}, {environment['commit']}")
        display.note(reason or f"drew {options.plot}")


if __name__ == "__main__":
    main()
