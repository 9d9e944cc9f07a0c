"""What is too large for this machine, decided by rule before anything is allocated, and said in words."""

from __future__ import annotations

from dataclasses import dataclass

from torch_moe.cli.errors import UsageError
from torch_moe.cli.machine import GIB
from torch_moe.cli.shapes import LayerShape

# Calls that even a candidate of three rounds makes: two to warm up, three to measure.
LEAST_CALLS = 5


@dataclass(frozen=True)
class Limits:
    """How much memory and time a run may take.

    Parameters
    ----------
    memory : int
        Bytes to hold at once.
    seconds : float
        The time budget of one table.
    gflops : float
        The machine's measured arithmetic rate.
    backward : bool
        Whether gradients are computed.
    """

    memory: int
    seconds: float
    gflops: float
    backward: bool

    def bytes_needed(self, shape: LayerShape, element_size: int) -> int:
        """Return the peak of a run without the dense FFN of total size.

        The weights; the copy that makes the dense FFN of active size; with backward, twice the weights' size, because
        the loop's gradients exist expert by expert and then stacked; activations of one candidate and its temporaries.
        """
        experts = shape.num_experts * (1 + 2 * self.backward)
        active = shape.top_k * (1 + self.backward)
        return ((experts + active) * shape.params_per_expert + self._activations(shape, shape.num_rows)) * element_size

    def fit(self, shape: LayerShape, element_size: int) -> tuple[LayerShape, str | None]:
        """Halve the number of experts until the layer fits into memory.

        Returns
        -------
        shape : LayerShape
            The layer that fits.
        note : str or None
            What was reduced and why; None when nothing was.

        Raises
        ------
        UsageError
            If not even the smallest layer of this kind fits.
        """
        fitting = shape
        while self.bytes_needed(fitting, element_size) > self.memory:
            try:
                fitting = fitting.with_experts(fitting.num_experts // 2)
            except UsageError as error:
                raise UsageError(
                    f"{shape.name} needs {self.bytes_needed(fitting, element_size) / GIB:.1f} GiB with "
                    f"{fitting.num_experts} experts, {self.memory / GIB:.1f} GiB may be used, and fewer experts cannot "
                    f"be: {error} (try --no-backward, --dtype bf16, fewer --tokens or a smaller --shape)"
                ) from error
        if fitting is shape:
            return shape, None
        return fitting, (
            f"reduced: {shape.name} to {fitting.num_experts} of {shape.num_experts} experts; all would need "
            f"{self.bytes_needed(shape, element_size) / GIB:.1f} GiB, {self.memory / GIB:.1f} GiB may be used"
        )

    def why_not_dense_total(self, shape: LayerShape, element_size: int) -> str | None:
        """Return why the dense FFN of total size is left out, or None when it can run."""
        copies = 1 + self.backward
        activations = self._activations(shape, shape.num_experts * shape.num_tokens)
        extra = (copies * shape.num_experts * shape.params_per_expert + activations) * element_size
        # The loop's stacked gradients are not held at the same time.
        needed = self.bytes_needed(shape, element_size) + extra
        if needed > self.memory:
            return f"would need {needed / GIB:.1f} GiB, {self.memory / GIB:.1f} GiB may be used"
        flops = 2.0 * shape.num_tokens * shape.num_experts * shape.params_per_expert * (4 if self.backward else 1)
        seconds = LEAST_CALLS * flops / (self.gflops * 1e9)
        if seconds > 1.5 * self.seconds:
            return (
                f"{shape.num_experts / shape.top_k:.0f} times the work: at least {seconds:.0f} s for "
                f"{LEAST_CALLS} calls (raise --budget above {seconds / 1.5:.0f} to run it)"
            )
        return None

    def _activations(self, shape: LayerShape, rows: int) -> int:
        per_row = 3 * shape.pre_activation_size + 3 * shape.intermediate_size
        return (rows * per_row + 4 * shape.num_rows * shape.hidden_size) * (1 + self.backward)
