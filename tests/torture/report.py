"""Write what the campaign found so far: tables in docs/reliability.md, and the page of results."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from tests.torture import harness

DOCS = harness.ROOT / "docs" / "reliability.md"
PAGE = harness.ROOT / "benchmarks" / "results" / "torture.md"
_BEGIN, _END = "<!-- campaign: begin -->", "<!-- campaign: end -->"


def write(parts: Sequence[ModuleType], results: Path, docs: Path = DOCS, page: Path = PAGE) -> None:
    """Replace the table in the docs, and the whole page."""
    histories = [(part, harness.read(part, results)) for part in parts]
    table = _table(histories)
    text = docs.read_text()
    before, _, rest = text.partition(_BEGIN)
    _, found, after = rest.partition(_END)
    if not found:
        raise ValueError(f"{docs} has no place for the table: {_BEGIN} … {_END}")
    docs.write_text(f"{before}{_BEGIN}\n\n{table}\n\n{_END}{after}")
    page.write_text("\n\n".join([_HEAD, table, *(_details(*each) for each in histories)]) + "\n")


_HEAD = """# The campaign `make torture`

Written by `python -m tests.torture.run --report` from the outcomes in tests/torture/results, which
hold every case with its seed. [docs/reliability.md](../../docs/reliability.md) says what is
promised. A case that failed and was right later, on changed code, counts as mended; the last
outcome of each seed counts."""


def _table(histories: Sequence[tuple[Any, harness.History]]) -> str:
    rows = [
        "| part | asked for | tried | failed | mended | left | commits | machine |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for part, history in histories:
        commits = list(dict.fromkeys(session.commit for session in history.sessions))
        machines = list(dict.fromkeys(session.machine for session in history.sessions))
        shown = " to ".join(f"`{c}`" for c in (commits[:1] + commits[1:][-1:])) or "–"
        where = "; ".join(machines) or "–"
        rows.append(
            f"| {part.TITLE} | {part.CASES:,} | {len(history.last):,} | {len(history.failed)} | "
            f"{len(history.mended)} | {len(history.left)} | {shown} | {where} |"
        )
    return "\n".join(rows)


def _details(part: Any, history: harness.History) -> str:
    lines = [f"## {part.TITLE}", "", " ".join((part.__doc__ or "").split("\n\n")[0].split())]
    if not history.last:
        return "\n".join([*lines, "", "Not run yet."])
    missing = part.CASES - len(history.last)
    if missing > 0:
        lines += ["", f"Not reached: {missing:,} of {part.CASES:,} cases."]
    lines += ["", f"{history.seconds / 60:,.1f} minutes of wall-clock time, machine shared."]
    if hasattr(part, "coverage"):
        for name, value in part.coverage(history.last).items():
            lines.append(f"Reached: {value} {name}.")
    lines += ["", "| outcome | cases |", "|---|---|"]
    kinds = Counter(outcome.kind for outcome in history.last.values() if not outcome.fault)
    lines += [f"| {kind} | {count} |" for kind, count in sorted(_merged(kinds).items())]
    for seed in history.left:
        outcome = history.last[seed]
        lines += ["", f"Left, seed {seed}: {outcome.kind}: {_plain(outcome.fault)}"]
        lines += [f"    {harness.repeated_by(part, seed)}"]
    return "\n".join(lines)


def _merged(kinds: Counter) -> Counter:
    """Many kinds of one case each are counted by their first words."""
    if len(kinds) <= 120:
        return kinds
    merged: Counter = Counter()
    for kind, count in kinds.items():
        merged[kind.partition(":")[0]] += count
    return merged


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text.replace("|", "\\|"))
