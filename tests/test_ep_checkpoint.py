"""Experts of a placed layer in a state dict: what one process can show; tests/distributed/composition.py has ranks."""

import copy
import io

import pytest
import torch
from ranks import needs_distributed

import torch_moe
from torch_moe.distributed import ExpertParallel, ExpertShards, Placement, expert_shards

pytestmark = needs_distributed


@pytest.fixture
def layer(group):
    reverse = Placement(torch.arange(5, dtype=torch.int32).flip(0)[:, None], 7)
    return ExpertParallel(torch_moe.MoE(8, 4, 5, 2), group, placement=reverse)


def test_copies_stay_what_they_are(layer):
    view = layer.state_dict()["experts.down_proj"]
    assert view.shape == (5, 8, 4)
    assert view.local.data_ptr() == layer.experts.down_proj.data_ptr()
    for other in (view.clone(), view.detach(), view.to(torch.float64), copy.deepcopy(view)):
        assert isinstance(other, ExpertShards)
        assert other.experts == (4, 3, 2, 1, 0)
        assert other.writes == (True,) * 5
        assert torch.equal(other.local.float(), view.local)
    assert view.clone().local.data_ptr() != view.local.data_ptr()
    assert str(view) == "ExpertShards(shape=[5, 8, 4], experts=[4, 3, 2, 1, 0], writes=[True, True, True, True, True])"
    with pytest.raises(NotImplementedError, match=r"ExpertShards: add is not for experts .* \(use .local\)"):
        view + 1


def test_a_state_dict_loads_into_the_layer_it_came_from(layer):
    expected = {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(torch.nan)
    layer.load_state_dict(torch.load(file, weights_only=False))
    for name, parameter in layer.named_parameters():
        assert torch.equal(parameter, expected[name]), name


def test_experts_on_no_rank_cannot_be_saved(layer):
    placement = Placement(torch.tensor([[0], [-1], [1], [-1], [2]], dtype=torch.int32), 3)
    less = ExpertParallel(torch_moe.MoE(8, 4, 5, 2), torch.distributed.group.WORLD, placement=placement)
    view = less.state_dict()["experts.down_proj"]
    with pytest.raises(RuntimeError, match=r"experts \[1, 3\] are on no rank, so experts.down_proj cannot be saved"):
        view.__create_write_items__("experts.down_proj", view)
    assert [chunk.offsets[0] for chunk in view.__create_chunk_list__()] == [0, 2, 4]


def test_only_tensors_of_experts_become_views(layer):
    moment, other = torch.zeros_like(layer.experts.down_proj), torch.zeros(3)
    names = {"experts.down_proj": {"exp_avg": moment, "step": other}, "router.weight": {"exp_avg": other}}
    views = expert_shards(layer, {"state": names, "param_groups": [{"lr": 1.0}]})
    assert views["state"]["experts.down_proj"]["exp_avg"].local.data_ptr() == moment.data_ptr()
    assert views["state"]["experts.down_proj"]["step"] is other
    assert views["state"]["router.weight"]["exp_avg"] is other
    assert views["param_groups"] == [{"lr": 1.0}]
