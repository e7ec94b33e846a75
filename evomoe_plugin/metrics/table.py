"""Summary tables of a run: its phases, and its course over updates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from evomoe_plugin.metrics.log import TrainingLog
from evomoe_plugin.metrics.phases import EXPERTS, dense_start, one_expert_start, sparse_end
from evomoe_plugin.metrics.steps import seconds_per_update

if TYPE_CHECKING:
    from rich.table import Table

_COURSE = {
    "temperature": ("temperature", "{:.2f}"),
    "experts/token": (EXPERTS, "{:.2f}"),
    "dead experts": ("dead_experts", "{:.0%}"),
    "training perplexity": ("ppl", "{:,.0f}"),
}


def closing_table(log: TrainingLog, evaluated: Mapping[str, tuple[str, str]]) -> Table:
    """Dense start and sparse end of the run, preceded by the one-expert phase if there was a spawn.

    Args:
        log: of the whole run, with experts per token.
        evaluated: further measurements: name -> cells for dense start and sparse end.
    """
    first = one_expert_start(log), dense_start(log), sparse_end(log)
    *before, start, end = phases = [phase for phase in first if phase is not None]
    table = _table(
        "",
        *("one expert" for _ in before),
        "dense start",
        "sparse end",
        title="From dense to sparse",
    )
    for name, cells in evaluated.items():
        table.add_row(name, *("" for _ in before), *cells)
    table.add_row("experts per token", *(f"{p.experts_per_token:.2f}" for p in phases))
    if start.seconds_per_update and end.seconds_per_update:
        faster = start.seconds_per_update / end.seconds_per_update
        *times, last = (_cell(p.seconds_per_update, "{:.2f} s") for p in phases)
        table.add_row("time per update (median)", *times, f"{last} ({faster:.1f} times as fast)")
    if start.mflops_per_token and end.mflops_per_token:
        table.add_row(
            "forward MFLOPs per token", *(_cell(p.mflops_per_token, "{:.1f}") for p in phases)
        )
    table.add_row(
        "measured over updates",
        *(f"{p.first_update:,} to {p.last_update:,}" for p in phases),
        style="dim",
    )
    return table


def course_table(log: TrainingLog, columns: int = 7) -> Table:
    """Logged metrics at about `columns` evenly spaced intervals."""
    last = len(log.intervals) - 1
    count = min(columns, last + 1)
    chosen = [log.intervals[round(i * last / max(count - 1, 1))].update for i in range(count)]
    table = _table("updates", *(f"{update:,}" for update in chosen), title="Along the run")
    rows = {name: (log.series(metric), form) for name, (metric, form) in _COURSE.items()}
    rows["seconds/update"] = seconds_per_update(log), "{:.2f}"
    for name, (series, form) in rows.items():
        values = dict(zip(*series, strict=True))
        if any(update in values for update in chosen):
            table.add_row(name, *(_cell(values.get(update), form) for update in chosen))
    return table


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _table(first: str, *others: str, title: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column(first, no_wrap=True)
    for other in others:
        table.add_column(other, justify="right", no_wrap=True)
    return table
