"""Measure cases: passes, routings, instruction sets and contenders of one layer interleaved, between floor readings."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import layer_transformers
import torch
from layer_cases import Case, Target
from layer_machine import Bench, make_flush, using_isa

from torch_moe import _C
from torch_moe.cli import machine
from torch_moe.cli.candidates import GROUPED_MM, K_DENSE, LOOP, TORCH_MOE, Candidate, make_candidates
from torch_moe.cli.floor import Machine, Work
from torch_moe.cli.limits import Limits
from torch_moe.cli.problem import DTYPES, Problem, make_problem
from torch_moe.cli.verify import verify
from torch_moe.testing.timing import Timing, interleave

CONTENDERS = (TORCH_MOE, K_DENSE, LOOP, GROUPED_MM)
# The reference computes each expert that a verified token hits in fp64: fewer tokens where experts are large.
VERIFIED_PARAMETERS = 1 << 28


@dataclass(frozen=True)
class Row:
    """One contender in one case."""

    case: Case
    dtype: str
    pass_name: str
    routing: str
    contender: str
    isa: str
    timing: Timing
    work: Work
    tokens_per_expert: tuple[int, ...]
    machine: Machine  # the best readings around and between the samples

    @property
    def target(self) -> Target | None:
        return self.case.targets.get((self.dtype, self.pass_name))

    @property
    def quiet(self) -> Timing:
        return self.timing.quietest()

    @property
    def noise(self) -> float:
        return statistics.median(self.quiet.noise)

    @property
    def moment(self) -> Machine:
        """The median of the rates beside the samples."""
        return Machine(self._median("spin"), self._median("read"))

    @property
    def cached_gflops(self) -> float:
        """The rate of FMAs fed by the caches, beside the samples: much below `moment`, others use these caches."""
        return self._median("cached")

    def _median(self, rate: str) -> float:
        return statistics.median(rates[rate] for rates in self.quiet.rates)

    @property
    def percent_of_floor(self) -> float:
        """Median over samples of the floor at the moment of each over its time."""
        quiet = self.quiet
        pairs = zip(quiet.samples, quiet.rates, strict=True)
        return 100 * statistics.median(
            self.work.floor(Machine(rates["spin"], rates["read"])) / seconds for seconds, rates in pairs
        )

    @property
    def percent_of_best_floor(self) -> float:
        """The floor of the best readings over the median."""
        return 100 * self.work.floor(self.machine) / self.quiet.median


def run_cases(
    bench: Bench,
    cases: Sequence[Case],
    dtype: str,
    *,
    passes: Sequence[str],
    routings: Sequence[str],
    isas: Sequence[str],
    compare: bool,
    rounds: int,
    seed: int,
) -> list[Row]:
    """Measure cases of one layer in one dtype, all interleaved; nothing, with a note, when memory is short."""
    largest = max((case.shape for case in cases), key=lambda shape: shape.num_tokens)
    wanted = {(case.name, name) for case in cases for name in passes if name in case.passes(dtype)}
    limits = Limits(machine.memory_budget(), 0.0, 0.0, any(name == "backward" for _, name in wanted))
    needed = limits.bytes_needed(largest, DTYPES[dtype].itemsize)
    if needed > limits.memory:
        bench.display.note(
            f"not run: {largest.name} in {dtype} needs {needed / machine.GIB:.1f} GiB, "
            f"{limits.memory / machine.GIB:.1f} GiB may be used"
        )
        return []
    with bench.display.progress(f"{largest.name}, {dtype}: drawing weights"):
        layer = make_problem(largest, dtype, routings[0], seed, limits)
    start = len(bench.readings)
    bench.read_floor()
    rows: dict[str, Row] = {}
    calls: dict[str, Callable[[], object]] = {}
    prepare: dict[str, Callable[[], object]] = {}
    flush = make_flush()
    for case in cases:
        for routing in routings:
            problem = replace(layer.with_input(case.shape.num_tokens, routing, seed), given_routing=True)
            for row, call in _contenders(bench, case, problem, dtype, passes, routing, isas, compare):
                key = f"{case.name} {row.pass_name} {routing} {row.contender} {row.isa}"
                rows[key], calls[key] = row, call
                if case.flushed:
                    prepare[key] = flush
    with (
        bench.display.progress(f"{largest.name}, {dtype}: {len(calls)} timings, {rounds} rounds") as on_sample,
        using_isa(isas[0]),
        torch.no_grad(),
    ):
        before_sample = bench.between_rounds(on_sample)
        timings = interleave(calls, rounds=rounds, prepare=prepare, observe=bench.paired, on_sample=before_sample)
    bench.read_floor()
    best = bench.best_since(start)
    bench.display.note(f"floor of these: {best.gflops:.0f} GFLOP/s of FMAs, {best.read_gbytes:.1f} GB/s of reads")
    return [replace(row, timing=timings[key], machine=best) for key, row in rows.items()]


def _contenders(
    bench: Bench,
    case: Case,
    problem: Problem,
    dtype: str,
    passes: Sequence[str],
    routing: str,
    isas: Sequence[str],
    compare: bool,
) -> list[tuple[Row, Callable[[], object]]]:
    """Verify everything that computes this case, and return what is to be timed."""
    candidates, skipped = make_candidates(problem, only=CONTENDERS if compare else CONTENDERS[:1])
    if compare:
        candidates += layer_transformers.make_candidates(problem)
        skipped["hf_eager, hf_grouped_mm"] = layer_transformers.why_not(problem)
    for name, reason in skipped.items():
        if reason is not None:
            bench.note_once(f"not run: {name}: {reason}")
    measured = {
        candidate.name: [
            name
            for name in passes
            if name in case.passes(dtype) and not layer_transformers.takes_too_long(candidate, name)
        ]
        for candidate in candidates
    }
    _verify(bench, problem, candidates, measured, isas)
    found = []
    for candidate in candidates:
        for name in measured[candidate.name]:
            call = candidate.backward_call(problem) if name == "backward" else candidate.forward_call(problem)
            work = candidate.work_with_backward if name == "backward" else candidate.work
            for isa in isas if candidate.name == TORCH_MOE else ("",):
                counts = problem.tokens_per_expert
                row = Row(case, dtype, name, routing, candidate.name, isa, Timing(()), work, counts, Machine(0, 0))
                found.append((row, _with_isa(isa, call) if isa else call))
    return found


def _verify(
    bench: Bench,
    problem: Problem,
    candidates: Sequence[Candidate],
    measured: dict[str, list[str]],
    isas: Sequence[str],
) -> None:
    """Verify ours by each instruction set, the others once; gradients where they are measured."""
    tokens = max(2, min(32, VERIFIED_PARAMETERS // problem.shape.params_per_expert))
    for isa in isas:
        due = [candidate for candidate in candidates if candidate.name == TORCH_MOE or isa == isas[0]]
        for backward in (False, True):
            same = [candidate for candidate in due if ("backward" in measured[candidate.name]) == backward]
            if same:
                with using_isa(isa):
                    verify(problem, same, backward=backward, sample_size=tokens)
    bench.note_once(f"verified: {problem.shape.name}, each contender on up to {tokens} tokens of each case")


def _with_isa(isa: str, call: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        _C.set_isa(isa)
        return call()

    return run
