"""Load the compiled extension, or say why it could not be loaded."""

from types import ModuleType

_HINT = """torch_moe: the compiled extension torch_moe._C did not load. Likely causes, most frequent first:
  1. It was never built here: in the repository, run `pip install --no-build-isolation .` (Python may also be reading
     the source folder python/torch_moe instead of the installed package).
  2. It was built against another Python, or an older torch than 2.10 is installed (this one is {version}).
  3. An editable install whose sources moved or changed: build again with `pip install --no-build-isolation -e .`.
  4. Another library in this process also registers operators in the namespace `moe`.
The loader said: {error}"""


def load_extension() -> ModuleType:
    """Import ``torch_moe._C``, which registers ``torch.ops.moe`` as it loads.

    Returns
    -------
    module
        The extension: build information, ISA and threads. The operators are in ``torch.ops.moe``.

    Raises
    ------
    ImportError
        If it cannot be loaded; the message lists the likely causes.
    """
    import torch  # its shared libraries must be in the process before ours

    try:
        from torch_moe import _C
    except (ImportError, RuntimeError) as error:  # RuntimeError: an operator is registered twice
        raise ImportError(_HINT.format(version=torch.__version__, error=error)) from error
    return _C
