"""The contract of transformers' experts interface, flag by flag, on a bare module against its definition in fp64."""

import copy
import itertools

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="transformers is not installed (pip install 'torch-moe[transformers]')")

from transformers_experts import make_experts, make_inputs, run_experts

from torch_moe.integrations import transformers as engine
from torch_moe.integrations.transformers import gate
from torch_moe.testing import assert_close

FLAGS = [
    dict(zip(("has_gate", "has_bias", "is_transposed"), values, strict=True))
    for values in itertools.product((True, False), repeat=3)
]


pytestmark = pytest.mark.usefixtures("enabled_engine")


def check(module, hidden, ids, weights):
    """Compare output and all gradients with the module's own forward in fp64."""
    dtype = module.down_proj.dtype
    exact = copy.deepcopy(module).double()
    expected = run_experts(exact, hidden.double(), ids, weights.double(), "eager")
    actual = run_experts(module, hidden, ids, weights, "torch_moe")
    assert actual["output"].dtype == hidden.dtype
    sizes = (hidden.shape[1], module.down_proj.shape[1 if module.is_transposed else 2], ids.shape[1])
    for name, value in expected.items():
        steps = sizes if name == "output" else (*sizes, *sizes, len(hidden))
        assert_close(actual[name], value, *steps, dtype=dtype)
    return actual


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("flags", FLAGS, ids=lambda flags: "-".join(name for name, on in flags.items() if on) or "none")
def test_flags(flags, dtype):
    hidden, ids, weights = make_inputs()
    check(make_experts(**flags).to(dtype), hidden.to(dtype), ids, weights)


@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])
def test_routing_weights_and_tokens_of_another_dtype_than_the_experts(hidden_dtype, weights_dtype):
    hidden, ids, weights = make_inputs()
    # What both sides can hold exactly.
    hidden, weights = hidden.bfloat16(), weights.bfloat16()
    actual = check(make_experts().bfloat16(), hidden.to(hidden_dtype), ids, weights.to(weights_dtype))
    assert actual["hidden_states"].dtype == hidden_dtype
    assert actual["top_k_weights"].dtype == weights_dtype


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k"), [(0, 4, 2), (1, 4, 2), (9, 1, 1), (9, 5, 5), (30, 16, 12)]
)
@pytest.mark.parametrize("intermediate", [20, 7])
def test_shapes(num_tokens, num_experts, top_k, intermediate):
    module = make_experts(num_experts, 13, intermediate)
    inputs = make_inputs(num_tokens, 13, num_experts, top_k)
    if num_tokens:
        check(module, *inputs)
    else:
        actual = run_experts(module, *inputs, "torch_moe")
        assert actual["output"].shape == (0, 13)
        assert not any(actual[name].any() for name, _ in module.named_parameters())


def test_all_tokens_on_one_expert():
    hidden, _, weights = make_inputs(top_k=1)
    actual = check(make_experts(), hidden, torch.full((len(hidden), 1), 2), weights)
    assert not actual["gate_up_proj"][[0, 1, 3]].any()


@pytest.mark.parametrize("bad", [4, -1, 5, 2**31, 2**32, 2**32 + 1, -(2**40)])
@pytest.mark.parametrize("fused", [True, False])
def test_ids_of_no_local_expert_cost_nothing_and_touch_nothing(bad, fused):
    """Expert parallelism hands over ids that are not ours, even such that wrap to 0 in 32 bits."""
    module = make_experts(has_bias=True, apply_gate=None if fused else strange_gate)
    module._is_expert_parallel = True
    with torch.no_grad():
        for parameter in module.parameters():
            parameter[3] = torch.nan  # an expert that no slot names
    hidden, ids, weights = make_inputs()
    ids = torch.where(ids == 3, bad, ids)
    actual = run_experts(module, hidden, ids, weights, "torch_moe")
    for parameter in module.parameters():
        parameter.data[3] = 0
    expected = run_experts(module, hidden, ids, weights, "eager")
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value)
    assert not actual["top_k_weights"][ids == bad].any()
    assert not actual["down_proj"][3].any()


def strange_gate(self, gate_up):
    first, second = gate_up.chunk(2, dim=-1)
    return torch.sin(first) * second + 0.5


def test_sizes_come_from_the_weights():
    """Tensor parallelism shards the weights and leaves the attributes as they were."""
    module = make_experts()
    module.intermediate_dim = module.hidden_dim = 999
    module.num_experts = 999
    check(module, *make_inputs())


def test_autocast():
    module, (hidden, ids, weights) = make_experts(has_bias=True), make_inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = run_experts(module, hidden, ids, weights, "torch_moe")
    rounded = copy.deepcopy(module).bfloat16()
    expected = run_experts(rounded, hidden.bfloat16(), ids, weights, "torch_moe")
    assert actual["output"].dtype == torch.float32
    for name, value in expected.items():
        assert torch.equal(actual[name].bfloat16(), value.bfloat16()), name


def test_replaced_weights_are_seen_at_once():
    """Adapters, offloading and sharding hand over other tensors, or other contents, between calls."""
    module, inputs = make_experts(), make_inputs()
    with torch.no_grad():
        before = module(*inputs)
        module.down_proj.data = module.down_proj.data * 2
        torch.testing.assert_close(module(*inputs), 2 * before)
        module.down_proj.mul_(2)
        torch.testing.assert_close(module(*inputs), 4 * before)
        module.down_proj = nn.Parameter(-module.down_proj)
        torch.testing.assert_close(module(*inputs), -4 * before)


def test_quantised_weights_are_refused_by_name():
    module, inputs = make_experts(), make_inputs()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
        parameter.data = parameter.data.to(torch.float8_e4m3fn)
    with pytest.raises(TypeError, match=r"weights must be float32, .*got torch.float8_e4m3fn"):
        module(*inputs)


def test_the_probe_is_no_part_of_the_state():
    module = make_experts()
    before = list(module.state_dict())
    module(*make_inputs())
    assert gate.CACHE in vars(module)
    assert list(module.state_dict()) == before
    check(copy.deepcopy(module), *make_inputs())


@pytest.mark.parametrize("kind", ["fused", "unfused", "unprobed"])
def test_compile_once_for_all_lengths(kind):
    torch.compiler.reset()
    module = make_experts(has_bias=True, apply_gate=strange_gate if kind == "unfused" else None)
    if kind != "unprobed":
        engine.prepare(module)
        assert gate.CACHE in vars(module)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    run_experts(compiled, *make_inputs(7), "torch_moe")
    with torch.compiler.set_stance("fail_on_recompile"):
        results = [run_experts(compiled, *make_inputs(length), "torch_moe") for length in (9, 30)]
    assert (gate.CACHE in vars(module)) == (kind != "unprobed")  # tracing probes nothing
    for actual, length in zip(results, (9, 30), strict=True):
        expected = run_experts(module, *make_inputs(length), "torch_moe")
        for name, value in expected.items():
            torch.testing.assert_close(actual[f"_orig_mod.{name}" if "proj" in name else name], value)


def shard(module, **tensors):
    """Return what a rank has: the module with local tensors in place of its parameters."""
    local = copy.copy(module)
    local._parameters = {name: nn.Parameter(tensor.detach().clone()) for name, tensor in tensors.items()}
    return local


@pytest.mark.parametrize("transposed", [False, True])
def test_expert_parallel_shards_add_up(transposed):
    """As transformers' ep_router hands over: local ids from 0, others one past the last, with a weight of zero."""
    module, (hidden, ids, weights) = make_experts(has_bias=True, is_transposed=transposed), make_inputs()
    expected, parts = run_experts(module, hidden, ids, weights, "torch_moe"), []
    for rank in (0, 1):
        mine = ids // 2 == rank
        local = shard(module, **{name: p[2 * rank : 2 * rank + 2] for name, p in module.named_parameters()})
        local._is_expert_parallel, local.num_experts = True, 2
        inputs = hidden, torch.where(mine, ids % 2, 2), weights * mine
        parts.append(run_experts(local, *inputs, "torch_moe"))
        assert not parts[-1]["top_k_weights"][~mine].any()
    for name in ("output", "hidden_states", "top_k_weights"):
        torch.testing.assert_close(parts[0][name] + parts[1][name], expected[name])
    for name, _ in module.named_parameters():
        torch.testing.assert_close(torch.cat([part[name] for part in parts]), expected[name])


def test_tensor_parallel_shards_add_up():
    """Each rank has a stretch of the gate rows, then the same of the up rows; the attributes still tell the whole."""
    module, inputs = make_experts(), make_inputs()
    module.intermediate_dim = module.down_proj.shape[2]
    expected, parts = run_experts(module, *inputs, "torch_moe"), []
    for rank in (0, 1):
        gate, up = (half.chunk(2, dim=1)[rank] for half in module.gate_up_proj.chunk(2, dim=1))
        local = shard(
            module, gate_up_proj=torch.cat([gate, up], dim=1), down_proj=module.down_proj.chunk(2, dim=2)[rank]
        )
        parts.append(run_experts(local, *inputs, "torch_moe"))
    for name in ("output", "hidden_states", "top_k_weights"):
        torch.testing.assert_close(parts[0][name] + parts[1][name], expected[name])
    torch.testing.assert_close(torch.cat([part["down_proj"] for part in parts], dim=2), expected["down_proj"])
