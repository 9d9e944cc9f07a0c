"""Samples that others disturb little: the real-time scheduling class around each, and what the machine gave it.

A shared machine disturbs in four ways, and each leaves a trace that costs little to read:

- other processes run on our cores: the time our threads waited for one (``/proc/self/task/*/schedstat``, in ns);
- the hypervisor runs other guests on them: stolen ticks (``/proc/stat``; of 10 ms, so short samples show it coarsely);
- others share a core's power, clock or units: a few milliseconds of arithmetic on registers right before and after the
  sample run slower than they can; others share a core's caches: the same arithmetic fed by them runs slower, although
  that on registers may not;
- others take memory bandwidth: it is read right before and after the sample.

The noise of a sample is the share of the machine that the first three left it without. The fourth is no noise to be
thrown away, because some machines have no quiet time: the bandwidth goes up and down by half, for seconds or for
milliseconds. It is paired instead. A sample comes with the rates beside it, each the harmonic mean of the reading
before and the reading after, so that a time can be compared with what the machine could do at that moment, and not
with what it could do in the best moment of a long run. Each is the reading of a single pass, never the best of several.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch_moe.testing.timing import Sample

PROC = Path("/proc")
# After a sample in the real-time class, how long to stay out of it, as a share of the time in it. Linux takes the cores
# away from the class for 50 ms whenever it has had 950 ms of a second: one sample of a few would be longer by that.
REST = 0.15


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
    """Run samples for :func:`torch_moe.testing.timing.interleave`, and look at the machine beside each.

    Parameters
    ----------
    spin : callable
        A few milliseconds of arithmetic on all threads, which touches no memory; returns its rate.
    cached : callable, default=None
        The same with operands in the first-level caches.
    beside : mapping of str to callable, default=None
        What else to read right before and right after each sample, the last one nearest to it; each returns a rate.
    realtime : bool, default=False
        Put all threads into the real-time class for the samples, where that is permitted.

    Attributes
    ----------
    refused : str or None
        Why samples run outside the real-time class; None when they run in it or nobody asked.
    """

    def __init__(
        self,
        spin: Callable[[], float],
        *,
        cached: Callable[[], float] | None = None,
        beside: Mapping[str, Callable[[], float]] | None = None,
        realtime: bool = False,
    ) -> None:
        self._spins = {"spin": spin} | ({"cached": cached} if cached is not None else {})
        self._probes = self._spins | dict(beside or {})
        self._realtime = realtime
        self.refused: str | None = None
        self._best = self._spin()  # starts the thread pool, too: only threads that exist can change their class
        if realtime:
            with self.undisturbed():
                self._note(self._spin())

    def _spin(self) -> dict[str, float]:
        return {name: spin() for name, spin in self._spins.items()}

    def _note(self, rates: Mapping[str, float]) -> None:
        self._best = {name: max(best, rates[name]) for name, best in self._best.items()}

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

    def __call__(self, sample: Callable[[], float]) -> Sample:
        """Return what the sample returned, its noise (0 is a machine of one's own), and the rates beside it."""
        with self.undisturbed():
            before = {name: probe() for name, probe in self._probes.items()}
            waited, stolen, start = seconds_waited(), seconds_stolen(), time.perf_counter()
            seconds = sample()
            elapsed = time.perf_counter() - start
            waited, stolen = seconds_waited() - waited, seconds_stolen() - stolen
            after = {name: probe() for name, probe in reversed(self._probes.items())}
        if self._realtime and self.refused is None:
            time.sleep(REST * elapsed)
        self._note(before)
        self._note(after)
        left = min(min(before[name], after[name]) / best for name, best in self._best.items())
        for lost in (waited, stolen):
            left *= 1 - min(1.0, max(0.0, lost / elapsed))
        rates = {name: statistics.harmonic_mean((before[name], after[name])) for name in self._probes}
        return Sample(seconds, 1 - left, rates)
