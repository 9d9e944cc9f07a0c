"""The extension needs the stable C functions of torch and nothing else of it: one binary for every torch >= 2.10."""

import re
import shutil
import subprocess

import pytest

from torch_moe import _C


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm lists the symbols; it comes with binutils")
def test_needs_only_the_stable_functions_of_torch():
    listing = subprocess.run(
        ["nm", "--dynamic", "--undefined-only", _C.__file__], capture_output=True, text=True, check=True
    ).stdout
    symbols = [line.split()[-1] for line in listing.splitlines()]
    of_torch = [name for name in symbols if re.search(r"torch|c10|aten|caffe", name, re.IGNORECASE)]
    assert "aoti_torch_library_init_def" in of_torch
    unstable = [name for name in of_torch if not re.fullmatch(r"(aoti_)?torch_[a-z0-9_]+", name)]
    assert not unstable
