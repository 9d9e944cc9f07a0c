"""The README tells the truth: its example runs, and the places it names exist."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def between(name):
    found = re.search(rf"<!-- {name}:begin -->\n(.*?)<!-- {name}:end -->", README, re.DOTALL)
    assert found is not None, f"README.md has no block {name}"
    return found.group(1)


def test_example_runs(capsys):
    code = re.search(r"```python\n(.*?)```", between("example"), re.DOTALL).group(1)
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    printed = capsys.readouterr().out
    assert "tokens per expert: [" in printed
    assert "ISA" in printed


def test_training_example_runs(capsys):
    code = re.search(r"```python\n(.*?)```", between("training"), re.DOTALL).group(1)
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
    names = {"__name__": "readme"}
    exec(compile(code, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "max vio" in printed
    assert "4 of 16 experts" in printed
    assert (names["layer"].router.expert_bias != 0).any()


def test_router_example_runs(capsys):
    code = re.search(r"```python\n(.*?)```", between("routers"), re.DOTALL).group(1)
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
    names = {"__name__": "readme"}
    exec(compile(code, "README.md", "exec"), names)
    assert "46,702,792,704 parameters, 12,879,925,248 active" in capsys.readouterr().out
    assert names["again"].shape == (16, 64)


def test_transformers_example_runs(capsys):
    pytest.importorskip("transformers", reason="transformers is not installed (pip install 'torch-moe[transformers]')")
    code = re.search(r"```python\n(.*?)```", between("transformers"), re.DOTALL).group(1)
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
    names = {"__name__": "readme"}
    try:
        exec(compile(code, "README.md", "exec"), names)
    finally:
        if "engine" in names:
            names["engine"].disable()
    printed = capsys.readouterr().out
    assert "2 x model.layers.*.mlp.experts (DeepseekV3Experts): torch_moe, one fused operator: swiglu" in printed
    assert any(layer.bias.any() for layer in names["balancer"].layers)


def test_named_places_exist():
    named = re.findall(r"^([\w/.]+/)", between("tree"), re.MULTILINE)
    named += re.findall(r"`((?:python|tests|cpp)/[\w/.]+)`", README + (ROOT / "CONTRIBUTING.md").read_text())
    assert len(named) > 10
    assert [place for place in named if not (ROOT / place).exists()] == []


def titles_of(page):
    """The anchors that a page's titles make."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "benchmarks/README.md"])
def test_links_lead_somewhere(name):
    page = ROOT / name
    for target, anchor in re.findall(r"\]\((?!http)([^)#]*)(?:#([\w-]+))?\)", page.read_text(encoding="utf-8")):
        to = page.parent / target if target else page
        assert to.is_file(), target
        assert not anchor or anchor in titles_of(to), anchor


def test_every_benchmark_is_listed():
    listed = set(re.findall(r"^\| `(bench_\w+\.py)`", (ROOT / "benchmarks/README.md").read_text(), re.MULTILINE))
    assert listed == {program.name for program in (ROOT / "benchmarks").glob("bench_*.py")}


def test_make_targets_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"`?make ([\w-]+)`?", between_code()))
    assert {"bench", "test", "lint"} <= named <= targets


def between_code():
    """Commands: lines that start with make, and inline code."""
    text = README + (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return "\n".join(re.findall(r"^make .*$|`make [\w-]+`", text, re.MULTILINE))


def test_options_named_in_the_readme_exist():
    from torch_moe.cli.shapes import SHAPES

    shapes = re.search(r"--shape (\S+) .*# also (.*)$", README, re.MULTILINE)
    named = {shapes.group(1), *(word.strip() for word in shapes.group(2).split(","))}
    assert named <= set(SHAPES)


def test_expert_parallel_example_runs(monkeypatch, capsys):
    """As torchrun would start it, with one process."""
    code = re.search(r"```python\n(.*?)```", between("expert-parallel"), re.DOTALL).group(1)
    # Port 0 is any that is free: one that was found free could be taken again by then.
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    try:
        exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    finally:
        if torch.distributed.is_initialized():  # the example stopped before its end
            torch.distributed.destroy_process_group()
    assert capsys.readouterr().out == "torch.Size([16, 256, 64])\n"


def test_two_meshes_example_runs(tmp_path):
    """On four ranks, by torchrun; all ranks clip by the same norm."""
    code = re.search(r"```python\n(.*?)```", between("expert-parallel-fsdp"), re.DOTALL).group(1)
    leave = "import os\nimport sys\n\nsys.stdout.flush()\nos._exit(0)\n"  # why: tests/distributed/rank.py
    (tmp_path / "script.py").write_text(code + leave)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", "script.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    norms = re.findall(r"norm (\d+\.\d{4})", done.stdout)  # ranks may share a line
    assert len(norms) == 12
    assert all(norms.count(norm) % 4 == 0 for norm in norms), norms
    assert len(list((tmp_path / "checkpoint").glob("*.distcp"))) == 4
