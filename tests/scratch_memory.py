"""Prints, as JSON, the peak of the memory that experts takes beside its output, each call in a process of its own.

A program rather than a fixture: a thread's scratch memory is kept from call to call, so only the first one tells.
"""

import json
import os
import sys
from pathlib import Path

import torch
from helpers import expert_inputs

from torch_moe import ops
from torch_moe.testing import Shape, routing

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident(name: str) -> int:
    """VmRSS: bytes in memory now; VmHWM: the most there have been."""
    (line,) = [line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024


def extra_bytes(
    sizes: list[int], activation: str, dtype: str, routing_name: str, num_threads: int, save_pre_activation: bool
) -> int:
    """The peak during one call, beside what was there before and the output."""
    torch.set_num_threads(num_threads)
    shape = Shape(*sizes)
    inputs = expert_inputs(shape, getattr(torch, dtype), "cpu", gated=activation == "swiglu")
    first = {
        name: tensor[:1] if name in ("hidden_states", "topk_weights") else tensor for name, tensor in inputs.items()
    }
    ids = routing(routing_name, shape.num_tokens, shape.num_experts, shape.top_k)
    plan, first_plan = ops.plan(ids, shape.num_experts), ops.plan(ids[:1], shape.num_experts)
    if save_pre_activation:
        inputs["hidden_states"].requires_grad_()
    with torch.no_grad():  # starts the threads, and brings the code into memory
        ops.experts(**first, plan=first_plan, activation=activation)
    CLEAR_REFS.write_text("5")  # the most there have been is what there is now
    before = resident("VmRSS")
    with torch.set_grad_enabled(save_pre_activation):
        output = ops.experts(**inputs, plan=plan, activation=activation)
    return resident("VmHWM") - before - output.nbytes


def in_child(call: list) -> int:
    """Fork before any thread has started, and return what the child found."""
    read, write = os.pipe()
    if os.fork() == 0:
        os.write(write, str(extra_bytes(*call)).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        found = pipe.read()
    os.wait()
    return int(found)


if __name__ == "__main__":
    print(json.dumps([in_child(call) for call in json.loads(sys.argv[1])]))
