"""How a script of this folder starts and leaves."""

import os
import sys
from collections.abc import Callable

from torch.distributed import Store


def run(main: Callable[..., None]) -> None:
    """Call ``main(rank, world_size, path, *arguments)`` with the command line's, and leave without Python's own end.

    At that end a thread of gloo may still be dropping the tensors of its last call: the interpreter that it asks for
    ends the thread instead, and C++ aborts ("terminate called without an active exception"). Destroying the groups
    does not wait for such threads, since torch keeps a mesh that a DTensor has used, and with it its groups; and no
    group can be destroyed without the rank that it lost.
    """
    rank, world_size, *arguments = sys.argv[1:]
    main(int(rank), int(world_size), *arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def meet(store: Store, rank: int, world_size: int) -> None:
    """Wait until all ranks are here, without the group: what is timed next is not how far behind one of them was."""
    store.set(f"here/{rank}", "")
    store.wait([f"here/{other}" for other in range(world_size)])
