"""Tables and the JSON lines file."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch_moe.cli.candidates import K_DENSE, LABELS, TORCH_MOE
from torch_moe.cli.display import Display
from torch_moe.cli.results import FORWARD, FORWARD_BACKWARD, LayerResult

BARS = "▁▂▃▄▅▆▇█"
# More experts than this are shown as bars only.
MAX_COUNTS_SHOWN = 16


def show_load(display: Display, tokens_per_expert: Sequence[int], routing: str) -> None:
    """Print how many rows each expert gets, as bars (and as numbers when there are few)."""
    most, mean = max(tokens_per_expert), sum(tokens_per_expert) / len(tokens_per_expert)
    bars = "".join(BARS[round(count / max(most, 1) * (len(BARS) - 1))] if count else "." for count in tokens_per_expert)
    counts = f" {list(tokens_per_expert)}" if len(tokens_per_expert) <= MAX_COUNTS_SHOWN else ""
    empty = sum(count == 0 for count in tokens_per_expert)
    display.note(
        f"load per expert ({routing}): {bars}{counts}  max {most}, mean {mean:.1f}, max/mean {most / mean:.2f}, "
        f"{empty} empty"
    )


def show_layer(display: Display, result: LayerResult) -> None:
    """Print the main table, why candidates are absent from it, and the share of each stage."""
    header = ["", "median ms", "± %", "GFLOP/s", "% of floor", f"time / {LABELS[K_DENSE]}"]
    for direction in (FORWARD, FORWARD_BACKWARD):
        rows = [
            [
                LABELS[m.candidate],
                f"{m.timing.median * 1e3:.2f}",
                f"{50 * m.timing.spread:.1f}",
                f"{m.gflops:.1f}",
                f"{m.percent_of_floor:.1f}",
                f"{m.ratio_to_k_dense:.2f}",
            ]
            for m in result.measurements
            if m.direction == direction
        ]
        if rows:
            rounds = len(result.measurements[0].timing.samples)
            display.table(
                f"{result.shape.name}, {result.dtype}, {direction} (median of {rounds} interleaved rounds)",
                header,
                rows,
            )
    machine = result.machine
    display.note(f"floor: {machine.gflops:.0f} GFLOP/s in {result.dtype}, {machine.read_gbytes:.1f} GB/s memory reads")
    for candidate, reason in result.skipped.items():
        display.note(f"not run: {LABELS[candidate]}: {reason}")
    display.note(f"noise of this run: half of all samples lie within ±{50 * result.noise:.1f} % of their median")
    _show_stages(display, result)


def _show_stages(display: Display, result: LayerResult) -> None:
    layer = result.find(TORCH_MOE, FORWARD)
    if not result.stages or layer is None:
        return
    total = sum(stage.timing.median for stage in result.stages)
    rows = [
        [stage.name, f"{stage.timing.median * 1e3:.3f}", f"{100 * stage.timing.median / total:.1f}"]
        for stage in result.stages
    ]
    rows.append(["all stages one by one", f"{total * 1e3:.3f}", "100.0"])
    rows.append(["the layer (fused)", f"{layer.timing.median * 1e3:.3f}", f"{100 * layer.timing.median / total:.1f}"])
    display.table(
        f"{result.shape.name}, {result.dtype}, stages of the forward", ["stage", "median ms", "share %"], rows
    )


def show_scaling(display: Display, results: Sequence[LayerResult]) -> None:
    """Print how time answers to the number of experts: capacity grows, work does not.

    The rows are minutes apart. K x dense does the same work in each, so the ratio to it leaves the machine's drift out.
    """
    rows = []
    for result in results:
        layer, dense = result.find(TORCH_MOE, FORWARD), result.find(K_DENSE, FORWARD)
        if layer is None or dense is None:
            continue
        rows.append(
            [
                str(result.shape.num_experts),
                f"{result.shape.num_params / 1e6:.0f}",
                f"{result.imbalance:.2f}",
                f"{layer.timing.median * 1e3:.2f}",
                f"{dense.timing.median * 1e3:.2f}",
                f"{layer.percent_of_floor:.1f}",
                f"{layer.ratio_to_k_dense:.2f}",
            ]
        )
    dense_name = LABELS[K_DENSE]
    header = ["experts", "params (M)", "max/mean load", "median ms", f"{dense_name} ms", "% of floor"]
    shape = results[0].shape
    title = f"{shape.name}, {results[0].dtype}, forward: more experts, same work (top_k={shape.top_k})"
    display.table(title, [*header, f"time / {dense_name}"], rows)


def write(display: Display, options: argparse.Namespace, lines: Sequence[dict[str, Any]]) -> None:
    """Write records where ``--output`` and ``--json`` want them."""
    if options.output is not None:
        append_jsonl(options.output, lines)
        display.note(f"appended {len(lines)} lines to {options.output}")
    if options.json:
        print(json.dumps(lines, indent=1))


def append_jsonl(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Append one JSON object per line, and make the folder if it is absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
