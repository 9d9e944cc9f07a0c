"""The machine as the cases of bench_layer.py see it: readings of its floor, quiet samples, emptied caches."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import reduce

import torch

from torch_moe import _C
from torch_moe.cli import floor, machine
from torch_moe.cli.display import Display
from torch_moe.cli.floor import Machine
from torch_moe.testing.quiet import Quiet

# Read between calls of few tokens, as a model's other layers would be: more than any cache.
LEAST_FLUSH_BYTES = 256 << 20
ROUNDS_PER_READING = 5
# Share of the machine lost to others, above which a measurement neither meets nor misses a target.
NOISY = 0.25


class Bench:
    """What all cases of a run share: where words go, how samples are taken, and every reading of the machine.

    A sample of a case is compared with two floors. That of its moment is made of the rates read right before and right
    after it (`paired`): the bandwidth of a shared machine moves by half, in milliseconds or for minutes. The other is
    made of the best readings around and between all samples of the case: it is what the machine could do if nobody else
    used it, and never lower.
    """

    def __init__(self, display: Display, *, realtime: bool = False) -> None:
        self.display = display
        self.readings: list[Machine] = []
        self.quiet = Quiet(self._spin, cached=floor.cached_spin, realtime=realtime)
        self._memory = floor.memory_reader(machine.memory_budget())
        self.paired = Quiet(self._spin, cached=floor.cached_spin, beside={"read": self._read}, realtime=realtime)
        self._notes: set[str] = set()

    def _spin(self) -> float:
        rate = floor.spin()
        self.readings.append(Machine(rate, 0.0))
        return rate

    def _read(self) -> float:
        with using_isa(_C.available_isas()[0]):
            rate = self._memory.read()
        self.readings.append(Machine(0.0, rate))
        return rate

    def read_floor(self) -> None:
        """Read FMA rate and bandwidth by the machine's best instruction set, whatever the contenders use."""
        with using_isa(_C.available_isas()[0]), self.quiet.undisturbed():
            # That of fp32 is the rate of FMAs: never that of matrix units.
            self.readings.append(floor.read(torch.float32, self._memory))

    def best_since(self, start: int) -> Machine:
        """Return the best of the readings from number `start` on."""
        return reduce(Machine.best, self.readings[start:])

    def between_rounds(self, on_sample: Callable[[str, int], None]) -> Callable[[str, int], None]:
        """Return what `interleave` calls before each sample: the display, and every few rounds a reading."""
        last = 0

        def before_sample(name: str, number: int) -> None:
            nonlocal last
            on_sample(name, number)
            if number >= last + ROUNDS_PER_READING:
                last = number
                self.read_floor()

        return before_sample

    def note_once(self, text: str) -> None:
        """Print a line, unless it has been printed."""
        if text not in self._notes:
            self._notes.add(text)
            self.display.note(text)


@contextmanager
def using_isa(isa: str) -> Iterator[None]:
    """Use another instruction set for a while."""
    before = _C.isa()
    _C.set_isa(isa)
    try:
        yield
    finally:
        _C.set_isa(before)


def make_flush() -> Callable[[], object]:
    """Return a function that reads more memory than the caches hold, on all threads."""
    cached = torch.ones(max(LEAST_FLUSH_BYTES, 2 * machine.last_level_cache_bytes()) // 4)
    return cached.sum
