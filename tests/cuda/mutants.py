"""Run the tests with each planted bug: every one must be caught, and by what mutants.txt names.

A bug is planted where the sources of ``cuda/`` say ``MOE_BUG(stage, n)``; its row in mutants.txt names what must see it
and the cheapest test in which it does. The same tests must pass without a bug. A bug without a row takes longer: all
tests run, in one mode after the other, until one fails. A program that exits with 2 has not come to the bug's place;
that, and running out of time, counts as not caught.

    python tests/cuda/mutants.py build/cuda/tests/cuda [stage]           as its row says
    python tests/cuda/mutants.py build/cuda/tests/cuda --deep            in every mode, under more seeds; the default
                                                                         with MOE_CUDA_SEEDS (make test-cuda-deep)
    python tests/cuda/mutants.py build/cuda/tests/cuda --find [stage]    propose rows for the bugs that have none
"""

import argparse
import functools
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).parents[2] / "cuda"
TABLE = Path(__file__).with_name("mutants.txt")
PLANTED = re.compile(r"MOE_BUG\((\w+), (\d+)\)")
SEEDS = {"fast": 3, "race": 2, "asan": 1}  # as ctest runs the tests without a bug
MODE = {"race": "race", "asan": "asan", "emulator": "fast", "values": "fast"}
CAUGHT = (*MODE, "crash")
DEEP = 4  # times the seeds


def planted_bugs():
    """Stage, number, and the source line of every planted bug."""
    bugs = {}
    for path in sorted(SOURCES.glob("*.cu*")):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            for stage, bug in PLANTED.findall(line):
                bugs[stage, int(bug)] = f"{path.name}:{number}: {line.strip()}"
    return dict(sorted(bugs.items()))


def read_table():
    """What sees a bug, and in which test, by stage and number."""
    rows = {}
    for line in TABLE.read_text().splitlines():
        words = line.split("#")[0].split()
        if words:
            stage, bug, seen_by, test = words
            rows[stage, int(bug)] = seen_by, test
    return rows


class Programs:
    """The built test programs."""

    def __init__(self, folder, limit):
        self.folder = folder
        self.limit = limit

    def run(self, stage, mode, test, seeds, bug=None):
        """What happened: one of CAUGHT, or "passed", "not reached", "out of time"."""
        environment = {**os.environ, "EMU_TIMEOUT": str(self.limit)}
        environment.pop("MOE_CUDA_SEEDS", None)
        if bug is not None:
            environment["MOE_BUG"] = f"{stage}:{bug}"
        command = [self.folder / f"test_{stage}_{mode}", test, "--seeds", str(seeds)]
        try:
            result = subprocess.run(
                command,
                env=environment,
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
                timeout=self.limit,
            )
        except subprocess.TimeoutExpired:
            return "out of time"
        if result.returncode in (0, 2):
            return "not reached" if result.returncode else "passed"
        output = result.stdout + result.stderr
        for words, seen_by in (
            (("RACE:",), "race"),
            (("AddressSanitizer", "runtime error:"), "asan"),
            (("EMU ERROR",), "emulator"),
        ):
            if any(word in output for word in words):
                return seen_by
        return "values" if result.returncode == 1 else "crash"

    @functools.cache  # noqa: B019 (lives as long as the process)
    def tests(self, stage, mode):
        """The names of the tests, cheapest first."""
        command = [self.folder / f"test_{stage}_{mode}"]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        timed = re.findall(r"^seed 1 +(\w+) +([\d.]+) s$", report, re.MULTILINE)
        return [test for test, _ in sorted(timed, key=lambda row: float(row[1]))]


def check_baseline(programs, rows, pool):
    """The tests of the rows that fail without a bug."""
    cases = sorted({(stage, MODE[seen_by], test) for (stage, _), (seen_by, test) in rows.items()})
    outcomes = pool.map(lambda case: programs.run(*case, SEEDS[case[1]]), cases)
    return [
        f"{case}: {outcome} without a bug" for case, outcome in zip(cases, outcomes, strict=True) if outcome != "passed"
    ]


def check_bug(programs, stage, bug, row, deep):
    """Outcome by mode, and whether it is what the row asks for; without a row, the first mode in which a test fails."""
    outcomes = {}
    if row is None:
        for mode in ("race", "fast", "asan"):
            outcomes[mode] = programs.run(stage, mode, "", SEEDS[mode], bug)
            if outcomes[mode] in CAUGHT:
                return outcomes, True
        return outcomes, False
    seen_by, test = row
    for mode in SEEDS if deep else [MODE[seen_by]]:
        outcomes[mode] = programs.run(stage, mode, test, SEEDS[mode] * (DEEP if deep else 1), bug)
    return outcomes, outcomes[MODE[seen_by]] == seen_by


def find_row(programs, stage, bug):
    """A row for a bug, preferring what depends least on luck."""
    for mode in ("race", "fast", "asan"):
        for test in programs.tests(stage, mode):
            seen_by = programs.run(stage, mode, test, 1, bug)
            if seen_by in CAUGHT and MODE.get(seen_by) == mode:
                return f"{stage} {bug} {seen_by} {test}"
    return f"{stage} {bug} NOT CAUGHT"


def main():
    """Print one line per bug; fail if one was not caught as its row says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("programs", type=Path, help="the folder of the built test programs")
    parser.add_argument("stage", nargs="?")
    parser.add_argument("--deep", action="store_true", default="MOE_CUDA_SEEDS" in os.environ)
    parser.add_argument("--find", action="store_true")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--limit", type=int, default=300, help="seconds for one program")
    arguments = parser.parse_args()
    start = time.monotonic()
    programs = Programs(arguments.programs, arguments.limit)
    wanted = {key: line for key, line in planted_bugs().items() if arguments.stage in (None, key[0])}
    rows = {key: row for key, row in read_table().items() if arguments.stage in (None, key[0])}
    without_row = [key for key in wanted if key not in rows]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        if arguments.find:
            for row in pool.map(lambda key: find_row(programs, *key), without_row):
                print(row, flush=True)
            return 0
        problems = [
            f"{stage} {bug} has a row and is planted nowhere" for stage, bug in rows if (stage, bug) not in wanted
        ]
        problems += check_baseline(programs, rows, pool)
        results = pool.map(lambda key: check_bug(programs, *key, rows.get(key), arguments.deep), wanted)
        caught = dict.fromkeys(SEEDS, 0)
        for key, (outcomes, ok) in zip(wanted, results, strict=True):
            for mode, outcome in outcomes.items():
                caught[mode] += outcome in CAUGHT
            said = ", ".join(f"{mode}: {outcome}" for mode, outcome in outcomes.items())
            remark = "NOT CAUGHT AS THE TABLE SAYS" if not ok else "no row" if key in without_row else ""
            print(f"{key[0]:22} {key[1]:3}  {said:32} {remark:8} {wanted[key]}", flush=True)
            if not ok:
                problems.append(f"{key[0]} {key[1]}: {said}; the table: {rows.get(key)}")
    print(*problems, sep="\n")
    by_mode = ", ".join(f"{count} in {mode} mode" for mode, count in caught.items())
    print(f"{len(wanted)} planted bugs; caught: {by_mode}; {len(problems)} problems; {time.monotonic() - start:.0f} s")
    return bool(problems or not wanted)


if __name__ == "__main__":
    sys.exit(main())
