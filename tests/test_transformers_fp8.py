"""FP8 experts: what the dequantised experts give, whatever the blocks of scales."""

import copy

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed (pip install 'torch-moe[transformers]')")

from transformers import MixtralConfig
from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS, FP8Experts
from transformers.integrations.moe import use_experts_implementation
from transformers_experts import make_inputs

from torch_moe.integrations import transformers as engine
from torch_moe.testing import assert_close

EXPERTS, HIDDEN, INTERMEDIATE = 5, 24, 20


@pytest.fixture(autouse=True)
def _enabled():
    engine.enable()
    yield
    engine.disable()


def make_fp8(block_size, **config):
    """Return quantised experts and, per projection, the numbers they stand for."""
    config = MixtralConfig(hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_local_experts=EXPERTS, **config)
    config._experts_implementation = "torch_moe"
    # A subclass, for the decorator writes on the class that it is given.
    decorated = use_experts_implementation(
        type("Experts", (FP8Experts,), {}), experts_interface=ALL_FP8_EXPERTS_FUNCTIONS
    )
    module = decorated(config, block_size=block_size)
    generator, exact = torch.Generator().manual_seed(0), {}
    for name in ("gate_up_proj", "down_proj"):
        weight, scale = getattr(module, name), getattr(module, f"{name}_scale_inv")
        weight.requires_grad_(False)
        weight.data = torch.randn(weight.shape, generator=generator).to(weight.dtype)
        scale.data = torch.rand(scale.shape, generator=generator) + 0.1
        rows, columns = weight.shape[1:]
        # Which scale an element has: that of its block, or of its half of gate_up_proj.
        of_row, of_column = torch.arange(rows), torch.arange(columns)
        if block_size is None:
            of_row, of_column = of_row * scale.shape[1] // rows, of_column * 0
        else:
            of_row, of_column = of_row // block_size[0], of_column // block_size[1]
        exact[name] = weight.double() * scale.double()[:, of_row[:, None], of_column]
    return module, exact


def reference(exact, hidden, ids, weights, limit=None):
    output = torch.zeros_like(hidden)
    for token, slot in ((t, k) for t in range(ids.shape[0]) for k in range(ids.shape[1])):
        expert = int(ids[token, slot])
        if 0 <= expert < EXPERTS:
            gate, up = (exact["gate_up_proj"][expert] @ hidden[token]).chunk(2)
            if limit is not None:
                gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
            row = exact["down_proj"][expert] @ (torch.nn.functional.silu(gate) * up)
            output = output.index_add(0, torch.tensor([token]), (weights[token, slot] * row)[None])
    return output


@pytest.mark.parametrize("block_size", [(8, 8), (16, 7), (4, 24), None])
@pytest.mark.parametrize("limit", [None, 2.0])
def test_forward_and_gradients(block_size, limit):
    module, exact = make_fp8(block_size)
    module.limit = limit
    hidden, ids, weights = make_inputs(9, HIDDEN, EXPERTS)
    results = []
    for run, dtype in ((lambda *a: module(*a), torch.float32), (lambda *a: reference(exact, *a, limit), torch.float64)):
        leaves = [hidden.to(dtype).requires_grad_(), weights.to(dtype).requires_grad_()]
        output = run(leaves[0], ids, leaves[1])
        results.append([output.detach(), *torch.autograd.grad(output.sum(), leaves)])
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected, HIDDEN, INTERMEDIATE, 2, HIDDEN, INTERMEDIATE)


def test_bf16_and_few_tokens_and_foreign_ids():
    module, exact = make_fp8((8, 8))
    hidden, _, weights = make_inputs(3, HIDDEN, EXPERTS)
    ids = torch.tensor([[4, 2], [EXPERTS, -1], [2, EXPERTS]])  # experts 0, 1 and 3 are not even dequantised
    hidden = hidden.bfloat16()
    actual = module(hidden, ids, weights)
    assert actual.dtype == torch.bfloat16
    rounded = {name: value.bfloat16().double() for name, value in exact.items()}  # multiplied in the tokens' dtype
    assert_close(actual, reference(rounded, hidden.double(), ids, weights.double()), HIDDEN, INTERMEDIATE, 2)
    assert not module(hidden, torch.full_like(ids, EXPERTS), weights).any()
    assert module(hidden[:0], ids[:0], weights[:0]).shape == (0, HIDDEN)


def test_compiles_whole():
    torch.compiler.reset()
    module, _ = make_fp8((8, 8))
    engine.prepare(module)
    inputs = make_inputs(9, HIDDEN, EXPERTS)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*inputs), module(*inputs))


def test_packed_fp4_is_refused_by_name():
    module, _ = make_fp8((8, 8))
    broken = copy.deepcopy(module)
    broken.down_proj.data = torch.zeros(EXPERTS, HIDDEN, INTERMEDIATE // 2, dtype=torch.int8)
    with pytest.raises(TypeError, match=r"weights must be float8, got torch.int8 .*dequantize=True"):
        broken(*make_inputs(3, HIDDEN, EXPERTS))
