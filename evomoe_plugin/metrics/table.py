"""Summary tables of a run: its phases, and its course over updates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from evomoe_plugin.metrics.log import TrainingLog
from evomoe_plugin.metrics.phases import EXPERTS, Phase, dense_start, one_expert_start, sparse_end
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
    start, end, single = dense_start(log), sparse_end(log), one_expert_start(log)
    before = () if single is None else (single,)
    table = _table("", *("one expert" for _ in before), "dense start", "sparse end",
                   title="From dense to sparse")
    for name, cells in evaluated.items():
        table.add_row(name, *("" for _ in before), *cells)
    phases = (*before, start, end)
    table.add_row("experts per token", *(f"{p.experts_per_token:.2f}" for p in phases))
    if start.seconds_per_update and end.seconds_per_update:
        faster = start.seconds_per_update / end.seconds_per_update
        table.add_row("time per update (median)", *map(_time, before), _time(start),
                      f"{_time(end)} ({faster:.1f} times as fast)")
    if start.mflops_per_token and end.mflops_per_token:
        table.add_row("forward MFLOPs per token",
                      *map(_mflops, phases))
    table.add_row("measured over updates",
                  *(f"{p.first_update:,} to {p.last_update:,}" for p in phases),
                  style="dim")
    return table


def course_table(log: TrainingLog, columns: int = 7) -> Table:
    """Logged metrics at about `columns` evenly spaced intervals."""
    last = len(log.intervals) - 1
    count = min(columns, last + 1)
    chosen = [log.intervals[round(i * last / max(count - 1, 1))] for i in range(count)]
    seconds = dict(zip(*seconds_per_update(log), strict=True))
    table = _table("updates", *(f"{record.update:,}" for record in chosen), title="Along the run")
    for name, (metric, form) in _COURSE.items():
        if any(metric in record.values for record in chosen):
            table.add_row(name, *(
                form.format(record.values[metric]) if metric in record.values else ""
                for record in chosen
            ))
    if seconds:
        table.add_row("seconds/update", *(
            f"{seconds[record.update]:.2f}" if record.update in seconds else ""
            for record in chosen
        ))
    return table


def _time(phase: Phase) -> str:
    return f"{phase.seconds_per_update:.2f} s" if phase.seconds_per_update else ""


def _mflops(phase: Phase) -> str:
    return f"{phase.mflops_per_token:.1f}" if phase.mflops_per_token else ""


def _table(first: str, *others: str, title: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column(first, no_wrap=True)
    for other in others:
        table.add_column(other, justify="right", no_wrap=True)
    return table
