"""Each operator and the layer on a GPU, next to cuBLAS, grouped_mm, transformers and what else is installed.

    python benchmarks/bench_gpu.py --output gpu.jsonl
    python benchmarks/bench_gpu.py --device cpu --tiny       # the same code on small sizes; its times mean nothing

Every line of the output is one candidate of one case. The ceilings are measured first, in the same process.
"""

import argparse
import json
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_cases import (
    DECODE,
    EXCHANGE,
    FINE,
    LAYER,
    TINY,
    TOLERATED,
    Case,
    decode_case,
    gather_case,
    grouped_gemm_cases,
    in_short,
    layer_case,
)
from gpu_memory import exchange_cases, router_cases, row_cases
from gpu_time import Ceilings, measure, measure_ceilings, spread_text


def groups(device: torch.device, *, quick: bool, tiny: bool) -> Iterator["partial[Iterable[Case]]"]:
    """Yield makers of cases, the most wanted first: time may run out."""
    layer, fine, decode = (TINY, TINY._replace(num_tokens=7), TINY) if tiny else (LAYER, FINE, DECODE)
    for shape, routing_name in ((layer, "uniform"), (fine, "uniform"), *(() if quick else ((layer, "zipf"),))):
        for backward in (False, True):
            yield partial(layer_case, shape, routing_name, device, backward=backward)
    for num_tokens in (1, 8, 32):
        yield partial(decode_case, num_tokens, device, decode)
    yield partial(router_cases, layer, device)
    yield partial(grouped_gemm_cases, layer, device)
    yield partial(gather_case, layer, device)
    yield partial(row_cases, layer, device)
    if not quick:
        yield partial(exchange_cases, TINY if tiny else EXCHANGE, device)


def drop_what_fails(case: Case) -> None:
    """Call each candidate but ours once, and skip one that raises: it must not take the case with it."""
    for name in list(case.candidates)[1:]:
        try:
            case.candidates[name]()
        except Exception as error:  # a guest in any version: what it says is the reason
            del case.candidates[name]
            case.skipped[name] = in_short(error)


def records(case: Case, device: torch.device, rounds: int, ceilings: Ceilings) -> list[dict[str, Any]]:
    """Check and time a case: one record per candidate."""
    drop_what_fails(case)
    error = case.error()
    timings = measure(case.candidates, device, rounds)
    bound = max(case.flops / ceilings.dense_tflops / 1e12, case.bytes / ceilings.copy_gbytes / 1e9)
    lines = [
        {
            "case": case.name,
            "candidate": name,
            "median_ms": round(1e3 * timing.median, 5),
            "spread": round(timing.spread, 4),
            "tflops": round(case.flops / timing.median / 1e12, 2),
            "gbytes_per_s": round(case.bytes / timing.median / 1e9, 1),
            "percent_of_ceiling": round(100 * bound / timing.median, 1),
            "time_of_torch_moe_over_this": round(timings["torch_moe"].ratio_to(timing), 4),
            "relative_error": error if name == "torch_moe" else None,
            "status": "wrong" if name == "torch_moe" and not error <= TOLERATED else "ok",
        }
        for name, timing in timings.items()
    ]
    lines += [
        {"case": case.name, "candidate": name, "status": "skipped", "reason": reason}
        for name, reason in case.skipped.items()
    ]
    for line, timing in zip(lines, timings.values(), strict=False):
        print(
            f"  {line['candidate']:<20} {spread_text(timing)} {line['tflops']:8.1f} TFLOP/s "
            f"{line['gbytes_per_s']:8.0f} GB/s {line['percent_of_ceiling']:6.1f} % of the ceiling"
        )
    for name, reason in case.skipped.items():
        print(f"  {name:<20} skipped: {reason}")
    if lines[0]["status"] == "wrong":
        print(f"  WRONG: relative error {error:.2e}, allowed {TOLERATED:.0e}")
    return lines


def run(device: torch.device, rounds: int, ceilings: Ceilings, end: float, **which: bool) -> Iterator[dict[str, Any]]:
    """Yield the records of the cases that fit in the time; a case that fails is a record, too."""
    for make in groups(device, **which):
        name = make.func.__name__  # until a case has one
        try:
            for case in make():
                if time.monotonic() > end:
                    print("out of time: the cases that are left are not measured")
                    return
                name = case.name
                print(name, flush=True)
                yield from records(case, device, rounds, ceilings)
                del case
                if device.type == "cuda":
                    torch.cuda.empty_cache()
        except (RuntimeError, NotImplementedError) as error:  # out of memory, or an operator that refuses
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            print(f"  FAILED: {reason}")
            yield {"case": name, "candidate": "torch_moe", "status": "failed", "reason": reason}


def environment(device: torch.device, ceilings: Ceilings) -> dict[str, Any]:
    """Return what every line carries."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {
        "part": "bench",
        "gpu": name,
        "torch": torch.__version__,
        "copy_gbytes_per_s": round(ceilings.copy_gbytes, 1),
        "dense_tflops": round(ceilings.dense_tflops, 1),
    }


def main() -> None:
    """Measure, print a line per candidate, and write JSON lines as they come."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", type=Path, help="append JSON lines to this file")
    parser.add_argument("--budget", type=float, default=180.0, help="seconds; no case is begun after them")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--quick", action="store_true", help="without Zipf routing and the exchange of expert parallelism"
    )
    parser.add_argument("--tiny", action="store_true", help="small sizes: to test this program")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: torch sees no CUDA device (--device cpu --tiny tries the program)")
    end = time.monotonic() + args.budget

    ceilings = measure_ceilings(device, args.rounds, small=args.tiny)
    shared = environment(device, ceilings)
    print(f"{shared['gpu']}: copy {ceilings.copy_gbytes:.0f} GB/s, dense bf16 {ceilings.dense_tflops:.0f} TFLOP/s")
    wrong = False
    with args.output.open("a", buffering=1) if args.output else nullcontext() as output:  # by the line: may be stopped
        for record in run(device, args.rounds, ceilings, end, quick=args.quick, tiny=args.tiny):
            if output is not None:
                output.write(json.dumps({**shared, **record}) + "\n")
            wrong |= record["status"] in ("wrong", "failed")
    raise SystemExit(wrong)


if __name__ == "__main__":
    main()
