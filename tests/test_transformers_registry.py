"""enable and disable: what transformers offers before, between and after, and that importing changes nothing."""

import subprocess
import sys

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed (pip install 'torch-moe[transformers]')")

from transformers import MixtralForCausalLM
from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward
from transformers_models import tiny_config, tiny_inputs, tiny_model

from torch_moe.integrations import transformers as engine
from torch_moe.integrations.transformers import gate


@pytest.fixture(autouse=True)
def _disabled():
    engine.disable()
    yield
    engine.disable()


def test_importing_registers_nothing():
    code = (
        "import sys, torch_moe; assert 'transformers' not in sys.modules;"
        "import torch_moe.integrations.transformers as engine; assert 'transformers' not in sys.modules;"
        "from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS as functions;"
        "assert 'torch_moe' not in functions; engine.enable(); assert 'torch_moe' in functions"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_transformers_everything_else_works():
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import torch, torch_moe, torch_moe.integrations.transformers as engine\n"
        "torch_moe.MoE(8, 8, 4, 2)(torch.randn(3, 8))\n"
        "for call in (engine.enable, lambda: engine.convert_checkpoint({}, None)):\n"
        "    try: call()\n"
        "    except ImportError as error: print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    features = ("an experts interface", "tables of its checkpoints' forms")
    needs = "torch_moe.integrations.transformers needs transformers with"
    for line, feature in zip(run.stdout.splitlines(), features, strict=True):
        assert line.startswith(f"{needs} {feature}")
        assert "pip install 'torch-moe[transformers]'" in line


def test_enable_and_disable():
    assert not engine.is_enabled()
    engine.enable()
    engine.enable()  # again is the same
    assert engine.is_enabled()
    assert ALL_EXPERTS_FUNCTIONS["torch_moe"] is engine.experts_forward
    assert ALL_FP8_EXPERTS_FUNCTIONS["torch_moe"] is engine.fp8_experts_forward
    assert ALL_EXPERTS_FUNCTIONS["grouped_mm"] is grouped_mm_experts_forward
    engine.disable()
    assert "torch_moe" not in ALL_EXPERTS_FUNCTIONS
    assert "torch_moe" not in ALL_FP8_EXPERTS_FUNCTIONS


def test_unknown_until_enabled():
    model = tiny_model(MixtralForCausalLM)
    with pytest.raises(ValueError, match="torch_moe"):
        model.set_experts_implementation("torch_moe")


def test_as_default_takes_the_place_of_grouped_mm_and_gives_it_back():
    model = tiny_model(MixtralForCausalLM)
    assert model.config._experts_implementation == "grouped_mm"  # what every model has without being told
    experts = model.model.layers[0].mlp.experts
    expected = model(**tiny_inputs(model)).logits
    assert gate.CACHE not in vars(experts)
    engine.enable(as_default=True)
    actual = model(**tiny_inputs(model)).logits
    assert gate.CACHE in vars(experts)  # it did run on torch-moe
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4 * expected.abs().max().item())
    engine.disable()
    assert ALL_EXPERTS_FUNCTIONS["grouped_mm"] is grouped_mm_experts_forward


def test_as_default_leaves_devices_without_kernels_to_transformers():
    """Elsewhere than where the operators have kernels, the call reaches transformers' function."""
    from torch_moe.integrations.transformers import registry

    class Elsewhere:
        device = torch.device("xpu")

    forward = registry._where_there_are_kernels(engine.experts_forward, lambda *args: "stock")
    assert forward(None, Elsewhere(), None, None) == "stock"


def test_chosen_at_load_in_a_config_and_at_run_time(tmp_path):
    tiny_model(MixtralForCausalLM).save_pretrained(tmp_path)
    engine.enable()
    loaded = MixtralForCausalLM.from_pretrained(tmp_path, experts_implementation="torch_moe")
    assert loaded.config._experts_implementation == "torch_moe"
    assert "experts_implementation" not in (tmp_path / "config.json").read_text()
    config = tiny_config(MixtralForCausalLM, experts_implementation="torch_moe")
    assert MixtralForCausalLM(config).config._experts_implementation == "torch_moe"
    inputs, outputs = tiny_inputs(loaded), []
    for implementation in ("torch_moe", "eager", "torch_moe", "grouped_mm", "torch_moe"):
        loaded.set_experts_implementation(implementation)
        outputs.append(loaded(**inputs).logits)
    assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[0], outputs[4])
