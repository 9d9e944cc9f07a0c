"""What a run measured, as plain records: tables, JSON lines and the plot are all made from these."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch_moe.cli.floor import Machine, Work
from torch_moe.cli.shapes import LayerShape
from torch_moe.testing.timing import Timing

FORWARD = "forward"
FORWARD_BACKWARD = "forward+backward"


@dataclass(frozen=True)
class Measurement:
    """One candidate in one direction."""

    candidate: str
    direction: str
    timing: Timing
    work: Work
    floor_seconds: float
    ratio_to_k_dense: float

    @property
    def gflops(self) -> float:
        """Return useful GFLOP/s: the operations the result needs, not those the candidate spent."""
        return self.work.flops / self.timing.median / 1e9

    @property
    def percent_of_floor(self) -> float:
        """Return the floor over the time, in percent: 100 is as fast as this machine can be."""
        return 100 * self.floor_seconds / self.timing.median


@dataclass(frozen=True)
class Stage:
    """One stage of the layer, timed alone as its own operator."""

    name: str
    timing: Timing


@dataclass(frozen=True)
class LayerResult:
    """Everything measured for one shape and dtype."""

    shape: LayerShape
    dtype: str
    routing: str
    tokens_per_expert: tuple[int, ...]
    machine: Machine
    kernel: str
    measurements: tuple[Measurement, ...]
    stages: tuple[Stage, ...] = ()
    skipped: dict[str, str] = field(default_factory=dict)
    noise: float = 0.0

    @property
    def imbalance(self) -> float:
        """Return the busiest expert's load over the mean."""
        return max(self.tokens_per_expert) * len(self.tokens_per_expert) / max(1, sum(self.tokens_per_expert))

    def find(self, candidate: str, direction: str) -> Measurement | None:
        """Return one measurement, or None when it was not taken."""
        for measurement in self.measurements:
            if (measurement.candidate, measurement.direction) == (candidate, direction):
                return measurement
        return None


def records(results: Sequence[LayerResult], environment: dict[str, Any]) -> list[dict[str, Any]]:
    """Flatten results to JSON-ready records, one per measurement and one per stage.

    Parameters
    ----------
    results : sequence of LayerResult
        What was measured.
    environment : dict
        Put in front of every record: commit, machine, versions, date.
    """
    lines = []
    for result in results:
        shape = result.shape
        common = {
            **environment,
            "shape": shape.name,
            "num_tokens": shape.num_tokens,
            "hidden_size": shape.hidden_size,
            "intermediate_size": shape.intermediate_size,
            "num_experts": shape.num_experts,
            "top_k": shape.top_k,
            "dtype": result.dtype,
            "routing": result.routing,
            "max_over_mean_load": round(result.imbalance, 3),
            "kernel": result.kernel,
            "floor_gflops": round(result.machine.gflops, 1),
            "floor_read_gbytes": round(result.machine.read_gbytes, 2),
            "noise": round(result.noise, 4),
        }
        for measurement in result.measurements:
            lines.append(
                common
                | {"candidate": measurement.candidate, "direction": measurement.direction}
                | _timing(measurement.timing)
                | {
                    "gflops": round(measurement.gflops, 2),
                    "percent_of_floor": round(measurement.percent_of_floor, 2),
                    "ratio_to_k_dense": round(measurement.ratio_to_k_dense, 4),
                }
            )
        for stage in result.stages:
            lines.append(common | {"candidate": f"stage:{stage.name}", "direction": FORWARD} | _timing(stage.timing))
    return lines


def _timing(timing: Timing) -> dict[str, Any]:
    return {
        "median_ms": round(timing.median * 1e3, 4),
        "spread": round(timing.spread, 4),
        "rounds": len(timing.samples),
    }
