"""Goals of the benchmarks, and whether a run meets them.

All goals are ratios, medians over rounds; a goal over several cases must be met in all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from speed.report import LABELS, table

LONG, SHORT = 512, 32
"""Mean rows per expert: from the first value the limit is used, from the second the floor."""
NO_PEERS = ("Ours", "OursGated", "OursGroupedMM", "Dense", "Floor", "Routing")

Results = Mapping[str, Any]


@dataclass(frozen=True)
class Finding:
    """A value compared with a bound."""

    case: str
    value: float
    bound: float
    at_most: bool = True

    @property
    def is_met(self) -> bool:
        return self.value <= self.bound if self.at_most else self.value >= self.bound


@dataclass(frozen=True)
class Goal:
    """A goal, and how its findings are extracted from the results."""

    text: str
    find: Callable[[Results], Iterable[Finding]]


def ours(found: Results, dtype: str) -> Iterable[tuple[str, Results, Results]]:
    """Name, result and our row of the measured cases."""
    for result in found.get("layers", ()):
        if result["dtype"] == dtype and "Ours" in result["rows"]:
            yield (
                f"{result['name']}, {dtype}, {result['threads']} threads",
                result,
                result["rows"]["Ours"],
            )


def _long(dtype: str, bound: float) -> Callable[[Results], Iterable[Finding]]:
    return lambda found: (
        Finding(name, row["of_limit"]["median"], bound)
        for name, result, row in ours(found, dtype)
        if result["gate"] == "top_k" and result["rows_per_expert"] >= LONG
    )


def _short(dtype: str, bound: float) -> Callable[[Results], Iterable[Finding]]:
    return lambda found: (
        Finding(name, row["of_floor"]["median"], bound)
        for name, result, row in ours(found, dtype)
        if result["gate"] == "top_k" and SHORT <= result["rows_per_expert"] < LONG
    )


def _dense(found: Results) -> Iterable[Finding]:
    for name, result, _ in ours(found, "fp32"):
        if "Dense" in result["rows"] and result["rows_per_expert"] >= LONG:
            yield Finding(name, result["rows"]["Dense"]["ours_of_it"]["median"], 1.0)


def _annealing(found: Results) -> Iterable[Finding]:
    for name, result, row in ours(found, "fp32"):
        if result["gate"] == "dense_to_sparse":
            yield Finding(name, row["of_limit"]["median"], 1.2)


def _masked(found: Results) -> Iterable[Finding]:
    for name, result, row in ours(found, "fp32"):
        if result["wanted"] == 2 and result["experts"] == 16 and "AllMasked" in result["rows"]:
            masked = result["rows"]["AllMasked"]["of_limit"]["median"]
            yield Finding(name, masked / row["of_limit"]["median"], 6.0, at_most=False)


def _nulls(found: Results) -> Iterable[Finding]:
    for result in found.get("nulls", ()):
        for row in result["rows"]:
            yield Finding(
                f"null share {1 - row['pairs_ratio']:.2f}, {result['dtype']}, "
                f"{result['threads']} threads",
                row["ours"]["median"],
                row["pairs_ratio"] + 0.05,
            )


def _fastest(found: Results) -> Iterable[Finding]:
    for dtype in ("fp32", "bf16"):
        for name, result, row in ours(found, dtype):
            peers = {peer: other for peer, other in result["rows"].items() if peer not in NO_PEERS}
            if peers:
                best = min(peers, key=lambda peer: peers[peer]["of_limit"]["median"])
                yield Finding(f"{name}, of {LABELS[best]}", _lower(row, peers[best]), 1.0)


def _lower(row: Results, peer: Results) -> float:
    """Lower quartile over rounds of our time over a peer's, to exclude noise."""
    if "ours_of_it" in peer:
        return peer["ours_of_it"]["low"]
    return row["of_limit"]["low"] / peer["of_limit"]["high"]


def _memory(found: Results) -> Iterable[Finding]:
    for result in found.get("layers", ()):
        used = result["memory"].get("Ours", {})
        if "of_goal" in used:
            yield Finding(f"{result['name']}, {result['dtype']}", used["of_goal"], 1.1)


def _routing(found: Results) -> Iterable[Finding]:
    for dtype in ("fp32", "bf16"):
        for name, result, _ in ours(found, dtype):
            if "routing_share" in result and result["width"] >= 512:
                yield Finding(name, result["routing_share"]["median"], 0.08)


def _whole_step(found: Results) -> Iterable[Finding]:
    for result in found.get("steps", ()):
        rows = result["rows"]
        peers = {
            label: row["of_limit"]["median"]
            for label, row in rows.items()
            if label.startswith("HF")
        }
        if "ours" in rows and peers:
            best = min(peers, key=peers.get)
            yield Finding(
                f"{result['name']}, {result['dtype']}, {result['threads']} threads, of {best}",
                peers[best] / rows["ours"]["of_limit"]["median"],
                1.5 if result["dtype"] == "fp32" else 2.0,
                at_most=False,
            )


def _whole_run(found: Results) -> Iterable[Finding]:
    for result in found.get("runs", ()):
        whole = result["rows"][-1]
        off = whole["time_ratio"]["median"] / whole["predicted_ratio"]
        yield Finding(f"{result['name']}, {result['threads']} threads", abs(off - 1), 0.15)


GOALS = (
    Goal(
        "layer, fp32, segments of 512 rows or more: at most 1.12 of the limit", _long("fp32", 1.12)
    ),
    Goal("the same: never slower than the dense FFN of equal FLOPs", _dense),
    Goal(
        "layer, fp32, segments of 32 to 511 rows: at most 1.12 of the floor", _short("fp32", 1.12)
    ),
    Goal("layer, bf16, segments of 512 rows or more: at most 1.3 of the limit", _long("bf16", 1.3)),
    Goal(
        "layer, bf16, segments of 32 to 511 rows: at most 1.25 of the floor", _short("bf16", 1.25)
    ),
    Goal("dense-to-sparse, fp32, any point, uneven loads: at most 1.2 of the limit", _annealing),
    Goal(
        "the same at 2 of 16 experts per token: at least 6 times faster than all, masked", _masked
    ),
    Goal("top-p with null share s: at most (1 − s) + 0.05 of the time without", _nulls),
    Goal("fastest contender: ours in every case, or within noise of it", _fastest),
    Goal("memory of a step beyond weights and their gradients: at most 1.1 of N·(F + 2D)", _memory),
    Goal("routing: at most 8 % of the layer at D of 512 or more", _routing),
    Goal(
        "whole step: at least 1.5 times the best of Hugging Face's in fp32, 2 times in bf16",
        _whole_step,
    ),
    Goal("EvoMoE's whole run: within 15 % of the ratio predicted by matmul FLOPs", _whole_run),
)


def goals_table(found: Results) -> str:
    """Each goal: met, missed or not measured; in how many cases, and the worst case."""
    rows = []
    for goal in GOALS:
        findings = list(goal.find(found))
        if not findings:
            rows.append([goal.text, "not measured", "–", "–"])
            continue
        met = sum(finding.is_met for finding in findings)
        worst = max(findings, key=lambda f: (f.value / f.bound) * (1 if f.at_most else -1))
        rows.append(
            [
                goal.text,
                "**met**" if met == len(findings) else "missed",
                f"{met} of {len(findings)}",
                f"{worst.value:.2f} ({worst.case})",
            ]
        )
    return table(["goal", "", "cases", "worst"], rows)


def missed(found: Results) -> str:
    """Every case that misses its goal."""
    lines = []
    for goal in GOALS:
        for finding in goal.find(found):
            if not finding.is_met:
                lines.append(f"- {goal.text}: {finding.value:.2f} in {finding.case}")
    return "\n".join(lines)
