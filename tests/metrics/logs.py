"""Lines of fairseq's log."""

from __future__ import annotations

import json

from evomoe_plugin.metrics import TrainingLog, parse_log


def line(tag: str, **values: object) -> str:
    """A line of fairseq-train: `train_inner` bare, other tags before each metric's name."""
    prefix = "" if tag == "train_inner" else f"{tag}_"
    logged = {"epoch": 1, **{f"{prefix}{k}": v for k, v in values.items()}}
    return f"2026-01-02 03:04:05 | INFO | {tag} | {json.dumps(logged)}\n"


def interval(update: int, **values: object) -> str:
    """A line of an interval; numbers are strings, as fairseq writes them."""
    return line("train_inner", num_updates=str(update), **{k: str(v) for k, v in values.items()})


def diversified(interval_of: int = 10) -> TrainingLog:
    """Both phases of EvoMoE: one expert, 8 spawned after update 30, hard top-1 from 70; the last
    update is 100."""
    experts = [1] * 30 + [8] * 20 + [4] * 20 + [1] * 30
    active = [1] * 30 + [None] * 70
    temperatures = [None] * 30 + [2] * 20 + [1] * 20 + [0.1] * 30
    lines = []
    for end in range(interval_of, 101, interval_of):
        part = slice(end - interval_of, end)
        values = {"experts_per_token": _mean(experts[part])}
        for name, metric in (("temperature", temperatures), ("active_experts", active)):
            if known := [value for value in metric[part] if value is not None]:
                values[name] = _mean(known)
        lines.append(
            interval(
                end,
                inner_loss=9 - end / 50,
                wpb=1000,
                wps=2000,
                mflops_per_token=2 + values["experts_per_token"],
                **values,
            )
        )
    return parse_log(lines, "diversified")


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def evolution() -> TrainingLog:
    """From 8 experts to 1 in 100 updates, logged every 10; hard from update 60."""
    experts = [8, 8, 7.9, 5, 3, 1.5, 1, 1, 1, 1]
    temperatures = [2, 1.5, 1, 0.6, 0.3, 0.2, 0.1, 0.1, 0.1, 0.1]
    return parse_log(
        [
            interval(
                10 * (i + 1),
                experts_per_token=e,
                temperature=t,
                inner_loss=8 - 0.4 * i,
                ppl=2 ** (8 - 0.4 * i),
                wpb=1000,
                wps=1000 / (0.05 + 0.1 * e),
                train_wall=round(10 * (0.05 + 0.1 * e)),
                mflops_per_token=2 + e,
            )
            for i, (e, t) in enumerate(zip(experts, temperatures, strict=True))
        ]
        + [line("valid", num_updates="50", inner_loss="6.5", ppl="90.5")],
        "evolution",
    )
