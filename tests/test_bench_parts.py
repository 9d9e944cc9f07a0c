"""The benchmark's own arithmetic: its input is real and skewed text, its floor counts what it says, memory is known."""

import pytest
import torch

from torch_moe import reference
from torch_moe.cli import baselines, machine, text
from torch_moe.cli.floor import Machine, Work, dense_work, moe_work
from torch_moe.cli.limits import Limits
from torch_moe.cli.shapes import SHAPES


def test_corpus_is_prose_and_code():
    corpus = text.read_corpus(1 << 18)
    assert len(corpus) == 1 << 18
    assert b"The " in corpus[: 1 << 17]
    assert b"\nimport " in corpus[1 << 17 :]


def test_input_depends_on_the_seed_alone():
    first, again, other = (text.hidden_states(300, 16, seed) for seed in (3, 3, 4))
    assert first.shape == (300, 16)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    torch.testing.assert_close(first.square().mean(dim=1), torch.ones(300))


def test_a_byte_changes_itself_and_what_follows_only():
    tokens = text.sample_tokens(text.read_corpus(1 << 14), 128, 0)
    changed = tokens.clone()
    changed[0, 50] = (changed[0, 50] + 1) % 256
    same = (text.embed(tokens, 16, 0) == text.embed(changed, 16, 0)).all(dim=1)
    assert same.logical_not().nonzero().flatten().tolist() == list(range(50, 50 + text.KERNEL_SIZE))


def test_text_loads_experts_unevenly():
    x = text.hidden_states(2048, 64, 0)
    router = torch.nn.functional.normalize(torch.randn(16, 64, generator=torch.Generator().manual_seed(0)))
    counts = torch.bincount((x @ router.T).topk(2).indices.flatten(), minlength=16)
    shuffled = torch.randn(2048, 64, generator=torch.Generator().manual_seed(1))
    even = torch.bincount((shuffled @ router.T).topk(2).indices.flatten(), minlength=16)
    assert counts.max() / counts.float().mean() > 1.3 * even.max() / even.float().mean()


def test_floor_counts_operations_and_bytes():
    shape = SHAPES["seed"]
    rows, width = shape.num_tokens * 2, 3 * shape.intermediate_size * shape.hidden_size
    counts = (rows - 1, 1, *(0,) * 6)
    forward = moe_work(shape, counts, 4, backward=False)
    assert forward.flops == 2 * rows * width + 2 * shape.num_tokens * shape.hidden_size * 8
    assert forward.bytes == 2 * width * 4  # two experts have rows
    assert moe_work(shape, counts, 4, backward=False, given_routing=True) == Work(2 * rows * width, forward.bytes)
    both = moe_work(shape, counts, 4, backward=True)
    assert both.flops == 3 * forward.flops
    assert both.bytes == 2 * forward.bytes + 8 * width * 4  # a gradient is written for all eight
    assert dense_work(shape, 2, 4, backward=False).flops == 2 * rows * width


def test_floor_is_the_larger_of_both_times():
    limits = Machine(gflops=10.0, read_gbytes=2.0)
    assert Work(flops=1e10, bytes=1e9).floor(limits) == 1.0
    assert Work(flops=1e9, bytes=1e10).floor(limits) == 5.0
    assert limits.best(Machine(gflops=5.0, read_gbytes=3.0)) == Machine(gflops=10.0, read_gbytes=3.0)


def test_dense_total_is_left_out_when_it_takes_too_long():
    shape = SHAPES["seed"]
    fast, slow = (Limits(memory=1 << 40, seconds=10, gflops=rate, backward=True) for rate in (1000.0, 1.0))
    assert fast.why_not_dense_total(shape, 4) is None
    assert slow.why_not_dense_total(shape, 4).startswith("4 times the work: at least ")


def test_large_layers_shrink_to_any_memory():
    limits = Limits(memory=20 << 30, seconds=10, gflops=100.0, backward=True)
    fitting, note = limits.fit(SHAPES["deepseek-v3"], 2)
    assert fitting.num_experts < 256
    assert limits.bytes_needed(fitting, 2) <= limits.memory
    assert f"to {fitting.num_experts} of 256 experts" in note
    assert limits.fit(SHAPES["seed"], 4) == (SHAPES["seed"], None)


def test_memory_respects_the_container(tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 900 kB\nMemAvailable: 500 kB\n")
    assert machine.available_memory(tmp_path) == 500 * 1024
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/memory.current").write_text("1000\n")
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("max\n")
    assert machine.available_memory(tmp_path) == 500 * 1024
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("5000\n")
    assert machine.available_memory(tmp_path) == 4000
    assert machine.available_memory(tmp_path / "nowhere") == machine.UNKNOWN_MEMORY


def test_the_last_level_cache_is_the_largest(tmp_path):
    for index, size in enumerate(("48K", "2048K", "105M", "broken")):
        (tmp_path / f"cpu0/cache/index{index}").mkdir(parents=True)
        (tmp_path / f"cpu0/cache/index{index}/size").write_text(size + "\n")
    assert machine.last_level_cache_bytes(tmp_path) == 105 << 20
    assert machine.last_level_cache_bytes(tmp_path / "nowhere") == 0


@pytest.mark.parametrize("name", SHAPES)
def test_baselines_activate_as_the_reference_does(name):
    shape = SHAPES[name]
    pre_activation = 10 * torch.randn(16, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = reference.activation(pre_activation, **shape.activation_options())
    torch.testing.assert_close(baselines.activate(pre_activation, shape), expected)
