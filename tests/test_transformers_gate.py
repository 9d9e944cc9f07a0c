"""The probe: which activation a module applies, and that what it does not know is run as it is."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="transformers is not installed (pip install 'torch-moe[transformers]')")

from test_transformers_experts import check, strange_gate
from transformers.activations import ACT2FN
from transformers_experts import make_experts, make_inputs

from torch_moe.integrations.transformers.gate import Gate, gate_of, probe

pytestmark = pytest.mark.usefixtures("enabled_engine")


def clamped(self, gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return self.act_fn(gate.clamp(max=self.limit)) * up.clamp(-self.limit, self.limit)


def oai(self, gate_up):
    gate, up = gate_up[..., ::2], gate_up[..., 1::2]
    gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
    return (up + 1) * gate * torch.sigmoid(self.alpha * gate)


def clamped_after(self, gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return self.act_fn(gate).clamp(max=self.limit) * up.clamp(-self.limit, self.limit)


def with_attributes(module, **attributes):
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


@pytest.mark.parametrize(
    ("act", "gated", "ungated"),
    [
        ("silu", "swiglu", "silu"),
        ("gelu", "geglu", "gelu"),
        ("gelu_pytorch_tanh", "geglu_tanh", "gelu_tanh"),
        ("gelu_new", "geglu_tanh", "gelu_tanh"),
        ("relu", "reglu", "relu"),
        ("relu2", None, "relu2"),
        ("quick_gelu", "swiglu", None),
        ("tanh", None, None),
        ("mish", None, None),
        ("gelu_10", None, None),
    ],
)
def test_activations_by_name(act, gated, ungated):
    alpha = 1.702 if act == "quick_gelu" else 1.0
    assert gate_of(make_experts(act_fn=ACT2FN[act])) == (gated and Gate(gated, alpha=alpha))
    assert gate_of(make_experts(act_fn=ACT2FN[act], has_gate=False)) == (ungated and Gate(ungated))
    for has_gate in (True, False):  # and what is not known is right, too
        check(make_experts(act_fn=ACT2FN[act], has_gate=has_gate), *make_inputs())


@pytest.mark.parametrize("limit", [7.0, 7, 10.0, 2.25, 0.5, 100.0, 3000.0])
@pytest.mark.parametrize("alpha", [1.0, 1.702, 0.9])
def test_numbers_are_read_from_the_module(limit, alpha):
    gate = gate_of(with_attributes(make_experts(apply_gate=oai), limit=limit, alpha=alpha))
    assert gate == Gate("swiglu", "interleaved", alpha, limit, 1.0)
    gate = gate_of(with_attributes(make_experts(apply_gate=clamped), limit=limit))
    assert gate == Gate("swiglu", limit=limit)


def test_a_limit_in_the_code_is_found_if_it_is_a_usual_one():
    def gate_of_seven(self, gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return nn.functional.silu(gate.clamp(max=7.0)) * up.clamp(-7.0, 7.0)

    assert gate_of(make_experts(apply_gate=gate_of_seven)) == Gate("swiglu", limit=7.0)


def test_what_the_config_says_is_not_believed():
    module = make_experts(apply_gate=oai)
    module.config.hidden_act = "gelu"
    assert gate_of(with_attributes(module, limit=7.0, alpha=1.702)).activation == "swiglu"


@pytest.mark.parametrize(
    "apply_gate",
    [strange_gate, clamped_after, lambda self, x: nn.functional.glu(x), lambda self, x: oai(self, x) * 1.001],
    ids=["strange", "clamped_after", "glu", "nearly"],
)
def test_unknown_activations_run_as_they_are(apply_gate):
    module = with_attributes(make_experts(apply_gate=apply_gate, has_bias=True), limit=0.5, alpha=1.702)
    assert gate_of(module) is None
    assert probe(module).reason
    check(module, *make_inputs())


def test_an_activation_that_may_change_by_itself_is_not_fused():
    class Learned(nn.Module):
        def __init__(self):
            super().__init__()
            self.slope = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return x * torch.sigmoid(self.slope * x)

    module = make_experts(act_fn=Learned())
    assert "act_fn" in probe(module).reason
    actual = check(module, *make_inputs())
    assert actual["act_fn.slope"] != 0  # its own gradient arrives

    module = make_experts(act_fn=nn.Sequential(nn.SiLU(), nn.Dropout(0.5))).eval()
    assert gate_of(module) is None  # or training would silently lose the dropout

    def reads_config(self, gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return nn.functional.silu(gate * self.config.slope) * up

    module = make_experts(apply_gate=reads_config)
    module.config.slope = 1.0
    assert "config" in probe(module).reason


def test_one_that_raises_on_the_table_is_run_as_it_is():
    def fixed_width(self, gate_up):
        assert gate_up.shape[-1] == 40
        return strange_gate(self, gate_up)

    module = make_experts(apply_gate=fixed_width)
    assert "AssertionError" in probe(module).reason
    check(module, *make_inputs())


def test_probed_again_when_an_attribute_changes():
    module = with_attributes(make_experts(apply_gate=clamped), limit=7.0)
    assert gate_of(module) == Gate("swiglu", limit=7.0)
    module.limit = 0.25
    check(module, *make_inputs())
    assert gate_of(module) == Gate("swiglu", limit=0.25)
    module.act_fn = nn.functional.tanh
    assert gate_of(module) is None
    check(module, *make_inputs())
    assert gate_of(copy.deepcopy(module)) is None


def test_what_a_helper_method_reads_counts():
    def clamp_by_helper(self, gate_up):
        return self._clamped(gate_up)

    module = make_experts(apply_gate=clamp_by_helper)
    type(module)._clamped = clamped
    with_attributes(module, limit=7.0)
    assert gate_of(module) == Gate("swiglu", limit=7.0)
    module.limit = 0.25
    check(module, *make_inputs())


def test_under_autocast_and_inference_the_answer_is_the_same():
    module = make_experts()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        assert gate_of(module) == Gate("swiglu")


def test_no_answer_is_kept_from_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    module = make_experts()
    with FakeTensorMode():
        assert gate_of(module) is None
    assert gate_of(module) == Gate("swiglu")
