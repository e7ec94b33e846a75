"""Parse fairseq's log (`--log-format json`); other lines are ignored."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evomoe_plugin.config.errors import OptionError

_COUNT = "num_updates"
_EXPERTS = "experts_"


@dataclass(frozen=True)
class Record:
    """One line of metrics: averages over the updates since the previous line, unless noted."""

    update: int
    """Completed updates."""
    values: dict[str, float]
    """The numbers of the log, by the names of docs/options.md."""


@dataclass(frozen=True)
class ExpertRecord:
    """One line of `--moe-log-experts`: the routing of one update's tokens."""

    update: int
    """Completed updates."""
    layers: dict[str, list[Any]]
    """A list over MoE layers each (`trainer.expert_log.by_layer`); with the prefixes `encoder_` and
    `decoder_` where there are both."""

    @property
    def loads(self) -> dict[str, list[float] | None]:
        """Of each MoE layer, by its name, the shares of the pairs that its experts have."""
        return self.of("load")

    def of(self, name: str) -> dict[str, Any]:
        """A value of `layers` by the name of the MoE layer; None: LayerDrop left it out."""
        stacks = (key.removesuffix("load") for key in self.layers if key.endswith("load"))
        return {
            layer_name(stack, n): value
            for stack in stacks
            for n, value in enumerate(self.layers.get(stack + name, ()))
        }


def layer_name(stack: str, n: int) -> str:
    """What the n-th MoE layer of a stack of layers (`encoder_`, `decoder_` or "") is called."""
    return f"{stack}MoE layer {n}".replace("_", ", ")


@dataclass
class TrainingLog:
    """The metrics of one run, in order of updates."""

    name: str
    """Of the file, without its suffix."""
    intervals: list[Record] = field(default_factory=list)
    """One per `--log-interval` updates."""
    summaries: dict[str, list[Record]] = field(default_factory=dict)
    """Summaries by the prefix of their metrics: `train` at the end of an epoch and of the run, once
    its checkpoint is saved; `valid` and other subsets at each validation."""
    experts: list[ExpertRecord] = field(default_factory=list)
    """Those of `--moe-log-experts`."""

    @property
    def stacks(self) -> list[str]:
        """Prefixes of the metrics of routing: `encoder_` and `decoder_`, or "" where there is one
        stack of layers."""
        suffix = "experts_per_token"
        names = {name: None for record in self.intervals for name in record.values}
        return [name.removesuffix(suffix) for name in names if name.endswith(suffix)] or [""]

    @property
    def subsets(self) -> list[str]:
        """Names of the validation sets, `valid` first."""
        return sorted(self.summaries.keys() - {"train"}, key=lambda name: (name != "valid", name))

    def series(self, metric: str, summary: str | None = None) -> tuple[list[int], list[float]]:
        """Updates and values of a metric, from the intervals or a summary."""
        records = self.intervals if summary is None else self.summaries.get(summary, [])
        known = [(r.update, r.values[metric]) for r in records if metric in r.values]
        return [update for update, _ in known], [value for _, value in known]

    def add(self, line: str) -> Record | None:
        """Parse one line; return its record if it is an interval, else None.

        A resumed run logs the updates after its checkpoint again: later lines replace earlier ones.
        """
        found = _parse(line)
        if found is None:
            return None
        if isinstance(found, ExpertRecord):
            _drop_from(self.experts, found.update)
            self.experts.append(found)
            return None
        name, record = found
        if name:
            _drop_from(self.summaries.setdefault(name, []), record.update)
            self.summaries[name].append(record)
            return None
        if self.intervals and record.update <= self.intervals[-1].update:
            for records in self.summaries.values():
                _drop_from(records, record.update)
        _drop_from(self.intervals, record.update)
        self.intervals.append(record)
        return record


def _drop_from(records: list[Record] | list[ExpertRecord], update: int) -> None:
    while records and records[-1].update >= update:
        records.pop()


def _parse(line: str) -> tuple[str, Record] | ExpertRecord | None:
    """The prefix of the metrics ('' for intervals) and the record, if the line has one."""
    start = line.find('{"')
    if start < 0:
        return None
    try:
        # Text after the object (terminal control codes, other programs' output) is ignored.
        logged, _ = json.JSONDecoder().raw_decode(line, start)
    except ValueError:  # truncated, or not JSON
        return None
    if _EXPERTS + _COUNT in logged:
        update = logged.pop(_EXPERTS + _COUNT)
        return ExpertRecord(int(update), logged)
    prefix = next((key.removesuffix(_COUNT) for key in logged if key.endswith(_COUNT)), None)
    if prefix is None or (prefix and not prefix.endswith("_")):
        return None
    values = {}
    for key, value in logged.items():
        with contextlib.suppress(TypeError, ValueError):  # a list, or "None"
            if key.startswith(prefix):
                values[key.removeprefix(prefix)] = float(value)
    update = values.pop(_COUNT, None)
    return None if update is None else (prefix.removesuffix("_"), Record(int(update), values))


def parse_log(lines: Iterable[str], name: str = "") -> TrainingLog:
    """The metrics in `lines`, possibly none."""
    log = TrainingLog(name)
    for line in lines:
        log.add(line)
    return log


def read_log(path: str | Path) -> TrainingLog:
    """The metrics in a file.

    Raises:
        OptionError: it cannot be read, or has no training metrics.
    """
    path = Path(path)
    try:
        with open(path, encoding="utf-8", errors="replace") as lines:
            log = parse_log(lines, path.stem)
    except FileNotFoundError:
        raise OptionError(
            "LOG", path, "no such file; give the saved output of fairseq-train, or its --log-file"
        ) from None
    except OSError as error:
        raise OptionError("LOG", path, f"cannot be read ({error.strerror})") from None
    if not log.intervals:
        raise OptionError(
            "LOG",
            path,
            "has no training metrics; log with --log-format json, and "
            "train for at least --log-interval updates",
        )
    return log
