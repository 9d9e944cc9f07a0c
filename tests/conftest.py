"""Fixtures of all tests: the device they run on, and the instruction sets this machine has."""

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

from torch_moe import _C


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="where the operators run")


# No deadline, no check of how long inputs take to draw: on a busy machine any example may be slow.
settings.register_profile("torch_moe", max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("torch_moe")


def pytest_configure(config: pytest.Config) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)  # the workers share the cores; the tests of threads set their own number


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With --device cuda, leave out the tests that use no device, and all but one of the CPU's instruction sets."""
    if config.getoption("--device") == "cpu":
        return
    kept = [item for item in items if "device" in item.fixturenames and _isa(item) in (None, _C.available_isas()[0])]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept


def _isa(item: pytest.Item) -> str | None:
    callspec = getattr(item, "callspec", None)
    return None if callspec is None else callspec.params.get("isa")


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    device = torch.device(request.config.getoption("--device"))
    if device.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("--device cuda, but torch sees no CUDA device")
    return device


@pytest.fixture
def gpu(device: torch.device) -> torch.device:
    """For what only a GPU has: streams, graphs, a host that runs ahead."""
    if device.type != "cuda":
        pytest.skip("needs a GPU: pytest --device cuda")
    return device


@pytest.fixture(params=_C.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test on each instruction set of this machine."""
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


@pytest.fixture
def restore_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def one_thread(restore_threads: None) -> None:
    """For tensors that are too small for more."""
    torch.set_num_threads(1)


@pytest.fixture
def enabled_engine(one_thread: None) -> Iterator[None]:
    """For tiny models of transformers that run on torch-moe."""
    from torch_moe.integrations import transformers as engine

    engine.enable()
    yield
    engine.disable()


@pytest.fixture
def group() -> Iterator[object]:
    """The default group, of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()
