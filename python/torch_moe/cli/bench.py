"""The main job: measure a layer in each dtype, then over several numbers of experts, and report."""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch

import torch_moe
from torch_moe.cli import expert_parallel, host, machine, plot, report
from torch_moe.cli.display import Display
from torch_moe.cli.errors import UsageError
from torch_moe.cli.floor import spin
from torch_moe.cli.measure import measure_layer, measure_scaling
from torch_moe.cli.results import LayerResult, records
from torch_moe.cli.shapes import SHAPES, LayerShape
from torch_moe.testing.quiet import Quiet


def run(options: argparse.Namespace) -> int:
    """Run `torch-moe bench` and return the exit code.

    Raises
    ------
    UsageError
        If options do not fit together or this machine.
    WrongResult
        If a candidate differs from the reference.
    """
    shape, scaled = _shapes(options)
    if options.ep:
        if options.plot is not None or scaled or options.transformers or options.realtime:
            raise UsageError("--ep goes with none of --plot, --transformers, --realtime, or a table over --experts")
        return expert_parallel.run(options, shape)
    if options.ranks is not None or options.chunks != 1:
        raise UsageError("--ranks and --chunks go with --ep")
    options.routing = options.routing or "text"
    if options.plot is not None and options.plot.suffix.lower() != ".png":
        raise UsageError(f"--plot draws a PNG: name a file that ends in .png, got {str(options.plot)!r}")
    if options.transformers and (options.plot is not None or scaled or options.routing != "text"):
        raise UsageError("--transformers times a whole model: it goes with neither --plot nor --routing nor a table")
    display = Display(json_only=options.json)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    quiet = Quiet(spin, realtime=options.realtime)
    if options.realtime:
        display.note(quiet.words)

    environment = machine.describe()
    display.note(
        f"torch-moe {torch_moe.__version__}, torch {torch.__version__}, {environment['cpu']}, "
        f"{environment['threads']} threads, ISA {environment['isa']}"
    )
    if options.transformers:
        hosts = []
        for dtype in options.dtype:
            hosts.append(host.measure(display, options, shape, dtype, quiet))
            host.show(display, hosts[-1])
        report.write(display, options, host.records(hosts, environment))
        return 0
    results: list[LayerResult] = []
    for dtype in options.dtype:
        results.append(measure_layer(display, options, shape, dtype, quiet))
        report.show_layer(display, results[-1])
    measured = [measure_scaling(display, options, larger, options.dtype[0], quiet) for larger in scaled]
    scaling = [result for result in measured if result is not None]
    if scaling:
        report.show_scaling(display, scaling)

    if options.plot is not None:
        reason = plot.why_not_plot()
        if reason is None:
            plot.draw(options.plot, results, scaling)
        display.note(reason or f"drew {options.plot}")
    report.write(display, options, records(results + scaling, environment))
    return 0


def _shapes(options: argparse.Namespace) -> tuple[LayerShape, list[LayerShape]]:
    """Return the layer of the main table and those of the scaling table."""
    shape = SHAPES[options.shape]
    if options.tokens is not None:
        shape = replace(shape, num_tokens=options.tokens)
    if len(options.experts) == 1:
        return shape.with_experts(options.experts[0]), []
    return shape, [shape.with_experts(number) for number in options.experts]
