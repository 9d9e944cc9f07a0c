"""What bench_layer.py writes: a table, JSON lines, Markdown for the README, and a PNG."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from layer_cases import PASSES, Target
from layer_claims import Claim
from layer_machine import NOISY
from layer_runs import Row

from torch_moe.cli.candidates import K_DENSE, TORCH_MOE
from torch_moe.cli.display import Display

HEADER = ("case", "contender", "ms", "± %", "noise %", "% of floor", "% of best", "peer/must/aim", "")


def label(row: Row) -> str:
    """Name a row's case in full."""
    return f"{row.case.name} {row.dtype} {PASSES[row.pass_name]} {row.routing}"


def verdict(row: Row, target: Target | None) -> str:
    """Return what became of a target."""
    if row.noise > NOISY:
        return "noisy"
    if target is None:
        return ""
    percent = row.percent_of_floor
    return "MISSED" if percent < target.must else "must" if percent < target.aim else "aim"


def show(display: Display, rows: Sequence[Row]) -> None:
    """Print every row; the last column says whether the target is met."""
    table = []
    order = list(dict.fromkeys(map(label, rows)))
    for row in sorted(rows, key=lambda row: order.index(label(row))):  # contenders below each other
        target = row.target if row.contender == TORCH_MOE else None
        table.append(
            [
                label(row),
                f"{row.contender} {row.isa}".strip(),
                f"{row.quiet.median * 1e3:.2f}",
                f"{50 * row.quiet.spread:.1f}",
                f"{100 * row.noise:.1f}",
                f"{row.percent_of_floor:.1f}",
                f"{row.percent_of_best_floor:.1f}",
                f"{target.peer:g}/{target.must:g}/{target.aim:g}" if target else "",
                verdict(row, target),
            ]
        )
    display.table(
        "MoE FFN layer, weights and routing given; medians of the quietest samples",
        HEADER,
        table,
    )


def show_claims(display: Display, claims: Sequence[Claim]) -> None:
    """Print what must stay small, and the times it is made of."""
    table = []
    for claim in claims:
        name = " ".join(filter(None, (claim.case, claim.dtype, claim.routing)))
        numbers = [f"{claim.value:.3f}", f"{claim.must:g}/{claim.aim:g}", claim.verdict, f"{100 * claim.noise:.1f}"]
        table.append([f"{name}: {claim.what}", *numbers])
    display.table("Shares and growth", ("claim", "ratio", "must/aim", "", "noise %"), table)
    for claim in claims:
        times = ", ".join(f"{name} {value:.3g}" for name, value in claim.milliseconds.items())
        display.note(f"{claim.case} {claim.dtype} {claim.routing}: {times} ms")


def records(rows: Sequence[Row], claims: Sequence[Claim], environment: dict[str, Any]) -> list[dict[str, Any]]:
    """One JSON-ready record per row and per claim."""
    dense = {_place(row): row.quiet.median for row in rows if row.contender == K_DENSE}
    lines = []
    for row in rows:
        shape, timing = row.case.shape, row.quiet
        line = {
            **environment,
            "case": row.case.name,
            "num_tokens": shape.num_tokens,
            "hidden_size": shape.hidden_size,
            "intermediate_size": shape.intermediate_size,
            "num_experts": shape.num_experts,
            "top_k": shape.top_k,
            "activation": shape.activation,
            "dtype": row.dtype,
            "pass": PASSES[row.pass_name],
            "routing": row.routing,
            "experts_hit": sum(count > 0 for count in row.tokens_per_expert),
            "caches_flushed": row.case.flushed,
            "candidate": row.contender,
            "isa": row.isa or None,
            "median_ms": round(timing.median * 1e3, 4),
            "spread": round(timing.spread, 4),
            "rounds": len(row.timing.samples),
            "rounds_kept": len(timing.samples),
            "noise_kept": round(row.noise, 4),
            "noise_all": round(statistics.median(row.timing.noise), 4),
            "gflops": round(row.work.flops / timing.median / 1e9, 2),
            "floor_gflops": round(row.machine.gflops, 1),
            "floor_read_gbytes": round(row.machine.read_gbytes, 2),
            "percent_of_best_floor": round(row.percent_of_best_floor, 4),
            "moment_gflops": round(row.moment.gflops, 1),
            "moment_cached_gflops": round(row.cached_gflops, 1),
            "moment_read_gbytes": round(row.moment.read_gbytes, 2),
            "percent_of_floor": round(row.percent_of_floor, 4),
        }
        if _place(row) in dense:
            line["ratio_to_k_dense"] = round(timing.median / dense[_place(row)], 4)
        if row.target is not None and row.contender == TORCH_MOE:
            line |= {"peer": row.target.peer, "must": row.target.must, "aim": row.target.aim}
        lines.append(line)
    for claim in claims:
        milliseconds = {name: round(value, 4) for name, value in claim.milliseconds.items()}
        numbers = {"ratio": round(claim.value, 4), "noise_kept": round(claim.noise, 4), "median_ms": milliseconds}
        lines.append({**environment, **vars(claim), **numbers})
    return lines


def _place(row: Row) -> tuple[str, ...]:
    return row.case.name, row.dtype, row.pass_name, row.routing


def markdown(rows: Sequence[Row], claims: Sequence[Claim]) -> str:
    """Return the tables of the README: the routings of a case in one line, then the claims."""
    tables = [_markdown_rows(rows)] if rows else []
    tables += [_markdown_claims(claims)] if claims else []
    return "\n\n".join(tables)


def _markdown_rows(rows: Sequence[Row]) -> str:
    """Percent of the floor, the worst routing first, and what the best peer reached in parentheses."""
    ours = [row for row in rows if row.contender == TORCH_MOE]
    dtypes, isas = list(dict.fromkeys(row.dtype for row in ours)), list(dict.fromkeys(row.isa for row in ours))
    lines: dict[tuple[str, ...], dict[str, list[Row]]] = {}
    for row in ours:
        lines.setdefault((row.case.name, PASSES[row.pass_name], row.isa), {}).setdefault(row.dtype, []).append(row)
    table = []
    for (name, pass_name, isa), by_dtype in lines.items():
        words = (f"{name} {isa}" if len(isas) > 1 else name, pass_name)
        table.append((*words, *(_cell(by_dtype.get(dtype, [])) for dtype in dtypes)))
    return _markdown_table(("case", "pass"), dtypes, table)


def _cell(same: Sequence[Row]) -> str:
    if not same:
        return ""
    percents = sorted(row.percent_of_floor for row in same)
    shown = " to ".join(dict.fromkeys(f"{percent:.0f}" for percent in (percents[0], percents[-1])))
    if any(row.noise > NOISY for row in same):
        shown += " noisy"
    return f"{shown} ({same[0].target.peer:g})" if same[0].target else shown


def _markdown_claims(claims: Sequence[Claim]) -> str:
    table = []
    for claim in claims:
        what = f"{claim.what}, {claim.routing}" if claim.routing else claim.what
        table.append((claim.case, claim.dtype, what, f"{claim.value:.3f}", f"{claim.must:g}", f"{claim.aim:g}"))
    return _markdown_table(("case", "dtype", "what"), ("ratio", "must", "aim"), table)


def _markdown_table(words: Sequence[str], numbers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---"] * len(words) + ["---:"] * len(numbers)
    return "\n".join(f"| {' | '.join(row)} |" for row in ((*words, *numbers), rule, *rows))


def draw(path: Path, rows: Sequence[Row], title: str) -> None:
    """Draw percent of the floor per case, with the peer, what must be reached, and the aim."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    ours = [row for row in rows if row.contender == TORCH_MOE]
    figure, axis = pyplot.subplots(figsize=(9, 1.5 + 0.24 * len(ours)), layout="constrained")
    for place, row in enumerate(ours):
        color = "#4c72b0" if row.pass_name == "forward" else "#dd8452"
        axis.barh(place, row.percent_of_floor, 0.7, color=color)
        if row.target is not None:
            for percent, mark in ((row.target.peer, "kx"), (row.target.must, "k|"), (row.target.aim, "g|")):
                axis.plot(percent, place, mark, markersize=9, markeredgewidth=2)
    labels = [f"{label(row)} {row.isa}" for row in ours]
    axis.set_yticks(range(len(ours)), labels, fontsize=7)
    axis.invert_yaxis()
    axis.set_xlim(0, 100)
    axis.set_xlabel(
        "% of the machine's floor at the moment of each sample (x: best before, black bar: must, green bar: aim)"
    )
    axis.set_title(title, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
