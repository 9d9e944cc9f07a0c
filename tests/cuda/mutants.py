"""Run the tests with each planted bug: every one must be caught.

A bug is planted where the sources of ``cuda/`` say ``MOE_BUG(stage, n)``; ``test_<stage>`` must fail with it in one
mode at least (the race checker first, as it depends least on luck). Exit status 2 of a program means that no test came
to the bug's place, which counts as not caught.

    python tests/cuda/mutants.py build/cuda/tests/cuda [stage]
"""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

SOURCES = Path(__file__).parents[2] / "cuda"
MODES = {"race": 4, "fast": 10, "asan": 3}  # seeds
PLANTED = re.compile(r"MOE_BUG\((\w+), (\d+)\)")


def planted_bugs(stage=None):
    """Stage, number, and the source line of every planted bug."""
    bugs = {}
    for path in sorted(SOURCES.glob("*.cu*")):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            for found in PLANTED.finditer(line):
                if stage in (None, found[1]):
                    bugs[found[1], int(found[2])] = f"{path.name}:{number}: {line.strip()}"
    return dict(sorted(bugs.items()))


def caught_by(programs, stage, bug):
    """The first mode whose tests fail with the bug, or None."""
    environment = {**os.environ, "MOE_BUG": f"{stage}:{bug}", "EMU_TIMEOUT": "60"}
    for mode, seeds in MODES.items():
        command = [programs / f"test_{stage}_{mode}", "--seeds", str(seeds)]
        status = subprocess.run(command, env=environment, capture_output=True, check=False).returncode
        if status not in (0, 2):
            return mode
    return None


def main():
    """Print one line per bug; fail if one was not caught."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("programs", type=Path, help="the folder of the built test programs")
    parser.add_argument("stage", nargs="?")
    arguments = parser.parse_args()
    bugs = planted_bugs(arguments.stage)
    missed = 0
    for (stage, bug), line in bugs.items():
        mode = caught_by(arguments.programs, stage, bug)
        missed += mode is None
        print(f"{stage:20} {bug:3}  {mode or 'NOT CAUGHT':10}  {line}", flush=True)
    print(f"{len(bugs)} planted bugs, {missed} not caught")
    return bool(missed or not bugs)


if __name__ == "__main__":
    sys.exit(main())
