"""A page about a run of gpu_check.py: what became of each part, and each target next to what was measured."""

from collections.abc import Mapping
from typing import Any

from gpu_parts import Outcome

# case, what to look at, "at least" or "at most", the target. Of an H200. share_of_NAME is that candidate's time over
# ours.
TARGETS = (
    ("layer (32768, 4096, 1024, 128, 8) uniform forward", "tflops", "at least", 500.0),
    ("layer (32768, 4096, 1024, 128, 8) uniform forward", "share_of_cublas_equal_flops", "at least", 0.85),
    ("layer (32768, 4096, 1024, 128, 8) uniform forward+backward", "backward_tflops", "at least", 450.0),
    ("layer (65536, 1024, 672, 31, 3) uniform forward+backward", "median_ms", "at most", 9.0),
    ("grouped_gemm", "tflops", "at least", 650.0),
    ("gather", "share_of_rows_in_order", "at least", 1 / 1.1),
    ("decode 1 tokens", "median_ms", "at most", 0.185),
    ("decode 8 tokens", "median_ms", "at most", 0.204),
    ("decode 32 tokens", "median_ms", "at most", 0.325),
    ("route", "percent_of_ceiling", "at least", 80.0),
    ("plan", "percent_of_ceiling", "at least", 80.0),
    ("combine", "percent_of_ceiling", "at least", 80.0),
    # The copy of the ceiling is large: small calls also stand next to a copy of as many bytes, launch included.
    ("route", "share_of_copy_equal_bytes", "at least", 0.8),
    ("plan", "share_of_copy_equal_bytes", "at least", 0.8),
    ("combine", "share_of_copy_equal_bytes", "at least", 0.8),
)
# What would be better still: case and milliseconds.
AIMS = {
    "decode 1 tokens": 0.040,
    "decode 8 tokens": 0.150,
    "decode 32 tokens": 0.310,
    "layer (65536, 1024, 672, 31, 3) uniform forward+backward": 4.6,
}


def measured(records: Mapping[tuple[str, str], Mapping[str, Any]], case: str, figure: str) -> float | None:
    """Return a figure of our candidate, or None where it was not measured."""
    ours = records.get((case, "torch_moe"))
    if ours is None or "median_ms" not in ours:
        return None
    if figure.startswith("share_of_"):
        other = records.get((case, figure.removeprefix("share_of_")), {}).get("median_ms")
        return None if other is None else other / ours["median_ms"]
    if figure == "backward_tflops":  # of forward and backward, two thirds of the operations are the backward's
        forward = records.get((case.removesuffix("+backward"), "torch_moe"))
        if forward is None:
            return None
        seconds = (ours["median_ms"] - forward["median_ms"]) / 1e3
        return ours["tflops"] * ours["median_ms"] / 1e3 * 2 / 3 / seconds if seconds > 0 else None
    return float(ours[figure])


def summary(outcomes: Mapping[str, Outcome], gpu: str) -> str:
    """Return the page."""
    lines = [f"torch-moe on {gpu or 'no GPU'}"]
    for part, result in outcomes.items():
        lines.append(f"  {part:<10} {result.status}" + (f": {result.reason}" if result.reason else ""))
    records = {
        (record["case"], record["candidate"]): record
        for record in (outcomes["bench"].records if "bench" in outcomes else [])
        if "case" in record
    }
    if not records:
        return "\n".join(lines)
    any_record = next(iter(records.values()))
    lines.append(
        f"ceilings of this run: copy {any_record.get('copy_gbytes_per_s')} GB/s, "
        f"dense bf16 {any_record.get('dense_tflops')} TFLOP/s"
    )
    for case, figure, direction, target in TARGETS:
        value = measured(records, case, figure)
        if value is None:
            verdict = "not measured"
        else:
            reached = value >= target if direction == "at least" else value <= target
            verdict = f"{value:.4g} ({'reached' if reached else 'MISSED'})"
            verdict += f", aim {AIMS[case]:g}" if figure == "median_ms" and case in AIMS else ""
        lines.append(f"  {case}: {figure} {direction} {target:g}: {verdict}")
    slower = [
        f"{case} ({name}: {record['time_of_torch_moe_over_this']:.2f})"
        for (case, name), record in records.items()
        if name in ("grouped_mm", "transformers", "vllm") and record.get("time_of_torch_moe_over_this", 0) > 1
    ]
    lines.append("slower than what one would run instead: " + ("; ".join(slower) or "nowhere"))
    return "\n".join(lines)
