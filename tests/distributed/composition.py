"""Run by tests/test_ep_composition.py, one process per rank: ExpertParallel with what else torch has to offer."""

from pathlib import Path

import torch
from rank import run
from torch import distributed
from torch.distributed import checkpoint, init_device_mesh
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint as recompute

from torch_moe import BiasBalancer, ExpertsConfig, MoE, MoEConfig, RouterConfig, SharedExpertsConfig
from torch_moe.distributed import (
    ExpertParallel,
    average_gradients,
    clip_grad_norm_,
    expert_shards,
    placement_of,
    prepare_fsdp,
    solve_placement,
)
from torch_moe.testing import assert_close

H, I, E, K, T = 16, 24, 6, 2, 12  # noqa: E741


class Block(torch.nn.Module):
    """What FSDP wraps in a model: a layer and its residual connection."""

    def __init__(self, moe):
        super().__init__()
        self.moe = moe

    def forward(self, x):
        return x + self.moe(x)


def make_layer(**options):
    torch.manual_seed(0)
    return MoE(H, I, E, K, num_shared_experts=1, **options)


def tokens(rank):
    return torch.randn(T, H, generator=torch.Generator().manual_seed(100 + rank))


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def trained(world_size, max_norm):
    """What one process gets from the mean of all ranks' losses: the layer, after clipping, and the norm."""
    layer = Block(make_layer())
    sum(layer(tokens(rank)).square().mean() for rank in range(world_size)).div(world_size).backward()
    return layer, torch.nn.utils.clip_grad_norm_(layer.parameters(), max_norm)


def check_gradients(layer, expected):
    for (name, parameter), (_, other) in zip(layer.named_parameters(), expected.named_parameters(), strict=True):
        assert parameter.grad is not None, name
        assert_close(whole(parameter.grad), other.grad, T * K, H, I)


def without_fsdp(rank, world_size):
    layer = Block(ExpertParallel(make_layer(), distributed.group.WORLD, num_chunks=2))
    layer(tokens(rank)).square().mean().backward()
    average_gradients(layer)
    expected, norm = trained(world_size, 1e-3)
    assert_close(clip_grad_norm_(layer.parameters(), 1e-3), norm, T * K, H, I)
    check_gradients(layer, expected)


def with_replicas(rank, world_size):
    """Expert 0 on three ranks: each replica ends with the expert's whole gradient, bit by bit."""
    loads = torch.tensor([30.0, 12.0, 1.0, 1.0, 1.0, 1.0])
    placement = placement_of(solve_placement(loads, world_size, num_redundant=3), E)
    assert (placement.table[0] >= 0).sum() == 3  # the order of two terms would not show
    layer = Block(ExpertParallel(make_layer(), distributed.group.WORLD, placement=placement))
    layer(tokens(rank)).square().mean().backward()
    average_gradients(layer)
    expected = trained(world_size, 1e9)[0]
    for name, parameter in layer.moe.experts.named_parameters():
        wanted = expected.moe.experts.get_parameter(name).grad
        for place, expert in enumerate(placement.experts_of(rank)):
            assert_close(parameter.grad[place], wanted[expert], T * K, H, I)
        gathered = [None] * world_size
        distributed.all_gather_object(gathered, {e: parameter.grad[p] for p, e in enumerate(layer.moe.experts.experts)})
        for expert in range(E):
            copies = [grads[expert] for grads in gathered if expert in grads]
            assert all(torch.equal(copies[0], copy) for copy in copies)


def with_fsdp(rank, world_size):
    mesh = init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=("fsdp", "ep"))
    layer = Block(ExpertParallel(make_layer(), mesh))
    prepare_fsdp(layer, mesh)
    fully_shard(layer, mesh=mesh["fsdp", "ep"]._flatten("all"))
    layer(tokens(rank)).square().mean().backward()
    expected, norm = trained(world_size, 1e-3)
    assert_close(clip_grad_norm_(layer.parameters(), 1e-3), norm, T * K, H, I)
    check_gradients(layer, expected)


def save_fsdp(rank, world_size, path):
    """Experts over two ranks, each expert's part over two more; every rank holds numbers of its own."""
    mesh = init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=("fsdp", "ep"))
    layer = Block(ExpertParallel(make_layer(), mesh))
    prepare_fsdp(layer, mesh)
    fully_shard(layer, mesh=mesh["fsdp", "ep"]._flatten("every"))
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    layer(tokens(rank)).square().mean().backward()
    optimizer.step()
    state = {"model": layer.state_dict(), "optimizer": get_optimizer_state_dict(layer, optimizer)}
    checkpoint.save(state, checkpoint_id=path)
    everything = {name: whole(tensor) for name, tensor in state["model"].items()}
    if rank == 0:
        torch.save(everything, f"{path}.pt")


def load_fsdp(path):
    """What two meshes saved, on one."""
    expected = torch.load(f"{path}.pt")
    plain, parallel = Block(make_layer()), Block(ExpertParallel(make_layer(), distributed.group.WORLD))
    for layer in (plain, parallel):
        state = {"model": layer.state_dict()}
        checkpoint.load(state, checkpoint_id=path)
        layer.load_state_dict(state["model"])
        assert layer.state_dict().keys() == expected.keys()
        for name, tensor in layer.state_dict().items():
            assert torch.equal(whole(tensor), expected[name]), name
    for (name, tensor), (_, first) in zip(
        plain.state_dict().items(), Block(make_layer()).state_dict().items(), strict=True
    ):
        assert not torch.equal(tensor, first), name  # it was trained


def with_every_part(rank):
    """What a layer has beside router and experts acts on this rank's tokens as in one process."""
    router = RouterConfig(
        hidden_size=H, num_experts=E, top_k=K, score_function="sigmoid", num_shared_sinks=2, projection="mlp",
        projection_size=10, projection_state=True, capacity=3,
    )  # fmt: skip
    parts = {"latent_size": 12, "combine": "average", "output_bias": True, "output_norm": True}
    shared = SharedExpertsConfig(hidden_size=H, intermediate_size=I, gate="router")
    experts = ExpertsConfig(hidden_size=12, intermediate_size=I, num_experts=E)
    torch.manual_seed(0)
    layer = MoE.from_config(MoEConfig(router=router, experts=experts, shared_experts=shared, **parts))
    x, state = tokens(rank), torch.randn(T, 10, generator=torch.Generator().manual_seed(rank))
    expected, routing = layer(x, True, router_state=state, router_input=x.tanh())
    parallel = ExpertParallel(layer, distributed.group.WORLD)
    output, own = parallel(x, True, router_state=state, router_input=x.tanh())
    assert_close(output, expected.double(), H, 12, I, K)
    assert torch.equal(own.router_state, routing.router_state)
    output.square().mean().backward()
    assert all(parameter.grad is not None for parameter in parallel.parameters())


def recomputed(rank):
    layer = ExpertParallel(make_layer(), distributed.group.WORLD)
    x, again = tokens(rank).requires_grad_(), tokens(rank).requires_grad_()
    layer(x).sum().backward()
    grads = [whole(parameter.grad).clone() for parameter in layer.parameters()]
    layer.zero_grad()
    recompute(layer, again, use_reentrant=False).sum().backward()
    assert torch.equal(x.grad, again.grad)
    for parameter, grad in zip(layer.parameters(), grads, strict=True):
        assert torch.equal(whole(parameter.grad), grad)


def balanced(rank, world_size):
    layer = ExpertParallel(make_layer(expert_bias=True), distributed.group.WORLD)
    balancer = BiasBalancer.attach(layer, rate=0.1)
    own = layer(tokens(rank), return_routing=True)[1].tokens_per_expert.long()
    distributed.all_reduce(own)
    assert own.sum() == world_size * T * K
    balancer.step()
    wanted = 0.1 * (own.float().mean() - own).sign()
    torch.testing.assert_close(layer.router.expert_bias, wanted - wanted.mean())


def compiled(rank):
    layer = ExpertParallel(make_layer(), distributed.group.WORLD)
    x, again = tokens(rank).requires_grad_(), tokens(rank).requires_grad_()
    expected = layer(x)
    expected.sum().backward()
    grads = [whole(parameter.grad).clone() for parameter in layer.parameters()]
    layer.zero_grad()
    output = torch.compile(layer, fullgraph=True, backend="aot_eager")(again)
    output.sum().backward()
    assert torch.equal(output, expected)
    assert torch.equal(x.grad, again.grad)
    for parameter, grad in zip(layer.parameters(), grads, strict=True):
        assert torch.equal(whole(parameter.grad), grad)


def placed_layer(rank, world_size, num_redundant=2):
    """A layer with replicas, and the moments of its optimizer; all are told apart by expert and name."""
    loads = torch.arange(E, 0, -1).float()
    redundant = min(num_redundant, E * (world_size - 1))
    placement = placement_of(solve_placement(loads, world_size, num_redundant=redundant), E)
    layer = Block(ExpertParallel(make_layer(bias=True), distributed.group.WORLD, placement=placement))
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.0)
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return layer, optimizer


def numbers(like, name, expert):
    seed = sum(map(ord, name)) * E + expert
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed))


def placed_tensors(layer, optimizer):
    """Every local expert's tensor, with a name for it, and the number of the expert."""
    for name, parameter in layer.moe.experts.named_parameters():
        for place, expert in enumerate(layer.moe.experts.experts):
            if expert >= 0:
                yield parameter.data[place], name, expert
                yield optimizer.state[parameter]["exp_avg"][place], f"{name}.exp_avg", expert


def placed_state(layer, optimizer):
    state = get_optimizer_state_dict(layer, optimizer)
    return {"model": layer.state_dict(), "optimizer": expert_shards(layer, state)}


def save_placed(rank, world_size, path):
    layer, optimizer = placed_layer(rank, world_size)
    for tensor, name, expert in placed_tensors(layer, optimizer):
        tensor.copy_(numbers(tensor, name, expert))
    state = placed_state(layer, optimizer)
    checkpoint.save(state, checkpoint_id=path)
    checkpoint.async_save(state, checkpoint_id=f"{path}-async").result()
    for saved in (path, f"{path}-async"):
        metadata = checkpoint.FileSystemReader(saved).read_metadata()
        named = {
            name: m for name, m in metadata.state_dict_metadata.items() if "moe.experts" in name and "step" not in name
        }
        assert len(named) == 4 * 3  # the parameters and their two moments
        for name, tensor in named.items():
            assert tensor.size[0] == E, name
            assert sorted(chunk.offsets[0] for chunk in tensor.chunks) == list(range(E)), name
            written = [index.offset[0] for index in metadata.storage_data if index.fqn == name]
            assert sorted(written) == list(range(E)), (name, written)


def load_placed(rank, world_size, path):
    """Another number of ranks and another placement; the identity; and the plain layer."""
    for saved in (path, f"{path}-async"):
        layer, optimizer = placed_layer(rank, world_size, num_redundant=3)
        for tensor, _, _ in placed_tensors(layer, optimizer):
            tensor.fill_(torch.nan)
        state = placed_state(layer, optimizer)
        checkpoint.load(state, checkpoint_id=saved)
        layer.load_state_dict(state["model"])
        for tensor, name, expert in placed_tensors(layer, optimizer):
            assert torch.equal(tensor, numbers(tensor, name, expert)), (name, expert)
    plain, identity = (
        Block(make_layer(bias=True)),
        Block(ExpertParallel(make_layer(bias=True), distributed.group.WORLD)),
    )
    for other in (plain, identity):
        state = {"model": other.state_dict()}
        checkpoint.load(state, checkpoint_id=path)
        other.load_state_dict(state["model"])
        for name, parameter in other.moe.experts.named_parameters():
            for expert, tensor in enumerate(whole(parameter)):
                assert torch.equal(tensor, numbers(tensor, name, expert)), (name, expert)
    # A layer with a placement also takes a plain state dict.
    layer.moe.experts.down_proj.data.fill_(torch.nan)
    layer.load_state_dict(plain.state_dict())
    for tensor, name, expert in placed_tensors(layer, optimizer):
        assert torch.equal(tensor, numbers(tensor, name, expert)), (name, expert)


def save(path):
    layer = ExpertParallel(make_layer(), distributed.group.WORLD)
    checkpoint.save(layer.state_dict(), checkpoint_id=path)


def load(path):
    layer = make_layer()
    for parameter in layer.parameters():
        parameter.data.fill_(torch.nan)
    layer = ExpertParallel(layer, distributed.group.WORLD)
    state = layer.state_dict()
    checkpoint.load(state, checkpoint_id=path)
    layer.load_state_dict(state)
    for (name, tensor), (_, saved) in zip(layer.state_dict().items(), make_layer().state_dict().items(), strict=True):
        assert torch.equal(whole(tensor), saved), name


def main(rank, world_size, path, part):
    distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world_size)
    folder = Path(path).parent / "checkpoint"
    if part == "load":
        load(folder)
        load_placed(rank, world_size, f"{folder}-placed")
        load_fsdp(f"{folder}-fsdp")
    else:
        without_fsdp(rank, world_size)
        with_replicas(rank, world_size)
        with_fsdp(rank, world_size)
        with_every_part(rank)
        recomputed(rank)
        balanced(rank, world_size)
        compiled(rank)
        save(folder)
        save_placed(rank, world_size, f"{folder}-placed")
        save_fsdp(rank, world_size, f"{folder}-fsdp")
    distributed.destroy_process_group()


if __name__ == "__main__":
    run(main)
