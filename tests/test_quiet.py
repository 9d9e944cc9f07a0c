"""Quiet samples: the real-time class holds for the call and no longer, and noise is the share of the machine lost."""

import os
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from torch_moe.testing import quiet
from torch_moe.testing.quiet import Quiet, realtime, seconds_waited, thread_ids
from torch_moe.testing.timing import Sample

linux = pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="/proc/self/task is absent")


@pytest.fixture
def scheduler(monkeypatch):
    """A scheduler that permits everything and remembers the class of each of two threads."""
    classes = {11: os.SCHED_OTHER, 12: os.SCHED_BATCH}
    monkeypatch.setattr(quiet, "thread_ids", lambda: list(classes))
    monkeypatch.setattr(quiet.os, "sched_getscheduler", classes.get)
    monkeypatch.setattr(quiet.os, "sched_getparam", lambda thread: os.sched_param(0))
    monkeypatch.setattr(quiet.os, "sched_setscheduler", lambda thread, policy, _: classes.update({thread: policy}))
    return classes


def test_all_threads_are_realtime_inside_and_as_before_outside(scheduler):
    with realtime() as refused:
        assert refused is None
        assert set(scheduler.values()) == {os.SCHED_FIFO}
    assert scheduler == {11: os.SCHED_OTHER, 12: os.SCHED_BATCH}


def test_classes_come_back_after_an_error(scheduler):
    with pytest.raises(ZeroDivisionError), realtime():
        raise ZeroDivisionError
    assert scheduler == {11: os.SCHED_OTHER, 12: os.SCHED_BATCH}


def test_refusal_is_told_and_samples_run_all_the_same(scheduler, monkeypatch):
    def refuse(thread, policy, parameter):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(quiet.os, "sched_setscheduler", refuse)
    run = Quiet(lambda: 1.0, realtime=True)
    assert run.refused == "SCHED_FIFO refused (Operation not permitted)"
    assert "refused" in run.words
    assert run(lambda: 3.0).seconds == 3.0


def test_a_thread_that_stays_outside_is_told(scheduler, monkeypatch):
    monkeypatch.setattr(quiet.os, "sched_setscheduler", lambda thread, policy, _: scheduler.update({11: policy}))
    with realtime() as refused:
        assert refused == "1 of 2 threads stayed outside SCHED_FIFO"


def test_only_samples_and_spins_are_realtime(scheduler):
    seen = []
    run = Quiet(lambda: seen.append(scheduler[11]) or 1.0, realtime=True)
    assert run.refused is None
    seen.clear()
    run(lambda: seen.append(scheduler[12]) or 0.1)
    assert seen == [os.SCHED_FIFO] * 3  # spin, sample, spin
    Quiet(lambda: seen.append(scheduler[11]) or 1.0)(lambda: 1.0)
    assert seen[3:] == [os.SCHED_OTHER] * 3


@linux
def test_a_realtime_sample_is_followed_by_a_rest(scheduler, monkeypatch):
    rests = []
    monkeypatch.setattr(quiet.time, "sleep", lambda seconds: rests.append((scheduler[11], seconds)))
    Quiet(lambda: 1.0, realtime=True)(lambda: sum(range(100_000)) * 0.0)
    Quiet(lambda: 1.0)(lambda: 1.0)
    ((policy, seconds),) = rests
    assert policy == os.SCHED_OTHER
    assert 0 < seconds < 1


@linux
def test_threads_are_those_of_the_process():
    before, release = thread_ids(), threading.Event()
    thread = threading.Thread(target=release.wait)
    thread.start()
    assert set(thread_ids()) - set(before) == {thread.native_id}  # one that others left behind may end meanwhile
    release.set()
    thread.join()


def test_a_machine_of_ones_own_has_no_noise(monkeypatch):
    monkeypatch.setattr(quiet, "seconds_waited", lambda: 0.0)
    monkeypatch.setattr(quiet, "seconds_stolen", lambda: 0.0)
    assert Quiet(lambda: 100.0)(lambda: 2.0) == Sample(2.0, 0.0, {"spin": 100.0})


def test_rates_beside_a_sample_are_paired_with_it_and_are_no_noise(monkeypatch):
    monkeypatch.setattr(quiet, "seconds_waited", lambda: 0.0)
    monkeypatch.setattr(quiet, "seconds_stolen", lambda: 0.0)
    order, reads = [], iter((60.0, 30.0, 20.0, 20.0))

    def read():
        order.append("read")
        return next(reads)

    def spin():
        order.append("spin")
        return 100.0

    run = Quiet(spin, cached=lambda: order.append("cached") or 90.0, beside={"read": read})
    order.clear()
    first, second = (run(lambda: order.append("sample") or 1.0) for _ in range(2))
    assert order[:7] == ["spin", "cached", "read", "sample", "read", "cached", "spin"]  # memory nearest to the sample
    assert first == Sample(1.0, 0.0, {"spin": 100.0, "cached": 90.0, "read": pytest.approx(40.0)})
    assert second.rates["read"] == 20.0
    assert second.noise == 0.0


def test_who_shares_the_caches_is_noise_although_registers_are_as_fast(monkeypatch):
    monkeypatch.setattr(quiet, "seconds_waited", lambda: 0.0)
    monkeypatch.setattr(quiet, "seconds_stolen", lambda: 0.0)
    rates = iter((90.0, 90.0, 63.0))
    run = Quiet(lambda: 100.0, cached=lambda: next(rates))
    assert run(lambda: 1.0).noise == pytest.approx(0.3)


def test_noise_is_the_share_lost_to_processes_guests_and_clock(monkeypatch):
    def noise(waited=0.0, stolen=0.0, rates=(100.0,) * 3):
        """The estimate for a sample of 50 ms."""
        waits, steals, spins, clock = iter((0.0, waited)), iter((0.0, stolen)), iter(rates), iter((7.0, 7.05))
        monkeypatch.setattr(quiet, "seconds_waited", lambda: next(waits))
        monkeypatch.setattr(quiet, "seconds_stolen", lambda: next(steals))
        monkeypatch.setattr(quiet, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
        return Quiet(lambda: next(spins))(lambda: 0.05).noise

    assert noise(waited=0.025) == pytest.approx(0.5)
    assert noise(stolen=0.0125) == pytest.approx(0.25)
    assert noise(rates=(100.0, 90.0, 60.0)) == pytest.approx(0.4)  # the slower of both spins
    assert noise(rates=(50.0, 100.0, 100.0)) == 0.0  # the best rate is the machine's
    assert noise(waited=0.025, rates=(100.0, 50.0, 50.0)) == pytest.approx(0.75)
    assert noise(waited=9.0) == 1.0


@linux
@pytest.mark.skipif(not os.path.exists("/proc/self/schedstat"), reason="this kernel counts no waiting time")
def test_threads_that_compete_for_one_core_wait():
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as rival:
            start, stop = seconds_waited(), time.perf_counter() + 60  # the rival has to begin
            while seconds_waited() - start < 0.01 and time.perf_counter() < stop:
                pass
            rival.kill()
    finally:
        os.sched_setaffinity(0, allowed)
    assert seconds_waited() - start >= 0.01
