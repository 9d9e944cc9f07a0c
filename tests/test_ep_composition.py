"""ExpertParallel with FSDP2, DCP, recomputation, torch.compile and balancing: real processes over gloo."""

import pytest
from ranks import needs_distributed, run_ranks
from torch.distributed import init_device_mesh

import torch_moe
from torch_moe.distributed import ExpertParallel, Placement, prepare_fsdp

pytestmark = needs_distributed


def test_four_ranks_then_a_checkpoint_at_fewer(tmp_path):
    run_ranks("composition.py", 4, tmp_path, "train")
    for world_size in (3, 2, 1):
        (tmp_path / "store").unlink()
        run_ranks("composition.py", world_size, tmp_path, "load")


def test_what_fsdp_cannot_shard_is_refused(group):
    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("fsdp", "ep"))
    placed = ExpertParallel(torch_moe.MoE(8, 8, 4, 2), mesh, placement=Placement.identity(4, 1))
    with pytest.raises(ValueError, match=r"^prepare_fsdp: layers must have no placement"):
        prepare_fsdp(placed, mesh)
    with pytest.raises(ValueError, match=r"must have the dimensions 'fsdp' and 'ep', got \['dp'\]"):
        prepare_fsdp(placed, init_device_mesh("cpu", (1,), mesh_dim_names=("dp",)))
