"""Measure one layer: build it, verify every candidate, time them interleaved between two readings of the floor."""

from __future__ import annotations

import argparse
import gc

import torch

from torch_moe import _C
from torch_moe.cli import floor, machine, report
from torch_moe.cli.candidates import K_DENSE, TORCH_MOE, Candidate, make_candidates
from torch_moe.cli.display import Display
from torch_moe.cli.limits import Limits
from torch_moe.cli.problem import DTYPES, Problem, make_problem
from torch_moe.cli.results import FORWARD, FORWARD_BACKWARD, LayerResult, Measurement, Stage
from torch_moe.cli.shapes import LayerShape
from torch_moe.cli.stages import stage_calls
from torch_moe.cli.verify import verify
from torch_moe.testing.timing import Observe, Timing, interleave, noise

# Shares of --budget: each direction of the main table, the stages, one row of the scaling table.
DIRECTION_SHARE, STAGES_SHARE, SCALING_SHARE = 0.5, 0.2, 0.2


def measure_layer(
    display: Display, options: argparse.Namespace, shape: LayerShape, dtype: str, observe: Observe
) -> LayerResult:
    """Measure all candidates in one shape and dtype, and the stages.

    Parameters
    ----------
    display : Display
        Shows progress and what was reduced or left out.
    options : argparse.Namespace
        Of `torch-moe bench`.
    shape : LayerShape
        The layer asked for; one with fewer experts is measured when memory is short.
    dtype : {"fp32", "bf16", "fp16"}
        Of weights and input.
    observe : callable
        Runs each sample: :class:`torch_moe.testing.quiet.Quiet`.

    Raises
    ------
    WrongResult
        If a candidate differs from the reference.
    UsageError
        If no layer of this kind fits into memory.
    """
    limits, before = _limits(display, options, dtype, backward=options.backward)
    shape, reduced = limits.fit(shape, DTYPES[dtype].itemsize)
    if reduced is not None:
        display.note(reduced)
    problem = _build(display, options, shape, dtype, limits)
    candidates, skipped = make_candidates(problem)
    _verify(display, problem, candidates, backward=options.backward)

    share = DIRECTION_SHARE * options.budget
    timings = {FORWARD: _time(display, options, problem, candidates, FORWARD, share, observe)}
    if options.backward:
        timings[FORWARD_BACKWARD] = _time(display, options, problem, candidates, FORWARD_BACKWARD, share, observe)
    with display.progress("timing the stages") as on_sample:
        stages = interleave(
            stage_calls(problem),
            rounds=options.rounds,
            budget=STAGES_SHARE * options.budget,
            on_sample=on_sample,
            observe=observe,
        )
    return _result(options, problem, dtype, before, candidates, timings, stages, skipped)


def measure_scaling(
    display: Display, options: argparse.Namespace, shape: LayerShape, dtype: str, observe: Observe
) -> LayerResult | None:
    """Measure the forward of the layer and of K x dense alone; None, with a note, when memory is short."""
    limits, before = _limits(display, options, dtype, backward=False)
    needed = limits.bytes_needed(shape, DTYPES[dtype].itemsize)
    if needed > limits.memory:
        display.note(
            f"not run: {shape.num_experts} experts: would need {needed / machine.GIB:.1f} GiB, "
            f"{limits.memory / machine.GIB:.1f} GiB may be used"
        )
        return None
    problem = _build(display, options, shape, dtype, limits)
    candidates, _ = make_candidates(problem, only=(TORCH_MOE, K_DENSE))
    _verify(display, problem, candidates, backward=False)
    timings = {FORWARD: _time(display, options, problem, candidates, FORWARD, SCALING_SHARE * options.budget, observe)}
    return _result(options, problem, dtype, before, candidates, timings, {}, {})


def _limits(
    display: Display, options: argparse.Namespace, dtype: str, *, backward: bool
) -> tuple[Limits, floor.Machine]:
    gc.collect()  # the last layer's weights
    memory = machine.memory_budget()
    with display.progress("measuring the machine's floor"):
        measured = floor.measure(DTYPES[dtype], memory)
    return Limits(memory, options.budget, measured.gflops, backward), measured


def _build(display: Display, options: argparse.Namespace, shape: LayerShape, dtype: str, limits: Limits) -> Problem:
    display.note()
    display.note(
        f"{shape.name} ({shape.source}), {dtype}: hidden {shape.hidden_size}, intermediate {shape.intermediate_size}, "
        f"{shape.num_experts} experts, top_k {shape.top_k}, {shape.num_tokens} tokens"
    )
    with display.progress("drawing weights, reading text"):
        problem = make_problem(shape, dtype, options.routing, options.seed, limits)
    report.show_load(display, problem.tokens_per_expert, options.routing)
    return problem


def _verify(display: Display, problem: Problem, candidates: list[Candidate], *, backward: bool) -> None:
    with display.progress("verifying against the fp64 reference"):
        compared = verify(problem, candidates, backward=backward)
    what = "outputs and gradients" if backward else "outputs"
    display.note(f"verified: {what} of {len(candidates)} candidates on {compared} tokens")


def _time(
    display: Display,
    options: argparse.Namespace,
    problem: Problem,
    candidates: list[Candidate],
    direction: str,
    budget: float,
    observe: Observe,
) -> dict[str, Timing]:
    backward = direction == FORWARD_BACKWARD
    calls = {c.name: c.backward_call(problem) if backward else c.forward_call(problem) for c in candidates}
    with display.progress(f"timing {direction}") as on_sample, torch.no_grad():
        return interleave(calls, rounds=options.rounds, budget=budget, on_sample=on_sample, observe=observe)


def _result(
    options: argparse.Namespace,
    problem: Problem,
    dtype: str,
    before: floor.Machine,
    candidates: list[Candidate],
    timings: dict[str, dict[str, Timing]],
    stages: dict[str, Timing],
    skipped: dict[str, str],
) -> LayerResult:
    """Read the floor once more: others may have used the machine during the first reading."""
    measured = before.best(floor.measure(DTYPES[dtype], problem.limits.memory))
    measurements = []
    for direction, by_name in timings.items():
        for candidate in candidates:
            work = candidate.work_with_backward if direction == FORWARD_BACKWARD else candidate.work
            timing = by_name[candidate.name]
            ratio = timing.ratio_to(by_name[K_DENSE])
            quiet = timing.quietest()
            measurements.append(Measurement(candidate.name, direction, quiet, work, work.floor(measured), ratio))
    return LayerResult(
        shape=problem.shape,
        dtype=dtype,
        routing=options.routing,
        tokens_per_expert=problem.tokens_per_expert,
        machine=measured,
        kernel=_C.kernel(max(problem.tokens_per_expert), "out_in", str(DTYPES[dtype]).removeprefix("torch.")),
        measurements=tuple(measurements),
        stages=tuple(Stage(name, timing.quietest()) for name, timing in stages.items()),
        skipped=skipped,
        noise=noise({f"{m.candidate} {m.direction}": m.timing for m in measurements}),
    )
