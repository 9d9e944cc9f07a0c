"""What must stay small: the stages around the GEMMs as a share of the layer, and time as experts or tokens grow.

Here the layer has its router. Stages are timed as the operators that they are; in the layer, the sum of combine happens
inside the second GEMM, so the share of the stages is an upper bound.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
from layer_machine import NOISY, Bench

from torch_moe import ops
from torch_moe.cli import machine
from torch_moe.cli.limits import Limits
from torch_moe.cli.problem import DTYPES, Problem, make_problem
from torch_moe.cli.shapes import SHAPES, LayerShape
from torch_moe.testing.timing import Timing, interleave

SWITCH_2048 = LayerShape(
    name="switch-2048",
    source="Switch-C's number of experts, arXiv 2101.03961, made narrow",
    hidden_size=256,
    intermediate_size=256,
    num_experts=2048,
    top_k=1,
    renormalize=False,
)
GROWING = LayerShape(
    name="growing", source="capacity grows", hidden_size=256, intermediate_size=512, num_experts=8, top_k=2
)
EXPERTS = (8, 16, 32, 64, 128, 256)
# What the clock, and one more pass over a few counters, may add to a doubling.
LINEAR = 2.3


@dataclass(frozen=True)
class Claim:
    """A ratio of medians that must not exceed `must`; shares are fractions of the layer's time."""

    case: str
    what: str
    dtype: str
    routing: str
    value: float
    must: float
    aim: float
    milliseconds: dict[str, float]
    noise: float

    @property
    def verdict(self) -> str:
        if self.noise > NOISY:
            return "noisy"
        return "MISSED" if self.value > self.must else "must" if self.value > self.aim else "aim"


@dataclass(frozen=True)
class ClaimCase:
    """A function that measures claims in a dtype, and the words for --list."""

    name: str
    words: str
    measure: Callable[..., list[Claim]]
    once: bool = False  # of no dtype and no routing


def run_claims(
    bench: Bench, names: Sequence[str], dtypes: Sequence[str], routings: Sequence[str], rounds: int, seed: int
) -> list[Claim]:
    """Measure each case in each dtype and routing."""
    found = []
    for name in names:
        case = CLAIMS[name]
        for dtype, routing in [("", "")] if case.once else product(dtypes, routings):
            with bench.display.progress(f"{name} {dtype} {routing}".rstrip()):
                found += case.measure(_Run(bench, name, dtype, routing, rounds, seed))
    return found


@dataclass(frozen=True)
class _Run:
    bench: Bench
    name: str
    dtype: str
    routing: str
    rounds: int
    seed: int

    def problem(self, shape: LayerShape) -> Problem | None:
        """Build a layer; None, with a note, when memory is short."""
        limits = Limits(machine.memory_budget(), 0.0, 0.0, False)
        needed = limits.bytes_needed(shape, DTYPES[self.dtype].itemsize)
        if needed <= limits.memory:
            return make_problem(shape, self.dtype, self.routing, self.seed, limits)
        self.bench.display.note(
            f"not run: {self.name}, {shape.num_experts} experts in {self.dtype} need {needed / machine.GIB:.1f} GiB, "
            f"{limits.memory / machine.GIB:.1f} GiB may be used"
        )
        return None

    def time(self, calls: dict[str, Callable[[], object]]) -> dict[str, Timing]:
        quiet = {name: torch.no_grad()(call) for name, call in calls.items()}
        timings = interleave(quiet, rounds=self.rounds, observe=self.bench.quiet)
        return {name: timing.quietest() for name, timing in timings.items()}

    def claim(self, what: str, value: float, must: float, aim: float, timings: dict[str, Timing]) -> Claim:
        medians = {name: timing.median * 1e3 for name, timing in timings.items()}
        noise = max(statistics.median(timing.noise) for timing in timings.values())
        return Claim(self.name, what, self.dtype, self.routing, value, must, aim, medians, noise)


def _stages(problem: Problem) -> dict[str, Callable[[], object]]:
    """Return the stages around the GEMMs, on the input they would get."""
    shape, x, ids = problem.shape, problem.hidden_states, problem.topk_ids
    with torch.no_grad():
        logits, topk_weights, _ = problem.layer.router(x)
        plan = ops.plan(ids, shape.num_experts)
        rows = ops.permute(x, plan)
    bias, options = problem.weights.expert_bias, shape.router_options()
    return {
        "route": lambda: ops.route(logits, shape.top_k, bias, **options),
        "plan": lambda: ops.plan(ids, shape.num_experts),
        "combine": lambda: ops.combine(rows, topk_weights, plan),
    }


def _share(shape: LayerShape, stages: Sequence[str], must: float, aim: float) -> Callable[[_Run], list[Claim]]:
    def measure(run: _Run) -> list[Claim]:
        problem = run.problem(shape)
        if problem is None:
            return []
        calls = {name: call for name, call in _stages(problem).items() if name in stages}
        timings = run.time({"layer": lambda: problem.forward(problem.hidden_states), **calls})
        value = sum(timings[name].median for name in stages) / timings["layer"].median
        return [run.claim(f"{' + '.join(stages)} / layer", value, must, aim, timings)]

    return measure


def _growing(run: _Run) -> list[Claim]:
    problems = {}
    for experts in EXPERTS:
        problem = run.problem(replace(GROWING, num_experts=experts, num_tokens=4096))
        if problem is not None:
            problems[f"{experts} experts"] = replace(problem, given_routing=True)
    if len(problems) < 2:
        return []
    timings = run.time({name: _routed(problem) for name, problem in problems.items()})
    first, *_, last = timings
    return [run.claim(f"{last} / {first}", timings[last].median / timings[first].median, 1.25, 1.1, timings)]


def _routed(problem: Problem) -> Callable[[], object]:
    return lambda: problem.forward_routed(problem.hidden_states, problem.topk_weights, problem.topk_ids)


def _linear(run: _Run) -> list[Claim]:
    """Twice the tokens, then twice the experts: what route and plan take together."""
    logits = {
        name: torch.randn(tokens, experts)
        for name, tokens, experts in (("T, E", 4096, 2048), ("2T, E", 8192, 2048), ("T, 2E", 4096, 4096))
    }

    def route_and_plan(values: torch.Tensor) -> Callable[[], object]:
        return lambda: ops.plan(ops.route(values, SWITCH_2048.top_k)[1], values.shape[1])

    timings = run.time({name: route_and_plan(values) for name, values in logits.items()})
    base = timings["T, E"].median
    return [
        run.claim(f"route + plan of {name} / T, E", timings[name].median / base, LINEAR, 2.0, timings)
        for name in ("2T, E", "T, 2E")
    ]


def _shape(name: str, num_tokens: int) -> LayerShape:
    return replace(SHAPES[name], num_tokens=num_tokens)


ALL, EARLY = ("route", "plan", "combine"), ("route", "plan")
CLAIMS = {
    case.name: case
    for case in (
        ClaimCase("stages-seed", "share of the stages, T 512: <= 3 %", _share(_shape("seed", 512), ALL, 0.03, 0.02)),
        ClaimCase("stages-mixtral", "the same on Mixtral's sizes", _share(_shape("mixtral", 512), ALL, 0.03, 0.02)),
        ClaimCase("stages-qwen3", "the same, <= 10 %", _share(_shape("qwen3-30b-a3b", 512), ALL, 0.10, 0.05)),
        ClaimCase("experts-8-to-256", "T 4096, H 256, I 512, K 2: time <= 1.25x", _growing),
        ClaimCase(
            "experts-2048",
            "T 4096, H 256, I 256, K 1: route + plan <= 10 %",
            _share(replace(SWITCH_2048, num_tokens=4096), EARLY, 0.10, 0.05),
        ),
        ClaimCase("route-plan-linear", "route + plan of twice the tokens or experts", _linear, once=True),
    )
}
