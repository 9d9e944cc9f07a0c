"""Run by tests/test_transformers_parallel.py, one process per rank: models that transformers itself shards."""

import os
import sys
from pathlib import Path

import torch
from rank import run
from torch import distributed

sys.path.insert(0, str(Path(__file__).parent.parent))

from transformers import DeepseekV3ForCausalLM, MixtralForCausalLM  # the folder above is known now
from transformers.distributed.configuration_utils import DistributedConfig
from transformers_models import tiny_model, token_ids

from torch_moe.integrations import transformers as engine

CLASSES = {"mixtral": MixtralForCausalLM, "deepseek_v3": DeepseekV3ForCausalLM}


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def main(rank, world_size, store, family, kind):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    engine.enable()
    cls, inputs = CLASSES[family], {"input_ids": token_ids(2, 7), "labels": token_ids(2, 7)}
    model = tiny_model(cls, vocab_size=100)  # which two ranks can share
    model.set_experts_implementation("torch_moe")
    expected = model(**inputs)
    expected.loss.backward()
    folder = Path(store).parent / "model"
    if rank == 0:
        model.save_pretrained(folder)
    distributed.barrier()

    config = DistributedConfig(tp_size=world_size, enable_expert_parallel=kind == "ep")
    sharded = cls.from_pretrained(folder, distributed_config=config, experts_implementation="torch_moe").eval()
    experts = [module for module in sharded.modules() if hasattr(module, "is_transposed")]
    assert experts
    seen = []
    for module in experts:
        module.register_forward_pre_hook(lambda m, args: seen.append((m, args[1])))
    actual = sharded(**inputs)
    actual.loss.backward()
    for module, ids in seen:
        down_proj = module.down_proj.to_local() if hasattr(module.down_proj, "to_local") else module.down_proj
        assert down_proj.shape[0 if kind == "ep" else 2] == (4 if kind == "ep" else 24) // world_size
        assert kind == "tp" or (ids >= 4 // world_size).any()  # slots of other ranks
    atol = 1e-4 * expected.logits.abs().max().item()
    torch.testing.assert_close(whole(actual.logits), expected.logits, rtol=0, atol=atol)
    reference, compared = dict(model.named_parameters()), 0
    for name, parameter in sharded.named_parameters():
        if name.endswith(("mlp.experts.down_proj", "mlp.experts.gate_up_proj", "mlp.gate.weight")):
            grad, wanted = parameter.grad, reference[name].grad
            grad = grad.to_local() if hasattr(grad, "to_local") else grad
            if name.endswith("gate.weight"):  # the router is whole on every rank
                pass
            elif kind == "ep":
                wanted = wanted.chunk(world_size, dim=0)[rank]
            elif "down_proj" in name:
                wanted = wanted.chunk(world_size, dim=2)[rank]
            else:  # a stretch of the gate's rows and the same of the up's
                wanted = torch.cat([half.chunk(world_size, dim=1)[rank] for half in wanted.chunk(2, dim=1)], dim=1)
            torch.testing.assert_close(grad, wanted, rtol=0, atol=1e-4 * reference[name].grad.abs().max().item())
            compared += 1
    assert compared == 3 * len(experts)
    distributed.destroy_process_group()


if __name__ == "__main__":
    run(main)
