"""The report of the results so far: one Markdown file and its plots."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

from evomoe_plugin.checkpoint.atomic_files import write_atomically
from study import learning_rates, plots, results
from study.comparison import Compared, Spread, compare, spread, verdicts
from study.results import Result
from study.systems import Study

NOTHING = "–"


def write(study: Study, folder: Path, out: Path) -> Path:
    """Write the report and its plots; returns the report's path.

    Args:
        folder: of results.
        out: the folder of the report.
    Raises:
        SystemExit: there are no results.
    """
    texts = [compare(study, folder, text) for text in study.texts]
    found = results.all_current(study, folder)
    if not found:
        raise SystemExit(f"error: no results of the declared runs in {folder}")
    day = max(attempt["start"] for result in found for attempt in result.attempts)[:10]
    out.mkdir(parents=True, exist_ok=True)
    report = f"{day}-study" + f"-{study.name}" * bool(study.name)
    parts = [f"# {study.title}", _conditions(study, found, texts[0].processor), _win(texts)]
    parts.append(_rates(study, folder))
    for compared in texts:
        pictures = []
        if compared.by_system:
            for kind, draw in (("curves", plots.curves), ("final", plots.final)):
                path = out / f"{report}-{compared.text}-{kind}.svg"
                draw(compared, path)
                pictures.append(f"![{compared.text}, {kind}]({path.name})")
        parts.append(_text(compared, pictures))
    path = out / f"{report}.md"
    write_atomically(path, "\n\n".join(parts) + "\n")
    return path


def _win(texts: list[Compared]) -> str:
    """Whether the declared criteria are met, on all texts."""
    if not _has_criteria(texts[0]):
        return "The recipe under test is not declared yet."
    met = [verdict.met for compared in texts for verdict in verdicts(compared)]
    if texts[0].study.expected:
        return (
            f"Expected before the runs: {met.count(True)} of {len(met)} found, {met.count(False)} "
            f"not, {met.count(None)} not decided. One seed decides none of them."
        )
    if False in met:
        won = "not a win by the declared criteria"
    else:
        won = "not decided: runs are missing" if None in met else "**a win**"
    counts = ", ".join(
        f"{met.count(value)} {word}"
        for value, word in ((True, "met"), (False, "missed"), (None, "not decided"))
    )
    return f"The recipe under test: {won} ({counts}, of {len(met)} on {len(texts)} texts)."


def _has_criteria(compared: Compared) -> bool:
    study = compared.study
    return bool(study.expected) or any(system.name == "lexical" for system in study.systems)


def _conditions(study: Study, found: list[Result], processor: str | None) -> str:
    """Code, machine and budget, each with all the values that occur."""
    commits = {a["commit"][:12] + (" with changes" if a["dirty"] else "") for a in _attempts(found)}
    machines = {r.machine["cpu"] + ", Python " + r.machine["python"] for r in found}
    packages = {", ".join(f"{k} {v}" for k, v in r.packages.items()) for r in found}
    lines = [
        f"- {len(found)} runs, {sum(r.cpu_seconds for r in found) / 3600:.1f} CPU hours, "
        f"{_days(found)}; {sum(len(r.attempts) > 1 for r in found)} of them were interrupted and "
        "went on from a checkpoint.",
        f"- Code: {'; '.join(sorted(commits))}.",
        f"- {'; '.join(sorted(machines))}; {'; '.join(sorted(packages))}; one thread each.",
        f"- {study.updates:,} updates, warm-up {study.warmup}, evaluation every "
        f"{study.evaluate_interval}; {', '.join(study.overrides)}.",
        "- Spreads are sample standard deviations over seeds; n=1: a single seed, of unknown "
        "spread. Relative differences are between runs with the same seed, which read the text in "
        "the same order.",
        "- Training FLOPs are analytic, three forward passes of what was routed. CPU time is of "
        "training alone, without start and evaluation, on shared cores: it can differ by load. "
        f"Only that of runs on {processor} counts.",
        "- What was declared before the runs: [benchmarks/study](../study/README.md).",
    ]
    return "\n".join(lines)


def _attempts(found: Iterable[Result]) -> list[dict]:
    return [attempt for result in found for attempt in result.attempts]


def _days(found: list[Result]) -> str:
    days = sorted({attempt["start"][:10] for attempt in _attempts(found)})
    return days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"


def _rates(study: Study, folder: Path) -> str:
    """The grid of learning rates."""
    grid = results.grid_perplexities(study, folder)
    tried = sorted({lr for rates in grid.values() for lr in rates} | set(study.grid))
    rows = []
    for family, name in study.representatives.items():
        cells = [_rate_cell(grid[family].get(lr)) for lr in tried]
        chosen = "not chosen yet"
        if not learning_rates.wanted(study.grid, grid[family]):
            choice = learning_rates.choose(grid[family])
            chosen = f"**{choice.lr:g}**" + (" (edge of the grid)" if choice.at_edge else "")
        rows.append([family, name, *cells, chosen])
    return (
        f"## Learning rates\n\nFinal validation perplexity on {study.grid_text}, seed 1 (n=1); "
        "the lowest is chosen for the family and all texts.\n\n"
        + _table(["family", "representative", *(f"{lr:g}" for lr in tried), "chosen"], rows)
    )


def _rate_cell(perplexity: float | None) -> str:
    if perplexity is None:
        return NOTHING
    return f"{perplexity:.2f}" if math.isfinite(perplexity) else "diverged"


def _text(compared: Compared, pictures: list[str]) -> str:
    parts = [f"## {compared.text.capitalize()}"]
    if _has_criteria(compared):
        parts.append(_verdicts(compared))
    if compared.by_system:
        parts += [*pictures, _main_table(compared), _routing_table(compared)]
        if any(compared.study.system(name).ablates for name in compared.by_system):
            parts.append(_ablations(compared))
    parts.append(_missing(compared))
    return "\n\n".join(parts)


def _verdicts(compared: Compared) -> str:
    words = {True: "**met**", False: "missed", None: "not decided"}
    rows = [[v.criterion, v.measured, words[v.met]] for v in verdicts(compared)]
    return "### What was to be shown\n\n" + _table(["criterion", "measured", ""], rows)


def _main_table(compared: Compared) -> str:
    target = compared.perplexity("switch") if compared.is_complete("switch") else None
    has_bleu = any(r.test_bleu is not None for r in _results(compared))
    rows = []
    for name, found in _best_first(compared):
        updates = found[0].updates
        cells = [
            name + ("" if updates == compared.study.updates else f" ({updates:,} updates)"),
            "yes" if compared.study.system(name).equal_flops else "",
            str(len(found)),
            f"{found[0].lr:g}",
            _shown(compared.perplexity(name), 2),
            *([_shown(compared.bleu(name), 2)] if has_bleu else []),
            *(
                NOTHING if base == name else _shown(compared.percent(name, base), 1, "+")
                for base in ("dense", "switch")
            ),
            *(_reached(compared, name, target, cost) for cost in ("update", "tera_flops")),
            _shown(spread(r.tera_flops for r in found), 2),
            _shown(compared.cpu_seconds(name), 0),
        ]
        rows.append(cells)
    headings = ["system", "equal active FLOPs", "n", "learning rate", "test perplexity"]
    headings += ["test BLEU"] * has_bleu
    headings += [
        "to dense, %",
        "to switch, %",
        "updates to Switch's final",
        "TFLOPs to it",
        "training TFLOPs",
        "CPU s",
    ]
    text = "### Final perplexity\n\n" + _table(headings, rows)
    if target is None:
        return text + "\n\nSwitch's final perplexity is not known yet: its runs are missing."
    return text + (
        f"\n\nSwitch's final perplexity is the mean of its seeds, {target.shown(2)}; where a curve "
        "reaches it is interpolated between evaluations."
    )


def _reached(compared: Compared, name: str, target: Spread | None, cost: str) -> str:
    """When the seeds' curves reach the target, and how many of them never do."""
    if target is None:
        return NOTHING
    at = compared.crossings(name, target.mean, cost)
    reached = spread(at)
    if reached is None:
        return "never" if len(at) > 1 else "never (n=1)"
    shown = reached.shown(0 if cost == "update" else 2)
    return shown if None not in at else f"{shown}, {len(reached.values)} of {len(at)} seeds"


def _routing_table(compared: Compared) -> str:
    """Measures of routing at the end of training."""
    trained = ("experts_per_token", "load_max", "dead_experts", "overflow")
    logged = [m for m in results.ROUTING if any(m in r.curve for r in _results(compared))]
    rows = []
    for name, found in _best_first(compared):
        for stack in _stacks(found[0]):
            cells = [f"{name} {stack.rstrip('_')}".strip()]
            for measure in trained:
                last = (_last(r.training.get(stack + measure)) for r in found)
                cells.append(_shown(spread(last), 2))
            for measure in logged:
                cells.append(_shown(spread(_last(r.curve.get(measure)) for r in found), 3))
            rows.append(cells)
    headings = ["system", "experts per token", "max/mean load", "dead experts", "dropped"]
    text = "### Routing at the end\n\n" + _table([*headings, *logged], rows)
    absent = [measure for measure in results.ROUTING if measure not in logged]
    return text + (f"\n\nNot logged: {', '.join(absent)}." if absent else "")


def _stacks(result: Result) -> list[str]:
    """Prefixes of the measures of routing."""
    of = "experts_per_token"
    names = [name for name in result.training if name.endswith(of)]
    return [name.removesuffix(of) for name in names] or [""]


def _ablations(compared: Compared) -> str:
    """The recipe with each part left out."""
    noise = compared.perplexity("lexical")
    rows = [
        [
            system.ablates,
            _shown(compared.perplexity(system.name), 2),
            _shown(compared.percent(system.name, "lexical"), 1, "+"),
        ]
        for system in compared.study.systems
        if system.ablates
    ]
    whole = f"The whole recipe: {noise.shown(2)}." if noise else "The whole recipe is missing."
    return f"### What each part gives\n\n{whole}\n\n" + _table(
        ["left out", "test perplexity", "to the recipe with the same seed, %"], rows
    )


def _missing(compared: Compared) -> str:
    lines = []
    if compared.missing:
        names = ", ".join(f"{run.system.name} seed {run.seed}" for run in compared.missing)
        lines.append(f"Missing: {names}.")
    if compared.undecided:
        names = ", ".join(system.name for system in compared.undecided)
        lines.append(f"Missing, learning rate not chosen yet: {names}.")
    for result in _results(compared):
        if result.diverged:
            lines.append(
                f"Diverged after update {max(result.training['update'], default=0)}: "
                f"{result.system} seed {result.seed}."
            )
    return "\n\n".join(lines) or "No declared run is missing."


def _results(compared: Compared) -> list[Result]:
    return [result for found in compared.by_system.values() for result in found]


def _best_first(compared: Compared) -> list[tuple[str, list[Result]]]:
    def key(item: tuple[str, list[Result]]) -> float:
        found = compared.perplexity(item[0])
        return found.mean if found else math.inf

    return sorted(compared.by_system.items(), key=key)


def _last(column: list[float | None] | None) -> float | None:
    return column[-1] if column else None


def _shown(value: Spread | None, digits: int, sign: str = "") -> str:
    return NOTHING if value is None else value.shown(digits, sign)


def _table(headings: list[str], rows: Iterable[list[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
