"""import torch_moe: quick, light, and clear when it fails."""

import subprocess
import sys

import pytest

import torch_moe
from torch_moe import _load

MEASURE = """
import sys, time, torch
before = set(sys.modules)
start = time.process_time()  # what others do on the machine does not count
import torch_moe
print(time.process_time() - start)
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
print(*[name for name in set(sys.modules) - before if name.startswith("torch.")])
"""


def fresh_import():
    result = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    seconds, packages, torch_modules = result.stdout.splitlines()
    return float(seconds), set(packages.split()), torch_modules.split()


def test_import_is_quick_and_pulls_in_nothing_heavy():
    seconds, packages, torch_modules = fresh_import()
    if seconds > 0.3:  # once more, on a machine that was busy
        seconds = fresh_import()[0]
    assert seconds < 0.3
    assert packages - set(sys.stdlib_module_names) - {"torch"} == {"torch_moe"}
    assert not [
        name for name in torch_modules if name.startswith(("torch._dynamo", "torch._inductor", "torch.distributed"))
    ]


def test_public_names():
    parts = {"losses", "nn", "ops"}
    classes = {"BiasBalancer", "Experts", "MoE", "Observation", "Plan", "RoutingStats", "TopKRouter"}
    configs = {"ExpertsConfig", "MoEConfig", "RouterConfig", "SharedExpertsConfig"}
    sizes = {"PRESETS", "ParamReport", "param_report"}
    assert set(torch_moe.__all__) == parts | classes | configs | sizes | {"__version__", "explain", "trace", "upcycle"}
    assert all(hasattr(torch_moe, name) for name in torch_moe.__all__)
    assert torch_moe.__version__ == torch_moe._C.build_info()["version"]


@pytest.mark.parametrize("error", [ImportError("no such file"), RuntimeError("operator moe::plan is registered twice")])
def test_failed_load_lists_numbered_causes(error, monkeypatch):
    class Broken:
        def __getattr__(self, name):
            raise error

    monkeypatch.delattr(torch_moe, "_C")
    monkeypatch.delitem(sys.modules, "torch_moe._C")
    monkeypatch.setattr(sys, "meta_path", [_Raising(error), *sys.meta_path])
    with pytest.raises(
        ImportError, match=f"(?s)did not load.*1\\..*pip install.*2\\..*torch than.*3\\..*4\\..*{error}"
    ):
        _load.load_extension()


class _Raising:
    """A finder that fails for the extension as a broken shared library would."""

    def __init__(self, error):
        self.error = error

    def find_spec(self, name, path=None, target=None):
        if name == "torch_moe._C":
            raise self.error
