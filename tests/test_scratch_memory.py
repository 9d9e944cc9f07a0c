"""What experts takes beside its output in inference: bounded by its activations, measured as peak resident memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from scratch_memory import CLEAR_REFS

from torch_moe.testing import Shape

# So large that a copy of the rows, R x H, or another one of the activations passes the bound.
SHAPE = Shape(num_tokens=4096, hidden_size=1024, intermediate_size=1024, num_experts=3, top_k=2)
BYTES_PER_THREAD = 8 << 20
# activation, dtype, routing, threads
CALLS = [
    ("swiglu", "float32", "uniform", 1),
    ("swiglu", "bfloat16", "one_expert", 1),
    ("relu", "float32", "one_expert", 1),
    ("relu", "bfloat16", "uniform", 1),
    ("swiglu", "float32", "one_expert", 4),
]

pytestmark = pytest.mark.skipif(not CLEAR_REFS.exists(), reason="/proc/self/clear_refs is absent: no peak to reset")


@pytest.fixture(scope="module")
def measured():
    """Bytes by call, and for the first call also while it saves its pre-activation."""
    calls = [(SHAPE, *call, False) for call in CALLS] + [(SHAPE, *CALLS[0], True)]
    program = Path(__file__).parent / "scratch_memory.py"
    # Freed blocks go back to the system at once: what a call takes must not hide in what its inputs left behind.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, program, json.dumps(calls)]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    *inference, training = json.loads(done.stdout)
    return dict(zip(CALLS, inference, strict=True)), training


def activation_bytes(dtype):
    return SHAPE.num_tokens * SHAPE.top_k * SHAPE.intermediate_size * (4 if dtype == "float32" else 2)


@pytest.mark.parametrize("call", CALLS, ids=lambda call: "-".join(map(str, call)))
def test_peak_is_within_the_promise(measured, call):
    _, dtype, _, threads = call
    extra = measured[0][call]
    assert 0 < extra <= 1.25 * activation_bytes(dtype) + threads * BYTES_PER_THREAD


def test_the_measure_sees_what_training_saves(measured):
    inference, training = measured
    gate_and_up = 2 * activation_bytes("float32")
    assert training - inference[CALLS[0]] == pytest.approx(gate_and_up, rel=0.1)
