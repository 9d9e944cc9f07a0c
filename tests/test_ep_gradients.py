"""Gradients over several meshes: real processes over gloo."""

import pytest
import torch
from ranks import needs_distributed, run_ranks
from torch import nn

from torch_moe.distributed import clip_grad_norm_

pytestmark = needs_distributed


def test_four_ranks(tmp_path):
    run_ranks("gradients.py", 4, tmp_path)


def test_plain_tensors_are_clipped_as_torch_clips_them():
    ours, theirs = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    ours.grad, theirs.grad = torch.tensor([3.0, 4.0, 0.0]), torch.tensor([3.0, 4.0, 0.0])
    assert torch.equal(clip_grad_norm_([ours], 1.0), nn.utils.clip_grad_norm_([theirs], 1.0))
    assert torch.equal(ours.grad, theirs.grad)
    assert clip_grad_norm_([nn.Parameter(torch.ones(1))], 1.0) == 0
    with pytest.raises(ValueError, match=r"max_norm and norm_type must be positive, got 0.0 and 2.0"):
        clip_grad_norm_([ours], 0.0)
