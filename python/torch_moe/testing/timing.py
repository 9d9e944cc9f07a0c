"""Time several functions against each other on a noisy machine.

All candidates run interleaved in one process, one sample of each per round, in an order that rotates from round to
round: whatever slows the machine for a while slows every candidate, and none always runs after the same neighbour.
Medians are compared, and ratios are taken round by round before their median.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple


class Sample(NamedTuple):
    """What an observer tells of one sample.

    Parameters
    ----------
    seconds : float
        Per call.
    noise : float, default=0.0
        The share of the machine that the sample did not get.
    rates : dict of str to float, default=None
        What the machine gave right beside the sample, by name; None where nobody looked.
    """

    seconds: float
    noise: float = 0.0
    rates: dict[str, float] | None = None


# Runs a function that returns seconds per call; returns that, and what it saw of the machine.
Observe = Callable[[Callable[[], float]], Sample]


@dataclass(frozen=True)
class Timing:
    """Samples of one candidate, one per round.

    Parameters
    ----------
    samples : tuple of float
        Seconds per call.
    noise : tuple of float, default=()
        Per sample, the share of the machine that it did not get; empty where nobody estimated it.
    rates : tuple of dict of str to float, default=()
        Per sample, what the machine gave right beside it; empty where nobody looked.
    """

    samples: tuple[float, ...]
    noise: tuple[float, ...] = ()
    rates: tuple[dict[str, float], ...] = field(default=(), repr=False)

    @property
    def median(self) -> float:
        """Return the median in seconds."""
        return statistics.median(self.samples)

    @property
    def spread(self) -> float:
        """Return the interquartile range over the median: 0.1 means that half the samples lie within 10 percent."""
        if len(self.samples) < 2:
            return 0.0
        lower, _, upper = statistics.quantiles(self.samples, n=4, method="inclusive")
        return (upper - lower) / self.median

    def quietest(self, share: float = 0.5, least: int = 3) -> Timing:
        """Return the samples with the least noise, in their order.

        Parameters
        ----------
        share : float, default=0.5
            How many of the samples to keep, rounded up.
        least : int, default=3
            Keep at least so many, or all that there are.

        Returns
        -------
        Timing
            Itself where no noise was estimated.
        """
        if not self.noise:
            return self
        count = min(len(self.samples), max(least, math.ceil(share * len(self.samples))))
        kept = sorted(sorted(range(len(self.samples)), key=self.noise.__getitem__)[:count])
        return Timing(
            tuple(self.samples[i] for i in kept),
            tuple(self.noise[i] for i in kept),
            tuple(self.rates[i] for i in kept if self.rates),
        )

    def ratio_to(self, other: Timing) -> float:
        """Return the median over rounds of this sample over the other's of the same round."""
        return statistics.median(mine / theirs for mine, theirs in zip(self.samples, other.samples, strict=True))


def noise(timings: Mapping[str, Timing]) -> float:
    """Return the median spread of all candidates: differences below it mean nothing.

    Parameters
    ----------
    timings : mapping of str to Timing
        What `interleave` returned.

    Returns
    -------
    float
        A fraction of the median; 0 without candidates.
    """
    return statistics.median(timing.spread for timing in timings.values()) if timings else 0.0


def interleave(
    candidates: Mapping[str, Callable[[], object]],
    *,
    rounds: int | None = None,
    budget: float = 10.0,
    min_sample: float = 0.002,
    on_sample: Callable[[str, int], None] | None = None,
    prepare: Mapping[str, Callable[[], object]] | None = None,
    observe: Observe | None = None,
) -> dict[str, Timing]:
    """Time candidates interleaved, after one call of each to warm up and one to choose the calls per sample.

    Parameters
    ----------
    candidates : mapping of str to callable
        Functions without arguments; their results are dropped at once.
    rounds : int or None, default=None
        Samples per candidate. None takes as many as fit into `budget`, at least 3 and at most 25.
    budget : float, default=10.0
        Seconds that the rounds may take when `rounds` is None.
    min_sample : float, default=0.002
        A sample repeats a call until it lasts about this many seconds, far above the clock's resolution.
    on_sample : callable or None, default=None
        Called with the candidate's name and the number of the round before each sample (progress display).
    prepare : mapping of str to callable, default=None
        What to do before each sample of a candidate, untimed; its samples are single calls (emptied caches).
    observe : callable or None, default=None
        Runs each sample and looks at the machine meanwhile: :class:`torch_moe.testing.quiet.Quiet`.

    Returns
    -------
    dict of str to Timing
        In the order of `candidates`.

    Raises
    ------
    ValueError
        If `rounds` is below 1.
    """
    if rounds is not None and rounds < 1:
        raise ValueError(f"interleave: rounds must be at least 1, got {rounds}")
    prepare = prepare or {}
    first = {name: _sample(call, 1) for name, call in candidates.items()}
    warm = {name: min(first[name], _sample(call, 1)) for name, call in candidates.items()}
    calls = {
        name: 1 if name in prepare else max(1, round(min_sample / max(seconds, 1e-9))) for name, seconds in warm.items()
    }
    per_round = sum(warm[name] * calls[name] for name in candidates)
    count = rounds if rounds is not None else max(3, min(25, int(budget / max(per_round, 1e-9))))

    samples: dict[str, list[Sample]] = {name: [] for name in candidates}
    names = list(candidates)
    for number in range(count):
        start = number % max(1, len(names))
        for name in names[start:] + names[:start]:
            if on_sample is not None:
                on_sample(name, number)
            if name in prepare:
                prepare[name]()
            sample = partial(_sample, candidates[name], calls[name])
            samples[name].append(Sample(sample()) if observe is None else observe(sample))
    return {name: _timing(samples[name], observe is not None) for name in candidates}


def _timing(samples: list[Sample], observed: bool) -> Timing:
    return Timing(
        tuple(sample.seconds for sample in samples),
        tuple(sample.noise for sample in samples) if observed else (),
        tuple(sample.rates for sample in samples if sample.rates is not None),
    )


def _sample(call: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls
