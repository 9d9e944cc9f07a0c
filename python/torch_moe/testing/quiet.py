"""Samples that others disturb little: the real-time scheduling class around each, and an estimate of what was lost.

A shared machine disturbs in three ways, and each leaves a trace that costs nothing to read:

- other processes run on our cores: the time our threads waited for one (``/proc/self/task/*/schedstat``, in ns);
- the hypervisor runs other guests on them: stolen ticks (``/proc/stat``; of 10 ms, so short samples show it coarsely);
- others share a core's units, its power or its clock: a few milliseconds of arithmetic right before and after the
  sample run slower than they can.

The noise of a sample is the share of the machine that these three left it without. Others that take memory bandwidth
leave no such trace: readings of the bandwidth between the samples show them.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

PROC = Path("/proc")


def thread_ids() -> list[int]:
    """Return the kernel's ids of this process's threads, torch's pool among them; this thread's alone elsewhere."""
    try:
        return sorted(int(task.name) for task in (PROC / "self/task").iterdir())
    except OSError:
        return [0]


def seconds_waited() -> float:
    """Return how long the threads of this process have been ready to run without a core, all together."""
    total = 0
    for thread in thread_ids():
        try:
            total += int((PROC / f"self/task/{thread}/schedstat").read_text().split()[1])
        except (OSError, IndexError, ValueError):  # the thread ended, or this kernel does not count
            continue
    return total * 1e-9


def seconds_stolen() -> float:
    """Return how long this machine's cores have waited for the hypervisor, per core."""
    try:
        first, *rest = (PROC / "stat").read_text().splitlines()
        ticks = int(first.split()[8])
        cores = sum(line.startswith("cpu") for line in rest)
        return ticks / os.sysconf("SC_CLK_TCK") / max(1, cores)
    except (OSError, IndexError, ValueError):
        return 0.0


@contextmanager
def realtime() -> Iterator[str | None]:
    """Put every thread of this process into SCHED_FIFO, and back into its own class afterwards.

    Yields
    ------
    str or None
        None when all threads are in the class, as the kernel reports them; otherwise the reason why none is.
    """
    if not hasattr(os, "SCHED_FIFO"):
        yield "this operating system has no SCHED_FIFO"
        return
    before = {thread: (os.sched_getscheduler(thread), os.sched_getparam(thread)) for thread in thread_ids()}
    reason = None
    try:
        try:
            for thread in before:
                os.sched_setscheduler(thread, os.SCHED_FIFO, os.sched_param(os.sched_get_priority_min(os.SCHED_FIFO)))
            elsewhere = [thread for thread in before if os.sched_getscheduler(thread) != os.SCHED_FIFO]
            if elsewhere:
                reason = f"{len(elsewhere)} of {len(before)} threads stayed outside SCHED_FIFO"
        except OSError as error:
            reason = f"SCHED_FIFO refused ({error.strerror})"
        yield reason
    finally:
        for thread, (policy, parameter) in before.items():
            if os.sched_getscheduler(thread) != policy:
                os.sched_setscheduler(thread, policy, parameter)


class Quiet:
    """Run samples for :func:`torch_moe.testing.timing.interleave` and estimate the noise of each.

    Parameters
    ----------
    spin : callable
        A few milliseconds of arithmetic on all threads, which touches no memory; returns its rate.
    realtime : bool, default=False
        Put all threads into the real-time class for the samples, where that is permitted.

    Attributes
    ----------
    refused : str or None
        Why samples run outside the real-time class; None when they run in it or nobody asked.
    """

    def __init__(self, spin: Callable[[], float], *, realtime: bool = False) -> None:
        self._spin = spin
        self._realtime = realtime
        self._best_rate = spin()  # starts the thread pool, too: only threads that exist can change their class
        self.refused: str | None = None
        if realtime:
            with self.undisturbed():
                self._best_rate = max(self._best_rate, spin())

    @property
    def words(self) -> str:
        """Return in which class samples run, for the report."""
        if not self._realtime:
            return "real-time class: not asked for"
        if self.refused is not None:
            return f"real-time class: {self.refused}; times are as noisy as without"
        return "real-time class: SCHED_FIFO, all threads, for the timed calls alone"

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Stay in the real-time class, if that was asked for and is permitted."""
        if not self._realtime or self.refused is not None:
            yield
            return
        with realtime() as self.refused:
            yield

    def __call__(self, sample: Callable[[], float]) -> tuple[float, float]:
        """Return what the sample returned, and its noise: 0 is a machine of one's own, 1 got nothing of it."""
        with self.undisturbed():
            rate = self._spin()
            waited, stolen, start = seconds_waited(), seconds_stolen(), time.perf_counter()
            seconds = sample()
            elapsed = time.perf_counter() - start
            waited, stolen = seconds_waited() - waited, seconds_stolen() - stolen
            rate = min(rate, self._spin())
        self._best_rate = max(self._best_rate, rate)
        left = rate / self._best_rate
        for lost in (waited, stolen):
            left *= 1 - min(1.0, max(0.0, lost / elapsed))
        return seconds, 1 - left
