"""`torch-moe bench --transformers`: a whole model of transformers on torch-moe against its own implementations."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from torch_moe.cli import machine, text
from torch_moe.cli.display import Display
from torch_moe.cli.errors import UsageError, WrongResult
from torch_moe.cli.problem import DTYPES
from torch_moe.cli.results import FORWARD, FORWARD_BACKWARD
from torch_moe.cli.shapes import LayerShape
from torch_moe.testing.timing import Observe, Timing, interleave

NUM_LAYERS = 2
NUM_HEADS = 16
OURS, DEFAULT = "torch_moe", "grouped_mm"
IMPLEMENTATIONS = {DEFAULT: "transformers, its default (grouped_mm)", "eager": "transformers, eager", OURS: "torch-moe"}
# In fp32 the difference that two right models may have, of the largest logit; below fp32 a rounding can turn a router's
# choice, so both are held against fp32, where ours may be this much further off than the default.
FP32_BOUND, WORSE = 1e-4, 1.5


@dataclass(frozen=True)
class HostResult:
    """Timings of one model in one dtype: by direction, then by implementation."""

    shape: LayerShape
    dtype: str
    timings: dict[str, dict[str, Timing]]

    def speedup(self, direction: str, name: str) -> float:
        """Return how many times faster than the default, the median over rounds."""
        by_name = self.timings[direction]
        return by_name[DEFAULT].ratio_to(by_name[name])


def measure(
    display: Display, options: argparse.Namespace, shape: LayerShape, dtype: str, observe: Observe
) -> HostResult:
    """Time a random Mixtral-shaped model of two layers with each implementation of its experts, interleaved.

    Raises
    ------
    UsageError
        If transformers is absent, the layer is not Mixtral's kind, or memory is short.
    WrongResult
        If torch-moe's logits are not the default's.
    """
    if importlib.util.find_spec("transformers") is None:
        raise UsageError("--transformers needs transformers (pip install 'torch-moe[transformers]')")
    if shape.layer_options() != _mixtral(shape).layer_options():
        raise UsageError(
            f"--transformers builds Mixtral's layer; {shape.name} is of another kind (use --shape mixtral)"
        )
    # The fp32 weights of the verification; then weights, their gradients and what one layer's backward needs.
    needed = NUM_LAYERS * shape.num_params * (4 + 3 * DTYPES[dtype].itemsize)
    if needed > machine.memory_budget():
        raise UsageError(f"--transformers: {shape.name} would need {needed / machine.GIB:.1f} GiB (use --shape seed)")
    with display.progress("drawing a model, reading text"):
        model, tokens = _build(shape, options.seed)
    display.note()
    display.note(
        f"Mixtral of {NUM_LAYERS} layers, {dtype}: hidden {shape.hidden_size}, intermediate {shape.intermediate_size}, "
        f"{shape.num_experts} experts, top_k {shape.top_k}, {shape.num_tokens} tokens, {NUM_HEADS} heads"
    )
    with _enabled():
        model = _verified(model, tokens, DTYPES[dtype])
        display.note("verified: logits of torch-moe and of the default")
        timings = {}
        for direction in (FORWARD, FORWARD_BACKWARD) if options.backward else (FORWARD,):
            calls = {name: _call(model, tokens, name, direction) for name in IMPLEMENTATIONS}
            with display.progress(f"timing {direction}") as on_sample:
                budget = options.budget / 2
                timings[direction] = interleave(
                    calls, rounds=options.rounds, budget=budget, on_sample=on_sample, observe=observe
                )
    return HostResult(shape, dtype, timings)


def show(display: Display, result: HostResult) -> None:
    """Print the table of one model."""
    header = ["implementation"]
    for direction in result.timings:
        header += [direction, "times the default"]
    rows = []
    for name, label in IMPLEMENTATIONS.items():
        row = [label]
        for direction, by_name in result.timings.items():
            row += [f"{by_name[name].median * 1e3:.1f} ms", f"{result.speedup(direction, name):.2f} x"]
        rows.append(row)
    display.table(f"Mixtral in transformers, {result.dtype}", header, rows)


def records(results: list[HostResult], environment: dict[str, Any]) -> list[dict[str, Any]]:
    """Flatten results to JSON-ready records, one per direction and implementation."""
    return [
        {
            **environment,
            "shape": f"transformers:{result.shape.name}",
            "num_layers": NUM_LAYERS,
            "num_tokens": result.shape.num_tokens,
            "hidden_size": result.shape.hidden_size,
            "intermediate_size": result.shape.intermediate_size,
            "num_experts": result.shape.num_experts,
            "top_k": result.shape.top_k,
            "dtype": result.dtype,
            "candidate": name,
            "direction": direction,
            "median_ms": round(timing.median * 1e3, 4),
            "spread": round(timing.spread, 4),
            "samples": len(timing.samples),
            "speedup_over_default": round(result.speedup(direction, name), 4),
        }
        for result in results
        for direction, by_name in result.timings.items()
        for name, timing in by_name.items()
    ]


def _mixtral(shape: LayerShape) -> LayerShape:
    return LayerShape(
        name=shape.name,
        source=shape.source,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_experts=shape.num_experts,
        top_k=shape.top_k,
    )


def _build(shape: LayerShape, seed: int) -> tuple[Any, torch.Tensor]:
    """Return the model in fp32 and bytes of text, (sequences, 128)."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=256,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=NUM_HEADS,
        num_local_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k,
        max_position_embeddings=text.SEQUENCE_LENGTH,
        use_cache=False,
    )
    torch.manual_seed(seed)
    tokens = text.sample_tokens(text.read_corpus(), shape.num_tokens, seed)
    if shape.num_tokens < text.SEQUENCE_LENGTH:
        tokens = tokens[:, : shape.num_tokens]
    return MixtralForCausalLM(config).eval(), tokens


@contextmanager
def _enabled() -> Iterator[None]:
    """Register torch-moe with transformers, and leave the registry as it was."""
    from torch_moe.integrations import transformers as engine

    was_enabled = engine.is_enabled()
    engine.enable()
    try:
        yield
    finally:
        if not was_enabled:
            engine.disable()


@torch.no_grad()
def _verified(model: Any, tokens: torch.Tensor, dtype: torch.dtype) -> Any:  # noqa: ANN401 - transformers has no types
    """Return the model in ``dtype`` once its logits on torch-moe are right."""

    def logits(implementation: str) -> torch.Tensor:
        model.set_experts_implementation(implementation)
        output: torch.Tensor = model(tokens).logits.double()
        return output

    model.to(dtype).float()  # the numbers that ``dtype`` can hold
    reference = logits(DEFAULT)
    if dtype == torch.float32:
        error, allowed = (logits(OURS) - reference).abs().max(), FP32_BOUND * reference.abs().max()
    else:
        model.to(dtype)
        error, stock = (((logits(name) - reference).square().mean().sqrt()) for name in (OURS, DEFAULT))
        allowed = WORSE * stock
    if not error <= allowed:
        raise WrongResult(f"logits on torch-moe are off by {error:.3g}, more than {allowed:.3g}, in {dtype}")
    return model


def _call(model: Any, tokens: torch.Tensor, implementation: str, direction: str) -> Callable[[], object]:  # noqa: ANN401
    def forward() -> object:
        model.set_experts_implementation(implementation)
        with torch.no_grad():
            return model(tokens).logits

    def forward_backward() -> object:
        model.set_experts_implementation(implementation)
        model.zero_grad(set_to_none=True)
        return model(tokens, labels=tokens).loss.backward()

    return forward_backward if direction == FORWARD_BACKWARD else forward
