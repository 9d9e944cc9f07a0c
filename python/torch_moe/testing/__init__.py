"""What tests and benchmarks share: named shapes, named routings, and the one tolerance."""

from torch_moe.testing.routings import ROUTINGS, routing
from torch_moe.testing.shapes import SHAPES, Shape
from torch_moe.testing.tolerance import assert_close, tolerance

__all__ = ["ROUTINGS", "SHAPES", "Shape", "assert_close", "routing", "tolerance"]
