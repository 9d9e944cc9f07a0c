"""torch-moe bench --transformers: verifies, measures every implementation, leaves the registry alone, and refuses."""

import importlib.util
import json
from dataclasses import replace

import pytest
import torch

from torch_moe.cli import floor, host, main
from torch_moe.cli.shapes import SHAPES

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None,
    reason="transformers is not installed (pip install 'torch-moe[transformers]')",
)


@pytest.fixture(autouse=True)
def small(monkeypatch, one_thread):
    for name in ("seed", "gpt-oss"):
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_experts": 4, "top_k": 2, "num_tokens": 96}
        monkeypatch.setitem(SHAPES, name, replace(SHAPES[name], **sizes))
    monkeypatch.setattr(floor, "SECONDS", 0.001)


def bench(*arguments):
    return main(["bench", "--transformers", "--rounds", "1", *arguments])


@needs_transformers
def test_every_implementation_is_measured_in_every_direction(capsys, tmp_path):
    from torch_moe.integrations import transformers as engine

    engine.disable()
    output = tmp_path / "bench.jsonl"
    assert bench("--dtype", "fp32,bf16", "--json", "--output", str(output)) == 0
    assert not engine.is_enabled()
    captured = capsys.readouterr()
    lines = json.loads(captured.out)
    assert [json.loads(line) for line in output.read_text().splitlines()] == lines
    keys = ("dtype", "part", "direction", "candidate")
    measured = {tuple(line[key] for key in keys): line for line in lines}
    assert len(measured) == len(lines) == 2 * len(host.PARTS) * 2 * len(host.IMPLEMENTATIONS)
    assert all(line["speedup_over_default"] == 1 for line in lines if line["candidate"] == host.DEFAULT)
    assert all(line["median_ms"] > 0 for line in lines)
    assert captured.err.count("verified") == 2
    assert captured.err.count("times the default") >= 2 * len(host.PARTS) * 2
    assert "Mixtral in transformers, fp32" in captured.err
    assert "its MoE blocks alone, bf16" in captured.err


@needs_transformers
@pytest.mark.parametrize("implementation", host.IMPLEMENTATIONS)
def test_the_blocks_alone_do_the_blocks_work_and_no_more(implementation):
    model, tokens = host._build(SHAPES["seed"], seed=0)
    seen = {}
    hooks = [
        layer.mlp.register_forward_hook(lambda block, _, output: seen.__setitem__(block, output))
        for layer in model.model.layers
    ]
    with host._enabled():
        model.set_experts_implementation(implementation)
        with torch.no_grad():
            model(tokens)
        for hook in hooks:
            hook.remove()
        outputs = host._blocks_call(model, tokens, implementation, host.FORWARD)()
        for output, expected in zip(outputs, seen.values(), strict=True):
            torch.testing.assert_close(output, expected)
        host._blocks_call(model, tokens, implementation, host.FORWARD_BACKWARD)()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == {name for name, _ in model.named_parameters() if ".mlp." in name}


@needs_transformers
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_wrong_result_ends_the_run(monkeypatch, capsys, dtype):
    from torch_moe.integrations.transformers import registry

    def wrong(*arguments):
        return 1.5 * experts_forward(*arguments)

    experts_forward = registry.experts_forward
    monkeypatch.setattr(registry, "experts_forward", wrong)
    assert bench("--dtype", dtype, "--no-backward") == 1
    assert "wrong result: logits on torch-moe are off by" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--shape", "gpt-oss"), "gpt-oss is of another kind"),
        (("--plot", "x.png"), "--transformers times a whole model"),
        (("--routing", "zipf"), "--transformers times a whole model"),
        (("--experts", "4,8"), "--transformers times a whole model"),
    ],
)
@needs_transformers
def test_refusals(capsys, arguments, words):
    with pytest.raises(SystemExit, match="2"):
        bench(*arguments)
    assert words in capsys.readouterr().err


def test_without_transformers_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        bench()
    assert "pip install 'torch-moe[transformers]'" in capsys.readouterr().err
