"""Run by tests/test_ep_faults.py, one process per rank: rank 1 is killed or hangs, the others go on."""

import datetime
import os
import signal
import sys
import time

import pytest
import torch
from rank import meet, run
from torch import distributed

from torch_moe.distributed import RankLost, guard, regroup

HANG_TIMEOUT = 3.0
APART = 6.0  # seconds that the survivors may be apart on a busy machine: they wait so long for each other


def exchange(group=None):
    ranks, rank = distributed.get_world_size(group), distributed.get_rank(group)
    received = torch.empty(ranks)
    distributed.all_to_all_single(received, torch.full((ranks,), float(rank)), group=group)
    assert torch.equal(received, torch.arange(float(ranks)))


def main(rank, world_size, path, fault):
    timeout = datetime.timedelta(seconds=HANG_TIMEOUT if fault == "hung" else 60)
    store = distributed.FileStore(path, world_size)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
    with guard():
        exchange()
    meet(store, rank, world_size)
    if rank == 1:
        if fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(120)

    start = time.monotonic()
    words = r"^guard: rank 1 does not answer, 2 of 3 are left$"
    with pytest.raises(RankLost, match=words) as caught, guard(timeout=APART):
        exchange()
    assert caught.value.lost == [1]
    assert caught.value.survivors == [0, 2]
    seconds = time.monotonic() - start
    limit = (HANG_TIMEOUT if fault == "hung" else 0.0) + 2 * APART  # far below the group's 60 and the hung rank's 120
    assert seconds < limit, seconds
    exchange(regroup([0, 2], timeout=30.0))

    # An error of the code inside, with all ranks alive, stays what it is.
    left = regroup([0, 2], timeout=30.0)
    with pytest.raises(RuntimeError, match=r"^of the user$"), guard(left, timeout=10.0, round_name="1"):
        raise RuntimeError("of the user")
    print(f"rank {rank}: {fault}, named after {seconds:.2f} s", file=sys.stderr)


if __name__ == "__main__":
    run(main)
