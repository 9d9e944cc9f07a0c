"""`torch-moe bench --transformers`: a whole model of transformers on torch-moe against its own implementations."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
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
# The whole model, and of it what an implementation of the experts can change: its MoE blocks alone, router included.
PARTS = {"model": "Mixtral in transformers", "moe_blocks": "its MoE blocks alone"}
IMPLEMENTATIONS = {DEFAULT: "transformers, its default (grouped_mm)", "eager": "transformers, eager", OURS: "torch-moe"}
# In fp32 the difference that two right models may have, of the largest logit; below fp32 a rounding can turn a router's
# choice, so both are held against fp32, where ours may be this much further off than the default.
FP32_BOUND, WORSE = 1e-4, 1.5


@dataclass(frozen=True)
class HostResult:
    """Timings of one model in one dtype: by part and direction, then by implementation."""

    shape: LayerShape
    dtype: str
    timings: dict[tuple[str, str], dict[str, Timing]]

    def speedup(self, part: str, direction: str, name: str) -> float:
        """Return how many times faster than the default, the median over rounds."""
        by_name = self.timings[part, direction]
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
        make_calls = {"model": partial(_call, model, tokens), "moe_blocks": partial(_blocks_call, model, tokens)}
        timings = {}
        for part, make_call in make_calls.items():
            for direction in (FORWARD, FORWARD_BACKWARD) if options.backward else (FORWARD,):
                calls = {name: make_call(name, direction) for name in IMPLEMENTATIONS}
                with display.progress(f"timing {PARTS[part]}, {direction}") as on_sample:
                    timings[part, direction] = interleave(
                        calls, rounds=options.rounds, budget=options.budget / 4, on_sample=on_sample, observe=observe
                    )
    return HostResult(shape, dtype, timings)


def show(display: Display, result: HostResult) -> None:
    """Print a table per part of one model."""
    for part, title in PARTS.items():
        header, rows = ["implementation"], {name: [label] for name, label in IMPLEMENTATIONS.items()}
        for (of, direction), by_name in result.timings.items():
            if of != part:
                continue
            header += [direction, "times the default"]
            for name, row in rows.items():
                row += [f"{by_name[name].median * 1e3:.1f} ms", f"{result.speedup(part, direction, name):.2f} x"]
        display.table(f"{title}, {result.dtype}", header, list(rows.values()))


def records(results: list[HostResult], environment: dict[str, Any]) -> list[dict[str, Any]]:
    """Flatten results to JSON-ready records, one per part, direction and implementation."""
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
            "part": part,
            "candidate": name,
            "direction": direction,
            "median_ms": round(timing.median * 1e3, 4),
            "spread": round(timing.spread, 4),
            "samples": len(timing.samples),
            "speedup_over_default": round(result.speedup(part, direction, name), 4),
        }
        for result in results
        for (part, direction), by_name in result.timings.items()
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


def _blocks_call(model: Any, tokens: torch.Tensor, implementation: str, direction: str) -> Callable[[], object]:  # noqa: ANN401
    """Return a call of every MoE block on what the layers before it give for ``tokens``."""
    blocks = [layer.mlp for layer in model.model.layers]
    inputs: list[torch.Tensor] = []
    hooks = [block.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0])) for block in blocks]
    model.set_experts_implementation(DEFAULT)
    with torch.no_grad():
        model(tokens)
    for hook in hooks:
        hook.remove()
    gradients = [torch.randn_like(hidden_states) for hidden_states in inputs]

    def forward() -> object:
        model.set_experts_implementation(implementation)
        with torch.no_grad():
            return [block(hidden_states) for block, hidden_states in zip(blocks, inputs, strict=True)]

    def forward_backward() -> object:
        model.set_experts_implementation(implementation)
        model.zero_grad(set_to_none=True)
        leaves = [hidden_states.detach().requires_grad_() for hidden_states in inputs]
        outputs = [block(leaf) for block, leaf in zip(blocks, leaves, strict=True)]
        torch.autograd.backward(outputs, gradients)
        return None

    return forward_backward if direction == FORWARD_BACKWARD else forward
