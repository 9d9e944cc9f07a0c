"""ExpertParallel with FSDP2, DCP, recomputation, torch.compile and balancing: real processes over gloo."""

from ranks import needs_distributed, run_ranks

pytestmark = needs_distributed


def test_four_ranks_then_a_checkpoint_at_fewer(tmp_path):
    run_ranks("composition.py", 4, tmp_path, "train")
    for world_size in (3, 2, 1):
        (tmp_path / "store").unlink()
        run_ranks("composition.py", world_size, tmp_path, "load")
