"""The examples in the docstrings are what happens."""

import doctest
import importlib
import pkgutil

import pytest
import torch

import torch_moe


def examples():
    for module in pkgutil.walk_packages(torch_moe.__path__, "torch_moe."):
        if module.name.endswith(("__main__", "._C")):
            continue
        for test in doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(module.name)):
            if test.examples:
                yield test


@pytest.mark.parametrize("test", list(examples()), ids=lambda test: test.name)
def test_example(test):
    torch.manual_seed(0)
    report = []
    test.globs.update(torch=torch)
    result = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test, out=report.append)
    assert result.attempted > 0
    assert result.failed == 0, "".join(report)
