"""The PNG: time per candidate with the measured floor, and time over the number of experts."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch_moe.cli.candidates import K_DENSE, LABELS, TORCH_MOE
from torch_moe.cli.results import FORWARD, FORWARD_BACKWARD, LayerResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DIRECTION_COLORS = {FORWARD: "#4c72b0", FORWARD_BACKWARD: "#dd8452"}


def why_not_plot() -> str | None:
    """Return why no plot can be drawn, or None when it can."""
    if importlib.util.find_spec("matplotlib") is None:
        return "matplotlib is not installed: no plot (pip install 'torch-moe[bench]')"
    return None


def draw(path: Path, results: Sequence[LayerResult], scaling: Sequence[LayerResult]) -> None:
    """Draw one panel per result and one for the scaling table.

    Parameters
    ----------
    path : Path
        Where the PNG goes; its folder is made if it is absent.
    results : sequence of LayerResult
        One per dtype.
    scaling : sequence of LayerResult
        One per number of experts; may be empty.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    panels = len(results) + bool(scaling)
    figure, axes = pyplot.subplots(1, panels, figsize=(6.4 * panels, 4.4), squeeze=False, layout="constrained")
    for axis, result in zip(axes[0], results, strict=False):
        _draw_layer(axis, result)
    if scaling:
        _draw_scaling(axes[0][-1], scaling)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _draw_layer(axis: Axes, result: LayerResult) -> None:
    names = list(dict.fromkeys(measurement.candidate for measurement in result.measurements))
    directions = list(dict.fromkeys(measurement.direction for measurement in result.measurements))
    height = 0.8 / len(directions)
    for number, direction in enumerate(directions):
        for place, name in enumerate(names):
            measurement = result.find(name, direction)
            if measurement is None:
                continue
            center = place + (number - (len(directions) - 1) / 2) * height
            median = measurement.timing.median * 1e3
            label = direction if place == 0 else None
            axis.barh(center, median, height, color=DIRECTION_COLORS[direction], label=label)
            floor = measurement.floor_seconds * 1e3
            floor_label = "floor of the machine" if number == 0 and place == 0 else None
            ends = (center - height / 2, center + height / 2)
            axis.plot([floor, floor], ends, color="black", linewidth=2, label=floor_label)
    axis.set_yticks(range(len(names)), [LABELS[name] for name in names])
    axis.invert_yaxis()
    axis.set_xlabel("median ms")
    axis.set_title(f"{result.shape.name}, {result.dtype}, {result.shape.num_tokens} tokens of {result.routing}")
    axis.legend()


def _draw_scaling(axis: Axes, scaling: Sequence[LayerResult]) -> None:
    experts = [result.shape.num_experts for result in scaling]
    for name, style in ((TORCH_MOE, "o-"), (K_DENSE, "s--")):
        found = [(result.shape.num_experts, result.find(name, FORWARD)) for result in scaling]
        points = [(count, measurement) for count, measurement in found if measurement is not None]
        counts = [count for count, _ in points]
        axis.plot(counts, [measurement.timing.median * 1e3 for _, measurement in points], style, label=LABELS[name])
        if name == TORCH_MOE:
            floors = [measurement.floor_seconds * 1e3 for _, measurement in points]
            axis.plot(counts, floors, "k:", label="floor of the machine")
    axis.set_xscale("log", base=2)
    axis.set_xticks(experts, [str(count) for count in experts])
    axis.set_ylim(bottom=0)
    axis.set_xlabel("experts (capacity)")
    axis.set_ylabel("median ms, forward")
    axis.set_title(f"{scaling[0].shape.name}, {scaling[0].dtype}: more experts, same work")
    axis.legend()
