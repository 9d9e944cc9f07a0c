"""Interleaved timing: every round has every candidate, none keeps its neighbour, statistics are what they say."""

import itertools
import time
from types import SimpleNamespace

import pytest

from torch_moe.testing import timing as timing_module
from torch_moe.testing.timing import Sample, Timing, interleave, noise


def test_rounds_interleave_and_rotate():
    calls = []
    candidates = {name: lambda name=name: calls.append(name) or time.sleep(0.003) for name in "abc"}
    timings = interleave(candidates, rounds=3)
    warm_up, rounds = calls[:6], calls[6:]
    assert sorted(warm_up) == list("aabbcc")
    assert rounds == list("abc") + list("bca") + list("cab")
    assert [len(timing.samples) for timing in timings.values()] == [3, 3, 3]


def test_short_calls_are_repeated_and_divided(monkeypatch):
    clock, calls = [0.0], []
    monkeypatch.setattr(timing_module, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def call():
        clock[0] += 0.0005
        calls.append(clock[0])

    timings = interleave({"short": call}, rounds=2, min_sample=0.005)
    assert len(calls) == 2 + 2 * 10
    assert timings["short"].samples == pytest.approx((0.0005, 0.0005))


@pytest.mark.parametrize(("budget", "rounds"), [(0.001, 3), (0.1, 10), (1000.0, 25)])
def test_rounds_follow_the_budget(budget, rounds):
    counted = []
    interleave({"call": lambda: time.sleep(0.01)}, budget=budget, on_sample=lambda name, number: counted.append(number))
    assert counted == list(range(len(counted)))
    assert len(counted) in ({rounds} if budget != 0.1 else range(3, rounds + 1))


def test_no_rounds_are_refused():
    with pytest.raises(ValueError, match="interleave: rounds must be at least 1, got 0"):
        interleave({}, rounds=0)


def test_statistics():
    timing = Timing((2.0, 4.0, 3.0, 100.0, 1.0))
    assert timing.median == 3.0
    assert timing.spread == pytest.approx(2 / 3)
    assert Timing((5.0,)).spread == 0.0
    assert noise({"a": timing, "b": Timing((1.0, 1.0)), "c": Timing((1.0, 1.0))}) == 0.0
    assert noise({}) == 0.0


def test_ratio_is_taken_round_by_round():
    # Another process halves the machine's speed from the second round on: the ratio stays.
    slowed = Timing((1.0, 2.0, 2.0))
    assert slowed.ratio_to(Timing((2.0, 4.0, 4.0))) == 0.5
    assert Timing((1.0, 4.0, 9.0)).ratio_to(Timing((1.0, 1.0, 1.0))) == 4.0


def test_prepared_candidates_are_single_calls_each_after_its_preparation(monkeypatch):
    calls = []
    monkeypatch.setattr(timing_module, "time", SimpleNamespace(perf_counter=lambda: len(calls) * 1e-6))
    candidates = {name: lambda name=name: calls.append(name) for name in "ab"}
    timings = interleave(candidates, rounds=2, min_sample=1e-5, prepare={"a": lambda: calls.append("empty caches")})
    rounds = [name for name, _ in itertools.groupby(calls[4:])]
    assert calls.count("a") == 2 + 2
    assert calls.count("b") == 2 + 2 * 10
    assert rounds == ["empty caches", "a", "b", "empty caches", "a"]
    assert timings["a"].noise == ()


def test_the_quietest_samples_count():
    timing = Timing((5.0, 1.0, 9.0, 2.0, 7.0), (0.5, 0.1, 0.9, 0.2, 0.3))
    assert timing.quietest() == Timing((1.0, 2.0, 7.0), (0.1, 0.2, 0.3))
    assert timing.quietest(share=0.2, least=1) == Timing((1.0,), (0.1,))
    assert timing.quietest(least=99) == timing
    assert Timing((3.0, 4.0)).quietest() == Timing((3.0, 4.0))


def test_the_quietest_samples_keep_their_own_rates():
    rates = tuple({"read": rate} for rate in (1.0, 2.0, 3.0, 4.0))
    timing = Timing((5.0, 6.0, 7.0, 8.0), (0.4, 0.1, 0.3, 0.2), rates)
    assert timing.quietest(least=2) == Timing((6.0, 8.0), (0.1, 0.2), (rates[1], rates[3]))


def test_samples_are_observed():
    def observe(sample):
        return Sample(2 * sample(), 0.25, {"read": 7.0})

    timings = interleave({"a": lambda: time.sleep(0.002)}, rounds=3, observe=observe)
    assert timings["a"].noise == (0.25,) * 3
    assert timings["a"].rates == ({"read": 7.0},) * 3
    assert timings["a"].median > 0.004
