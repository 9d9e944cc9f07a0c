"""`torch-moe plan`: what more experts cost, counted and not measured."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from torch_moe.cli.display import Display
from torch_moe.cli.errors import UsageError
from torch_moe.cli.machine import GIB
from torch_moe.cli.problem import DTYPES
from torch_moe.config import ExpertsConfig, MoEConfig, RouterConfig
from torch_moe.param_report import param_report
from torch_moe.presets import PRESETS, Preset


@dataclass(frozen=True, kw_only=True)
class PlanRow:
    """One number of experts.

    Parameters
    ----------
    num_experts, total, active, flops_per_token, weight_bytes, training_bytes
        Of the whole model: see `torch_moe.ParamReport`.
    rank_weight_bytes : int
        Weights of one rank when the routed experts are shared among all and the rest is on each.
    all_to_all_bytes : int
        What one rank sends in one layer's forward: tokens to their experts, and as much back. Even routing is assumed,
        and that every choice is sent by itself. The backward sends the same again.
    """

    num_experts: int
    total: int
    active: int
    flops_per_token: int
    weight_bytes: int
    training_bytes: int
    rank_weight_bytes: int
    all_to_all_bytes: int


def run(options: argparse.Namespace) -> int:
    """Print the table of the parsed options.

    Raises
    ------
    UsageError
        If options are missing or contradict each other.
    """
    base = _base(options)
    rows = [_row(_with_experts(base, number), options) for number in options.experts or _numbers(base)]
    if options.json:
        json.dump([asdict(row) for row in rows], sys.stdout)
        print()
    else:
        _show(Display(), base, rows, options)
    return 0


def all_to_all_bytes(num_tokens: int, top_k: int, hidden_size: int, element_size: int, ep_size: int) -> int:
    """Return what a rank sends in a layer's forward: the rows of other ranks' experts, there and back."""
    return 2 * num_tokens * top_k * hidden_size * element_size * (ep_size - 1) // ep_size


def _base(options: argparse.Namespace) -> Preset:
    sizes = ("hidden_size", "intermediate_size", "layers")
    given = [name for name in sizes if getattr(options, name) is not None]
    if options.preset is not None:
        if given:
            raise UsageError(f"--preset has its own --{given[0].replace('_', '-')}: leave one of them")
        preset = PRESETS[options.preset]
        if options.top_k is None:
            return preset
        return replace(preset, moe=_moe(preset.moe, top_k=options.top_k))
    missing = [name for name in ("hidden_size", "intermediate_size", "top_k", "experts") if not getattr(options, name)]
    if missing:
        raise UsageError("give --preset, or also " + ", ".join(f"--{name.replace('_', '-')}" for name in missing))
    layout = {"hidden_size": options.hidden_size, "num_experts": max(options.experts)}
    try:
        moe = MoEConfig(
            router=RouterConfig(top_k=options.top_k, renormalize=options.top_k > 1, **layout),
            experts=ExpertsConfig(intermediate_size=options.intermediate_size, **layout),
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    layers = options.layers or 1
    return Preset(
        name=f"{layers} layers" if layers > 1 else "one layer",
        source="the command line",
        moe=moe,
        num_layers=layers,
        num_moe_layers=layers,
        attention={},
        vocab_size=0,
        num_norms=0,
    )


def _numbers(base: Preset) -> list[int]:
    """Return the default numbers of experts: those around the published one that its router can have."""
    numbers = []
    for number in (base.moe.router.num_experts * factor // 4 for factor in (1, 2, 4, 8, 16)):
        try:
            _with_experts(base, number)
        except UsageError:
            continue
        numbers.append(number)
    return numbers


def _with_experts(base: Preset, number: int) -> Preset:
    return replace(base, moe=_moe(base.moe, num_experts=number))


def _moe(moe: MoEConfig, **changes: int) -> MoEConfig:
    try:
        router = replace(moe.router, **changes)  # type: ignore[arg-type]
    except ValueError as error:
        raise UsageError(str(error)) from error
    return replace(moe, router=router, experts=replace(moe.experts, num_experts=router.num_experts))


def _row(model: Preset, options: argparse.Namespace) -> PlanRow:
    report, dtype, router = param_report(model), DTYPES[options.dtype], model.moe.router
    held = -(-router.num_experts // options.ep_size)  # experts of the rank that has most
    experts = report.routed_experts // router.num_experts * held
    return PlanRow(
        num_experts=router.num_experts,
        total=report.total,
        active=report.active,
        flops_per_token=report.flops_per_token,
        weight_bytes=report.weight_bytes(dtype),
        training_bytes=report.training_bytes(dtype),
        rank_weight_bytes=(report.total - report.routed_experts + experts) * dtype.itemsize,
        all_to_all_bytes=all_to_all_bytes(
            options.tokens, router.top_k, router.hidden_size, dtype.itemsize, options.ep_size
        ),
    )


def _show(display: Display, base: Preset, rows: Sequence[PlanRow], options: argparse.Namespace) -> None:
    header = [
        "experts", "total B", "active B", "active %", "GFLOP/token", "weights GiB", "training GiB",
        f"rank of {options.ep_size} GiB", "all-to-all MiB",
    ]  # fmt: skip
    cells = [
        [
            str(row.num_experts) + (" *" if row.num_experts == base.moe.router.num_experts and options.preset else ""),
            f"{row.total / 1e9:.3f}",
            f"{row.active / 1e9:.3f}",
            f"{100 * row.active / row.total:.1f}",
            f"{row.flops_per_token / 1e9:.2f}",
            f"{row.weight_bytes / GIB:.1f}",
            f"{row.training_bytes / GIB:.1f}",
            f"{row.rank_weight_bytes / GIB:.1f}",
            f"{row.all_to_all_bytes / 2**20:.0f}",
        ]
        for row in rows
    ]
    display.table(f"{base.name}, {options.dtype}, top_k={base.moe.router.top_k} ({base.source})", header, cells)
    if options.preset:
        display.note("* as published; the other rows change the number of experts and nothing else")
    display.note(
        "B: billions of parameters; FLOPs are a forward's, without the attention's products over the context; training "
        "holds weights, gradients and AdamW's states, without activations; a rank's column is weights"
    )
    display.note(
        f"all-to-all: sent by one of {options.ep_size} ranks in a layer's forward, {options.tokens} tokens per rank, "
        "even routing; the backward sends as much again"
    )
