"""Run by tests/test_expert_parallel.py, one process per rank: a layer over ranks is the layer in one process."""

from contextlib import contextmanager, nullcontext

import torch
from rank import run
from torch import distributed

import torch_moe
from torch_moe import ops, reference
from torch_moe.distributed import ExpertParallel, Placement, check_splits, exchange, measure_exchange, tune_chunks
from torch_moe.testing import assert_close

H, I, E, K = 37, 53, 10, 3  # noqa: E741  # E is no multiple of 4 or 8
TOKENS = (40, 0, 7, 33, 1, 12, 0, 25)  # of each rank, more than once none


class Raises:
    """The error that every rank has to see, and the words in it."""

    def __init__(self, kind, *words):
        self.kind, self.words = kind, words

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _):
        assert kind is self.kind, (kind, error)
        assert all(word in str(error) for word in self.words), error
        return True


def make_layer(dtype=torch.float32, **options):
    torch.manual_seed(0)
    return torch_moe.MoE(H, I, E, K, **options).to(dtype)


def inputs(rank, world_size, dtype=torch.float32, counts=TOKENS):
    """All tokens and output gradients, and which of them are this rank's."""
    counts = counts[:world_size]
    generator = torch.Generator().manual_seed(1)
    tokens, grads = torch.randn(2, sum(counts), H, generator=generator).to(torch.bfloat16).to(dtype)
    return tokens, grads, slice(sum(counts[:rank]), sum(counts[: rank + 1]))


def results(layer, tokens, grads, ids=None):
    """Output, gradient of the tokens and gradients of the parameters, those of sharded ones as they lie here."""
    layer.zero_grad()
    leaf = tokens.detach().clone().requires_grad_()
    output = layer(leaf, route_override=ids)
    (output * grads).sum().backward()
    own = {"output": output.detach(), "tokens": leaf.grad}
    for name, parameter in layer.named_parameters():
        grad = parameter.grad
        own[name] = grad.to_local() if hasattr(grad, "to_local") else grad
    return {name: tensor.clone() for name, tensor in own.items()}


def steps(name, num_tokens, world_size):
    """As in test_nn_layer, and one more sum over the ranks."""
    forward = (H, E, H, 1, I, K, world_size)
    return forward if name == "output" else (*forward, H, 2 * I, I, E, world_size, num_tokens)


def test_equals_one_process(rank, world_size):
    cases = {
        "bias": (torch.float32, {"bias": True}),
        "shared": (torch.float32, {"num_shared_experts": 1, "score_function": "sigmoid", "expert_bias": True}),
        "capacity": (torch.float32, {"capacity_factor": 0.5, "weight_layout": "in_out", "recompute": True}),
        "zero": (torch.float32, {"num_zero_experts": 3}),
        "bf16": (torch.bfloat16, {"activation": "gelu"}),
        "fp64": (torch.float64, {}),
    }
    for case, (dtype, options) in cases.items():
        layer = make_layer(dtype, **options)
        tokens, grads, own = inputs(rank, world_size, dtype)
        counts = TOKENS[:world_size]
        ids = torch.cat([layer.router(part).topk_ids for part in tokens.split(counts)])
        expert_parallel = ExpertParallel(layer, distributed.group.WORLD, check=case == "bias")
        actual = results(expert_parallel, tokens[own], grads[own], ids[own])
        # A capacity counts the tokens of a rank: the one process does the same, part by part.
        expected, sums = [], None
        whole = make_layer(dtype, **options).double()
        for part, grad, chosen in zip(tokens.split(counts), grads.split(counts), ids.split(counts), strict=True):
            values = results(whole, part.double(), grad.double(), chosen)
            expected.append({"output": values.pop("output"), "tokens": values.pop("tokens")})
            sums = values if sums is None else {name: sums[name] + value for name, value in values.items()}
        for name, value in actual.items():
            if name.startswith("experts."):
                wanted = sums[name][expert_parallel.experts.experts]
            elif name in expected[rank]:
                wanted = expected[rank][name]
            else:
                distributed.all_reduce(value)
                wanted = sums[name]
            # The tolerance is relative to the largest number of all ranks.
            largest = sums[name] if name in sums else torch.cat([part[name] for part in expected])
            scale = largest.abs().max().view(1)
            try:
                assert_close(
                    torch.cat([value.flatten(), scale.to(value.dtype)]),
                    torch.cat([wanted.flatten(), scale.to(value.dtype).double()]),
                    *steps(name, sum(counts), world_size),
                )
            except AssertionError as error:
                raise AssertionError(f"{case}: {name}: {error}") from None


def test_same_bits_for_chunks_threads_and_runs(rank, world_size):
    """Of what is this library's: a router of zeros gives torch's matrix products nothing to round."""
    counts = [2 * count + 5 for count in TOKENS]  # of one rank's rows alone the order by chunk would be that by rank
    ids = torch.rand(sum(counts[:world_size]), E, generator=torch.Generator().manual_seed(3)).topk(K).indices.int()
    for dtype in (torch.float32, torch.bfloat16):
        expected = None
        for chunks, threads in ((1, 1), (1, 2), (2, 1), (5, 2), (5, 1)):
            torch.set_num_threads(threads)
            layer = make_layer(dtype, bias=True)
            with torch.no_grad():
                layer.router.weight.zero_()
            tokens, grads, own = inputs(rank, world_size, dtype, counts)
            parallel = ExpertParallel(layer, distributed.group.WORLD, num_chunks=chunks)
            actual = results(parallel, tokens[own], grads[own], ids[own])
            expected = expected or actual
            for name, value in actual.items():
                if threads == 1 or name != "router.weight":  # whose sums torch splits by threads
                    assert torch.equal(value, expected[name]), (dtype, chunks, threads, name)
    torch.set_num_threads(1)


@contextmanager
def counted_bytes(rank):
    """Count what leaves this rank, exchange by exchange."""
    sent, original = [], exchange.start

    def start(rows, send, receive, group_name, **options):
        sent.append((sum(send) - send[rank]) * rows[:1].nbytes if len(rows) else 0)
        return original(rows, send, receive, group_name, **options)

    exchange.start = start
    yield sent
    exchange.start = original


def test_bytes_are_those_of_the_formula(rank, world_size):
    experts, top_k, tokens, hidden = 256, 8, 4096, 16
    torch.manual_seed(rank)
    ids = torch.rand(tokens, experts).topk(top_k).indices.int()
    layer = torch_moe.MoE(hidden, 8, experts, top_k)
    parallel = ExpertParallel(layer, distributed.group.WORLD)
    x = torch.randn(tokens, hidden, requires_grad=True)
    with counted_bytes(rank) as sent:
        parallel(x, route_override=ids).sum().backward()
    counts, dispatch, combine, grads, grads_back = sent
    away, free = experts - experts // world_size, 1.0
    for k in range(top_k):
        free *= (away - k) / (experts - k)
    copies = world_size * (1 - free) * (1 - 1 / world_size)  # of a token, to other ranks
    row = ops.ep_pack.__globals__["row_bytes"](hidden, x.dtype, top_k=top_k, has_ids=True, has_weights=True)
    assert abs(dispatch / (tokens * copies * row) - 1) < 0.01
    returned = [combine, grads]
    total = torch.tensor(returned, dtype=torch.float64)
    distributed.all_reduce(total)
    assert ((total / (world_size * tokens * copies * hidden * 4) - 1).abs() < 0.01).all()
    k_copies = tokens * top_k * (1 - 1 / world_size) * row
    wanted = {2: 4.0, 4: 2.2}.get(world_size)
    assert wanted is None or k_copies / dispatch > wanted * 0.99
    assert counts == (world_size - 1) * (2 + experts // world_size + 1) * 4
    assert grads_back > 0


def test_quantised_rows(rank, world_size):
    for wire in ("fp8", "int8"):
        layer = make_layer()
        tokens, grads, own = inputs(rank, world_size)
        parallel = ExpertParallel(layer, distributed.group.WORLD, wire=wire, num_chunks=2)
        actual = results(parallel, tokens[own], grads[own])
        with torch.no_grad():
            _, weights, ids = layer.router(tokens)
            arrived = reference.ep_wire(tokens, wire).double()
            parameters = (layer.experts.gate_up_proj.double(), layer.experts.down_proj.double())
            exact = reference.experts(arrived, *parameters, weights.double(), reference.plan(ids, E))
            plain = reference.experts(tokens.double(), *parameters, weights.double(), reference.plan(ids, E))
        if len(tokens[own]):
            # Within the fp32 tolerance of what arrives; and that moved the output by the rounding of 3 bits or 7.
            assert_close(actual["output"], exact[own], H, 1, I, K, world_size)
            change = (exact - plain).norm() / plain.norm()
            assert 0 < change < {"fp8": 2.0**-4, "int8": 2.0**-6}[wire]


def test_placement_with_replicas(rank, world_size):
    """Replicas change who computes, not what: the sum of their gradients is the expert's."""
    layer = make_layer()
    tokens, grads, own = inputs(rank, world_size)
    plain = results(layer, tokens, grads)
    local = E // world_size + 3
    table = torch.full((E, 2), -1, dtype=torch.int32)
    for expert in range(E):  # dealt in turn; the first experts of all have a second home on the next rank
        table[expert, 0] = expert % world_size * local + expert // world_size
    for expert in range(world_size):
        table[expert, 1] = (expert + 1) % world_size * local + local - 1
    parallel = ExpertParallel(layer, distributed.group.WORLD, placement=Placement(table, local), num_chunks=2)
    actual = results(parallel, tokens[own], grads[own])
    if len(tokens[own]):
        assert_close(actual["output"], plain["output"][own].double(), *steps("output", 0, world_size))
    for name in ("gate_up_proj", "down_proj"):
        total = torch.zeros_like(plain[f"experts.{name}"])
        for place, expert in enumerate(parallel.experts.experts):
            if expert >= 0:
                total[expert] += actual[f"experts.{name}"][place]
        distributed.all_reduce(total)
        assert_close(total, plain[f"experts.{name}"].double(), *steps(name, len(tokens), world_size))


def test_fullgraph(rank, world_size):
    layer = make_layer(num_shared_experts=1)
    counts = [7 + count for count in TOKENS]
    tokens, grads, own = inputs(rank, world_size, counts=counts)
    for options in ({"num_chunks": 2}, {"capacity": 64}):
        parallel = ExpertParallel(layer, distributed.group.WORLD, **options)
        expected = results(parallel, tokens[own], grads[own])
        compiled = torch.compile(parallel, fullgraph=True, backend="aot_eager")
        actual = results(compiled, tokens[own], grads[own])
        for name, value in actual.items():
            torch.testing.assert_close(value, expected[name.removeprefix("_orig_mod.")])


def test_one_error_on_every_rank(rank, world_size):
    world = distributed.group.WORLD
    last, words = rank == world_size - 1, "must be the same on every rank"
    with Raises(ValueError, words, "num_experts=10", "num_experts=12"):
        ExpertParallel(torch_moe.MoE(H, I, 12 if last else E, K), world)
    with Raises(ValueError, words, "top_k=3", "top_k=2"):
        ExpertParallel(torch_moe.MoE(H, I, E, 2 if last else K), world)
    with Raises(ValueError, words, "num_chunks=1", "num_chunks=2"):
        ExpertParallel(make_layer(), world, num_chunks=2 if last else 1)
    parallel = ExpertParallel(make_layer(), world)
    with Raises(ValueError, f"rank {world_size - 1}: the layer is parallel already"):
        ExpertParallel(parallel if last else make_layer(), world)
    with Raises(ValueError, "limit_position must be 'before', got 'after'"):
        ExpertParallel(make_layer(limit=1.0, limit_position="after"), world)
    with Raises(ValueError, "rank 0: dropout must be 0, got 0.5"):
        ExpertParallel(make_layer(dropout=0.5 if rank == 0 else 0.0), world)
    mesh = distributed.init_device_mesh("cpu", (1, world_size), mesh_dim_names=("fsdp", "tp"))
    with Raises(ValueError, "one named 'ep', got dimensions ['fsdp', 'tp']"):
        ExpertParallel(make_layer(), mesh)
    named = distributed.init_device_mesh("cpu", (1, world_size), mesh_dim_names=("fsdp", "ep"))
    assert ExpertParallel(make_layer(), named).experts.ep_size == world_size


def test_splits_that_disagree(rank, world_size):
    send, receive = [2] * world_size, [2] * world_size
    name = distributed.group.WORLD.group_name
    check_splits(send, receive, name, torch.device("cpu"))
    if rank == 1:
        receive[0] = 3
    with Raises(RuntimeError, "rank 1 expects 3 rows from rank 0, which sends 2"):
        check_splits(send, receive, name, torch.device("cpu"))
    # Rows of another format are told before they are sent.
    parallel = ExpertParallel(make_layer(), distributed.group.WORLD)
    parallel.experts.wire = "fp8" if rank == 1 else "input"
    with Raises(RuntimeError, "ep_dispatch: rows from rank", "bytes, got"):
        parallel(torch.randn(5, H))
        if rank > 1:  # sees rank 1's, and only that
            raise AssertionError
    distributed.barrier()


def test_backward_in_different_order(rank, world_size):
    """What would exchange garbage, or hang, is an error on every rank where that is checked."""
    parallel = ExpertParallel(make_layer(), distributed.group.WORLD, check=True)
    outputs = [parallel(torch.randn(count, H)) for count in (9, 4)]
    words = "exchange: the numbers of rows must agree between ranks, but rank", "expects", "which sends"
    with Raises(RuntimeError, *words):
        for output in outputs if rank == 0 else reversed(outputs):
            output.sum().backward()
    distributed.barrier()


@contextmanager
def no_numbers_read():
    """What knows how many rows there are is not to be asked."""

    class Forbidden:
        def __init__(self, *_):
            raise AssertionError("numbers of rows were read")

    original, exchange.Counts = exchange.Counts, Forbidden
    yield
    exchange.Counts = original


def test_capacity(rank, world_size):
    """Enough for all, for none, or for some: the same bits, and how many exchanges that takes."""
    tokens, grads, own = inputs(rank, world_size)
    layer = make_layer()
    expected = results(ExpertParallel(layer, distributed.group.WORLD), tokens[own], grads[own])
    for capacity, chunks, enough in (
        (64, 1, True),
        (1, 1, False),
        (12, 1, False),
        (40, 1, True),
        (40, 3, True),
        (3, 3, 0),
    ):
        parallel = ExpertParallel(
            layer, distributed.group.WORLD, num_chunks=chunks, capacity=capacity, check=chunks > 1
        )
        with counted_bytes(rank) as sent, no_numbers_read() if enough else nullcontext():
            actual = results(parallel, tokens[own], grads[own])
        # Counts, there and back, and both ways in the backward; there and back a second time.
        assert len(sent) == 1 + chunks * (4 if enough else 6), (capacity, sent)
        for name, value in actual.items():
            assert torch.equal(value, expected[name]), (capacity, chunks, name)


def test_tuned_chunks(rank, world_size):
    parallel = ExpertParallel(make_layer(), distributed.group.WORLD)
    tokens, _, own = inputs(rank, world_size)
    expected = parallel(tokens[own])
    cost = measure_exchange(parallel, num_bytes=1 << 16, rounds=2)
    costs = [None] * world_size
    distributed.all_gather_object(costs, (cost, tune_chunks(parallel, tokens[own], rounds=1)))
    assert costs == [costs[0]] * world_size
    assert cost.latency > 0
    assert cost.bandwidth > 0
    assert torch.equal(parallel(tokens[own]), expected)


def test_state_dict(rank, world_size):
    """The layer's own names; all experts, wherever they are."""
    layer = make_layer(bias=True)
    parallel = ExpertParallel(layer, distributed.group.WORLD)
    plain, sharded = layer.state_dict(), parallel.state_dict()
    assert plain.keys() == sharded.keys()
    for name, value in sharded.items():
        whole = value.full_tensor() if hasattr(value, "full_tensor") else value
        assert torch.equal(whole, plain[name]), name
    torch.manual_seed(5)
    parallel.reset_parameters()
    torch.manual_seed(5)
    layer.reset_parameters()
    for name, value in parallel.state_dict().items():
        whole = value.full_tensor() if hasattr(value, "full_tensor") else value
        assert torch.equal(whole, layer.state_dict()[name]), name


def main(rank, world_size, path):
    distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world_size)
    for name, test in list(globals().items()):
        if name.startswith("test_"):
            try:
                test(rank, world_size)
            except BaseException as error:
                raise AssertionError(f"rank {rank}: {name}") from error
    distributed.destroy_process_group()


if __name__ == "__main__":
    run(main)
